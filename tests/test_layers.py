"""The layers against lax, against NumPy, and against their own definition."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import layers, sharding
from unet_jax.compiled import collectives


def _random(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def test_crop_begins_at_half_the_surplus_and_align_splits_as_pytorch_does():
    x = jnp.arange(7.0).reshape(1, 7, 1, 1)
    np.testing.assert_array_equal(layers.crop(x, (4, 1)).ravel(), [1, 2, 3, 4])
    out = layers.align(x[:, :4], (7, 1))
    np.testing.assert_array_equal(out.ravel(), [0, 0, 1, 2, 3, 0, 0])
    np.testing.assert_array_equal(layers.align(x, (4, 1)).ravel(), [1, 2, 3, 4])


@pytest.mark.parametrize("pads", [((0, 0), (2, 3)), ((5, 9), (0, 1)), ((0, 0), (0, 0))])
def test_mirror_is_the_same_on_host_and_device(rng, pads):
    x = np.asarray(rng.integers(0, 255, (2, 3, 4, 1)), np.uint8)
    host = layers.mirror(x, pads)
    assert host.dtype == np.uint8
    np.testing.assert_array_equal(host, layers.mirror(jnp.asarray(x), pads))


def test_mirror_does_not_repeat_the_border():
    row = layers.mirror(np.arange(4), ((2, 3),), axis=0)
    np.testing.assert_array_equal(row, [2, 1, 0, 1, 2, 3, 2, 1, 0])


# --- Mirrored borders ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "pads"),
    [
        ((6, 5), ((1, 1), (2, 2))),
        ((6, 4), ((0, 3), (1, 0))),
        ((9,), ((4, 2),)),
        ((3, 2), ((2, 2), (2, 2))),  # as wide as can be; back and forth
        ((2, 7), ((2, 1), (0, 0))),
        ((1, 1), ((3, 3), (1, 1))),
        ((4, 3, 5), ((1, 2), (0, 0), (3, 3))),
    ],
)
def test_mirrored_is_mirror_and_so_is_its_gradient(rng, size, pads):
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((2, *size, 3)))
        wide = [n + sum(pad) for n, pad in zip(size, pads, strict=True)]
        g = jnp.asarray(rng.standard_normal((2, *wide, 3)))

        @partial(jax.jit, static_argnums=0)
        def both(function, x):
            y, back = jax.vjp(lambda x: function(x, pads), x)
            return y, back(g)

        ours, expected = both(layers.mirrored, x), both(layers.mirror, x)
        chex.assert_trees_all_equal(ours[0], expected[0])
        chex.assert_trees_all_close(ours[1], expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("by", [-3, -1, 0, 2, 3])
def test_shifted_fills_with_zeros(by):
    x = np.arange(1.0, 7.0, dtype=np.float32).reshape(2, 3)
    expected = np.zeros_like(x)
    for i in range(3):
        if 0 <= i + by < 3:
            expected[:, i] = x[:, i + by]
    np.testing.assert_array_equal(layers.shifted(jnp.asarray(x), 1, by), expected)


class _Reflected(nn.Module):
    """A convolution of a factory with mirrored borders."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        make = layers.conv_factory(
            padding="reflect",
            use_bias=False,
            init=layers.INITIALISERS["he_normal"],
            dtype=self.dtype,
        )
        return make(features=4, kernel=self.kernel, stride=self.stride, name="conv")(x)


@pytest.mark.parametrize(
    ("size", "kernel", "stride"),
    [
        ((20, 6), (3, 3), (1, 1)),
        ((19, 6), (5, 3), (2, 2)),
        ((8, 6), (3, 5), (1, 1)),
        ((7, 4), (5, 1), (2, 3)),
        ((4, 5), (1, 3), (1, 1)),
        ((2, 1), (5, 3), (1, 1)),
        ((5, 6, 4), (3, 3, 3), (1, 1, 1)),
        ((18, 4, 5), (3, 1, 3), (2, 2, 2)),
    ],
)
def test_reflected_convolutions_are_those_of_flax(rng, size, kernel, stride):
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((2, *size, 3)))
        w = jnp.asarray(rng.standard_normal((*kernel, 3, 4)))
        ours = _Reflected(kernel, stride, jnp.float64)
        theirs = nn.Conv(
            4, kernel, stride, "REFLECT", use_bias=False, dtype=jnp.float64
        )

        @partial(jax.jit, static_argnums=0)
        def both(function, *given):
            y, back = jax.vjp(function, *given)
            return y, back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

        chex.assert_trees_all_close(
            both(lambda x, w: ours.apply({"params": {"conv": {"kernel": w}}}, x), x, w),
            both(lambda x, w: theirs.apply({"params": {"kernel": w}}, x), x, w),
            rtol=0,
            atol=1e-11,
        )


def _over_devices(module, variables, size):
    """The gradient compiled for maps split over all devices; what devices say."""
    mesh = sharding.make_mesh(1, jax.device_count())
    whole, rows = sharding.replicated(mesh), sharding.split(mesh, len(size))

    def loss(variables, x):
        return jnp.sum(jnp.sin(module.apply(variables, x)))

    gradient = jax.jit(
        sharding.within(mesh, jax.grad(loss, (0, 1))),
        in_shardings=(whole, rows),
        out_shardings=(whole, rows),
    )
    x = jax.ShapeDtypeStruct(size, jnp.float32)
    program = gradient.lower(variables, x).compile()
    return program, collectives(program.as_text())


@pytest.mark.parametrize("rows", [8, 20])
def test_mirrored_borders_of_maps_over_two_devices(rng, rows):
    x = _random(rng, 2, rows, 6, 3)
    module = _Reflected((5, 5), (1, 1))
    variables = module.init(jax.random.key(0), x)
    program, found = _over_devices(module, variables, x.shape)
    assert set(found) == {"collective-permute", "all-reduce"}
    expected = jax.grad(lambda *a: jnp.sum(jnp.sin(module.apply(*a))), (0, 1))
    whole, split = program.input_shardings[0]
    given = jax.device_put(variables, whole), jax.device_put(x, split)
    chex.assert_trees_all_close(
        jax.device_get(program(*given)), expected(variables, x), atol=1e-4
    )


EIGHT = """
import sys
sys.path.insert(0, {folder!r})
import jax
from test_layers import _Reflected, _over_devices
module = _Reflected((3, 3), (1, 1))
for size in {sizes}:
    variables = jax.eval_shape(module.init, jax.random.key(0), jax.numpy.zeros(size))
    found = _over_devices(module, variables, size)[1]
    print(sorted(found), found["all-reduce"].bytes)
"""


def test_mirrored_borders_over_eight_devices_gather_nothing():
    """Neither where a device has two rows of the map, nor where it has eight."""
    script = EIGHT.format(
        folder=str(Path(__file__).parent), sizes=[(2, 16, 6, 3), (2, 64, 6, 3)]
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    printed = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | flags,
        check=True,
        capture_output=True,
        text=True,
    )
    # What is summed up is the gradient of the kernel, 3 x 3 x 3 x 4 numbers.
    line = "['all-reduce', 'collective-permute'] 432\n"
    assert printed.stdout == 2 * line
