"""The layers against lax, against NumPy, and against their own definition."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import layers
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
