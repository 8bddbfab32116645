"""Pooling and up-sampling against lax, against NumPy, and against their definition."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import resample


def _random(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("size", [(6, 8), (7, 5), (4, 6, 5)])
def test_max_pool_equals_reduce_window_in_value_and_gradient(rng, size):
    # Integers, so that ties are common: the first maximum must take the gradient.
    x = jnp.asarray(rng.integers(0, 3, (2, *size, 3)), jnp.float32)
    window = (2,) * len(size)
    ours, back = jax.vjp(partial(resample.max_pool, stride=window), x)
    theirs, lax_back = jax.vjp(lambda x: nn.max_pool(x, window, window), x)
    chex.assert_trees_all_equal(ours, theirs)
    g = _random(rng, *ours.shape)
    chex.assert_trees_all_equal(back(g), lax_back(g))


def test_max_pool_keeps_nan_and_axes_of_one():
    x = jnp.asarray([[1.0, jnp.nan, 3.0, 2.0]]).reshape(1, 1, 4, 1)
    out = resample.max_pool(x, (2, 2))
    chex.assert_shape(out, (1, 1, 2, 1))
    assert np.isnan(out[0, 0, 0, 0]) and out[0, 0, 1, 0] == 3.0


@pytest.mark.parametrize("rank", [2, 3])
def test_up_conv_is_the_transposed_convolution(rng, rank):
    x = _random(rng, 2, *(4, 3, 5)[:rank], 6)
    module = resample.UpConv(features=4)
    variables = module.init(jax.random.key(0), x)
    kernel = variables["params"]["kernel"]
    chex.assert_shape(kernel, (*(2,) * rank, 6, 4))
    variables["params"]["bias"] = _random(rng, 4)
    # lax lets tap k - 1 - i fill pixel 2 y + i, hence the flip.
    flipped = jnp.flip(kernel, tuple(range(rank)))
    spec = ("NHWC", "HWIO", "NHWC") if rank == 2 else ("NDHWC", "DHWIO", "NDHWC")
    expected = jax.lax.conv_transpose(
        x, flipped, (2,) * rank, "VALID", dimension_numbers=spec
    )
    bias = variables["params"]["bias"].reshape((1,) * (rank + 1) + (4,))
    chex.assert_trees_all_close(module.apply(variables, x), expected + bias, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (1, 5), (3, 2, 4)])
def test_linear_upsampling_equals_image_resize(rng, size):
    x = _random(rng, 2, *size, 3)
    shape = (2, *(2 * n for n in size), 3)
    expected = jax.image.resize(x, shape, "linear")
    chex.assert_trees_all_close(
        resample.linear(x, (2,) * len(size)), expected, atol=1e-6
    )


@pytest.mark.parametrize("size", [(4, 6), (1, 5), (3, 2, 4)])
def test_aligned_upsampling_equals_interpolation_between_the_corners(rng, size):
    x = _random(rng, 2, *size, 3)
    expected = np.asarray(x, np.float64)
    for axis, n in enumerate(size, start=1):
        at = np.linspace(0, n - 1, 2 * n)
        expected = np.apply_along_axis(
            lambda row, at=at: np.interp(at, np.arange(len(row)), row), axis, expected
        )
    out = resample.linear_aligned(x, (2,) * len(size))
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_nearest_upsampling_repeats(rng):
    x = _random(rng, 1, 2, 3, 1)
    out = resample.nearest(x, (2, 2))
    np.testing.assert_array_equal(out, np.asarray(x).repeat(2, 1).repeat(2, 2))
