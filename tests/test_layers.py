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
from unet_jax.types import InputError


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


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 5)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
@pytest.mark.parametrize("padding", ["same", "valid", "reflect"])
def test_volumes_are_convolved_as_lax_does(rng, kernel, stride, padding):
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((2, 5, 6, 7, 3)))
        w = jnp.asarray(rng.standard_normal((*kernel, 3, 4)))
        widths = tuple((k // 2, k // 2) for k in kernel)
        given = {"same": widths, "valid": "VALID", "reflect": "VALID"}[padding]
        if padding == "reflect":
            x = jnp.pad(x, ((0, 0), *widths, (0, 0)), mode="reflect")
        spec = {"dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")}

        def both(convolve):
            def loss(x, w):
                y = convolve(x, w, stride, given, **spec)
                return jnp.sum(jnp.sin(y)), y

            return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, w)

        ours, theirs = both(layers.convolve), both(jax.lax.conv_general_dilated)
        chex.assert_trees_all_close(ours, theirs, atol=1e-11)


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


# --- Norms ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["batch", "instance", "group", "none"])
def test_norms_keep_the_type_and_normalise(rng, kind):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layers.norm_factory(kind, train=True, groups=2)(name="norm")(x)

    x = (3.0 + 2.0 * _random(rng, 4, 8, 8, 4)).astype(jnp.bfloat16)
    out, _ = Net().init_with_output(jax.random.key(0), x)
    assert out.dtype == jnp.bfloat16
    if kind == "none":
        chex.assert_trees_all_equal(out, x)
        return
    axes = {"batch": (0, 1, 2), "instance": (1, 2), "group": (1, 2, 4)}[kind]
    value = np.asarray(out, np.float64)
    if kind == "group":
        value = value.reshape(4, 8, 8, 2, 2)
    np.testing.assert_allclose(value.mean(axes), 0.0, atol=5e-3)
    np.testing.assert_allclose(value.std(axes), 1.0, atol=1e-2)


def test_unknown_names_are_refused_with_those_there_are():
    with pytest.raises(InputError, match="batch"):
        layers.norm_factory("bach", train=True)(name="norm")


# --- Norms against float64 -----------------------------------------------------------


class _Normed(nn.Module):
    """A layer of a norm factory."""

    kind: str
    train: bool = True
    groups: int = 8

    @nn.compact
    def __call__(self, x):
        make = layers.norm_factory(self.kind, train=self.train, groups=self.groups)
        return make(name="norm")(x)


KINDS = ["batch", "batch_unbiased", "instance", "instance_plain", "group"]


def _norm_variables(rng, kind, width):
    """Random scales, biases and running statistics, float64."""
    params = {k: rng.standard_normal(width) for k in ("scale", "bias")}
    variables = {"params": {} if kind == "instance_plain" else {"norm": params}}
    if kind.startswith("batch"):
        stats = {"mean": rng.standard_normal(width), "var": rng.uniform(1, 2, width)}
        variables["batch_stats"] = {"norm": stats}
    return variables


def _as(dtype, tree):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def _normalised(x, variables, kind, groups=1):
    """A norm in NumPy."""
    x = np.asarray(x, np.float64)
    space = tuple(range(1, x.ndim - 1))
    if kind.startswith("batch"):
        split, axes = x, (0, *space)
    else:
        groups = groups if kind == "group" else x.shape[-1]
        split = x.reshape(*x.shape[:-1], groups, -1)
        axes = (*space, x.ndim)
    mean, var = split.mean(axes, keepdims=True), split.var(axes, keepdims=True)
    y = ((split - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    params = variables["params"].get("norm", {"scale": 1.0, "bias": 0.0})
    return y * params["scale"] + params["bias"]


def _call(module, variables, x):
    """The output, and the statistics afterwards."""
    # flax's own batch norm mixes types in its statistics.
    with jax.numpy_dtype_promotion("standard"):
        y, updated = module.apply(variables, x, mutable=["batch_stats"])
    return y, updated.get("batch_stats", {}).get("norm", {})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (2, 3, 4, 5, 12)])
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (30.0, 0.05)])
def test_norms_equal_float64(rng, kind, shape, mean, deviation):
    x = np.float32(mean + deviation * rng.standard_normal(shape))
    variables = _norm_variables(rng, kind, shape[-1])
    y, _ = _call(_Normed(kind), _as(jnp.float32, variables), jnp.asarray(x))
    assert y.dtype == jnp.float32
    # Six channels are fewer than eight groups: one. Of twelve, gcd(8, 12) = 4.
    expected = _normalised(x, variables, kind, {6: 1, 12: 4}[shape[-1]])
    # Half a unit in the last place of 30 is 1e-6, and 2e-5 deviations. flax's batch
    # norm adds up all at once (`mean_over`).
    atol = 2e-6 if mean == 0 else 1e-3 if kind == "batch" else 2e-4
    np.testing.assert_allclose(y, expected, atol=atol)


@pytest.mark.parametrize(
    ("width", "groups"), [(3, 1), (7, 1), (8, 8), (12, 4), (9, 1), (16, 8)]
)
def test_groups_that_do_not_divide_the_width(rng, width, groups):
    x = np.float32(rng.standard_normal((2, 3, 2, width)))
    variables = _norm_variables(rng, "group", width)
    y, _ = _call(_Normed("group"), _as(jnp.float32, variables), jnp.asarray(x))
    expected = _normalised(x, variables, "group", groups)
    np.testing.assert_allclose(y, expected, atol=5e-6)


def test_a_mean_over_many_pixels_keeps_its_digits(rng):
    x = np.float32(30.0 + 0.05 * rng.standard_normal((2, 200, 300, 2)))
    mean = layers.mean_over(jnp.asarray(x), (1, 2))
    expected = np.mean(x, (1, 2), dtype=np.float64, keepdims=True)
    assert mean.shape == expected.shape == (2, 1, 1, 2)
    np.testing.assert_allclose(mean, expected, rtol=2e-7)
    chex.assert_trees_all_equal(layers.mean_over(jnp.asarray(x), (2, 1)), mean)


def test_unbiased_batch_norm_keeps_the_unbiased_variance(rng):
    x = np.float32(30.0 + 0.05 * rng.standard_normal((2, 3, 2, 5)))
    variables = _norm_variables(rng, "batch_unbiased", 5)
    module = _Normed("batch_unbiased")
    y, stats = _call(module, _as(jnp.float32, variables), jnp.asarray(x))
    values = np.asarray(x, np.float64).reshape(12, 5)
    old = variables["batch_stats"]["norm"]
    mean = 0.9 * old["mean"] + 0.1 * values.mean(0)
    var = 0.9 * old["var"] + 0.1 * values.var(0) * 12 / 11
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-6)
    # Both variances are of the order of epsilon: normalised is by the biased one.
    same, theirs = _call(_Normed("batch"), _as(jnp.float32, variables), jnp.asarray(x))
    np.testing.assert_allclose(y, same, atol=2e-4)
    np.testing.assert_allclose(stats["mean"], theirs["mean"], rtol=1e-6)


def test_unbiased_batch_norm_evaluates_by_its_statistics(rng):
    x = np.float32(rng.standard_normal((2, 3, 4)))
    variables = _norm_variables(rng, "batch_unbiased", 4)
    given = _as(jnp.float32, variables)
    y, stats = _call(_Normed("batch_unbiased", train=False), given, jnp.asarray(x))
    chex.assert_trees_all_equal(stats, given["batch_stats"]["norm"])
    old, params = variables["batch_stats"]["norm"], variables["params"]["norm"]
    expected = (x - old["mean"]) / np.sqrt(old["var"] + 1e-5)
    expected = expected * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, atol=2e-6)


def test_unbiased_batch_norm_begins_at_zero_and_one_and_init_counts_nothing(rng):
    x = jnp.asarray(30.0 + rng.standard_normal((2, 3, 4)), jnp.float32)
    variables = _Normed("batch_unbiased").init(jax.random.key(0), x)
    ones, zeros = jnp.ones(4, jnp.float32), jnp.zeros(4, jnp.float32)
    expected = {
        "params": {"norm": {"scale": ones, "bias": zeros}},
        "batch_stats": {"norm": {"mean": zeros, "var": ones}},
    }
    chex.assert_trees_all_equal(variables, expected)


def test_one_value_a_channel_has_no_variance_and_is_no_nan(rng):
    x = _random(rng, 1, 1, 1, 3)
    variables = _norm_variables(rng, "batch_unbiased", 3)
    given = _as(jnp.float32, variables)
    y, stats = _call(_Normed("batch_unbiased"), given, x)
    np.testing.assert_allclose(y.ravel(), variables["params"]["norm"]["bias"], 1e-6)
    old = variables["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["var"], 0.9 * old["var"], rtol=1e-6)
    for kind in KINDS:
        given = _as(jnp.float32, _norm_variables(rng, kind, 3))

        def total(x, kind=kind, given=given):
            return jnp.sum(jnp.sin(_call(_Normed(kind), given, x)[0]))

        assert np.all(np.isfinite(jax.grad(total)(x)))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_gradients_of_norms_are_those_of_flax(rng, kind):
    with jax.enable_x64(True):
        x = jnp.asarray(30.0 + 0.05 * rng.standard_normal((3, 4, 3, 12)))
        variables = _as(jnp.float64, _norm_variables(rng, kind, 12))
        options = {"epsilon": 1e-5, "dtype": jnp.float64, "use_fast_variance": False}
        theirs = {
            "batch_unbiased": nn.BatchNorm(use_running_average=False, **options),
            "instance": nn.InstanceNorm(**options),
            "instance_plain": nn.InstanceNorm(
                use_bias=False, use_scale=False, **options
            ),
            "group": nn.GroupNorm(num_groups=4, **options),
        }[kind]
        weights = jnp.asarray(rng.standard_normal(x.shape))
        bare = {k: tree.get("norm", {}) for k, tree in variables.items()}

        def gradients(module, variables):
            def loss(params, x):
                y, _ = _call(module, {**variables, "params": params}, x)
                return jnp.sum(weights * jnp.sin(y)), y

            return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)

        (params, by_x), y = gradients(_Normed(kind), variables)
        (flax_params, flax_by_x), flax_y = gradients(theirs, bare)
        chex.assert_trees_all_close(y, flax_y, rtol=1e-9, atol=1e-9)
        chex.assert_trees_all_close(by_x, flax_by_x, rtol=1e-8, atol=1e-8)
        chex.assert_trees_all_close(
            params.get("norm", {}), flax_params, rtol=1e-8, atol=1e-8
        )


@pytest.mark.parametrize("kind", ["batch_unbiased", "instance", "group"])
def test_a_norm_is_the_same_compiled_mapped_and_over_two_devices(rng, kind):
    x = np.float32(30.0 + 0.05 * rng.standard_normal((4, 5, 3, 12)))
    variables = _as(jnp.float32, _norm_variables(rng, kind, 12))
    run = jax.jit(partial(_call, _Normed(kind)))
    one, stats = _call(_Normed(kind), variables, jnp.asarray(x))
    chex.assert_trees_all_close(run(variables, x)[0], one, atol=2e-4)
    mesh = sharding.make_mesh(2)
    placed = jax.device_put(variables, sharding.replicated(mesh))
    two, others = run(placed, sharding.place({"image": x}, mesh)["image"])
    assert len(two.sharding.device_set) == 2
    chex.assert_trees_all_close(jax.device_get(two), np.asarray(one), atol=2e-4)
    chex.assert_trees_all_close(jax.device_get(others), stats, rtol=1e-5)
    # Batch norm mapped over examples takes each one's own statistics.
    mapped = jax.vmap(lambda x: _call(_Normed(kind), variables, x[None])[0][0])(x)
    rows = [_call(_Normed(kind), variables, x[i : i + 1])[0][0] for i in range(4)]
    chex.assert_trees_all_close(mapped, jnp.stack(rows), atol=2e-4)
    if kind != "batch_unbiased":
        chex.assert_trees_all_close(mapped, one, atol=2e-4)
