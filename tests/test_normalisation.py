"""Normalisation: the same numbers at loading and inside the step."""

import jax
import numpy as np
import pytest

from unet_jax import normalisation
from unet_jax.types import InputError


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_range_makes_white_one(dtype):
    white = np.full((1, 2, 2, 3), np.iinfo(dtype).max, dtype)
    stats = normalisation.measure("range", [white[0]])
    assert stats["dtype"] == np.dtype(dtype).name
    out = jax.jit(lambda x: normalisation.normalise(x, stats))(white)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, 1.0, rtol=1e-6)


def test_floats_are_left_as_they_are_by_range(rng):
    image = rng.standard_normal((4, 4, 1)).astype(np.float32)
    stats = normalisation.measure("range", [image])
    np.testing.assert_array_equal(normalisation.normalise(image[None], stats)[0], image)


def test_standard_is_over_all_pixels_of_all_images(rng):
    images = [rng.integers(0, 2000, (size, 5, 2)).astype(np.uint16) for size in (3, 40)]
    stats = normalisation.measure("standard", iter(images))
    rows = np.concatenate(
        [np.asarray(normalisation.normalise(i[None], stats))[0] for i in images]
    )
    np.testing.assert_allclose(rows.mean((0, 1)), 0.0, atol=1e-5)
    np.testing.assert_allclose(rows.std((0, 1)), 1.0, rtol=1e-5)


def test_example_is_done_at_loading(rng):
    image = (1000 * rng.random((6, 5, 4, 2)) + 7).astype(np.float32)
    image[..., 1] = 3.0
    out = normalisation.standardise(image)
    np.testing.assert_allclose(out[..., 0].mean(), 0.0, atol=1e-6)
    np.testing.assert_allclose(out[..., 0].std(), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(out[..., 1], 0.0)
    stats = normalisation.measure("example", [out])
    np.testing.assert_array_equal(normalisation.normalise(out[None], stats)[0], out)


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="range"):
        normalisation.measure("minmax", [np.zeros((1, 1, 1))])


def test_a_narrow_range_is_pointed_out(rng):
    camera = [rng.integers(500, 3800, (8, 8, 1)).astype(np.uint16) for _ in range(3)]
    stats = normalisation.measure("range", camera)
    assert "5.0% of the range of uint16" in normalisation.advice(stats, camera)
    standard = normalisation.measure("standard", iter(camera))
    assert normalisation.advice(standard, camera) == ""
    full = [rng.integers(0, 256, (8, 8, 1)).astype(np.uint8)]
    assert normalisation.advice(normalisation.measure("range", full), full) == ""
