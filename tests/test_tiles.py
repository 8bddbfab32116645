"""Tiles: windows that cover an axis exactly, and one compiled shape."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_jax import models, tiles
from unet_jax.models import UNet


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 400),
    tile=st.integers(0, 200),
    overlap=st.floats(0, 0.95),
    depth=st.integers(1, 3),
    padding=st.sampled_from(["same", "valid"]),
)
def test_windows_cover_the_axis(size, tile, overlap, depth, padding):
    model = UNet(2, features=(1,) * (depth + 1), padding=padding)
    axis = models.axes(model, 2)[0]
    cuts = tiles.cut(axis, size, tile=tile, overlap=overlap)
    (before, after), _ = models.pads(model, (size, 1))
    assert cuts.begins[0] == 0
    assert cuts.begins[-1] + cuts.window == before + size + after
    assert all(begin % 2**depth == 0 for begin in cuts.begins)
    assert all(np.diff(cuts.begins) > 0)
    models.output_size(model, (cuts.window,) * 2)  # a size that the net works at
    total = np.zeros(before + size + after - 2 * axis.margin)
    for begin, share in zip(cuts.begins, cuts.shares, strict=True):
        assert share.min() >= 0
        total[begin : begin + len(share)] += share
    np.testing.assert_allclose(total, 1, rtol=1e-5)
    if tile == 0 or size <= tile:
        assert cuts.begins == (0,)
    else:
        assert cuts.window - 2 * axis.margin < tile + 2 * 2**depth


@pytest.mark.parametrize(("overlap", "begins"), [(0.0, (0, 16, 32)), (0.5, 5)])
def test_overlap_sets_the_number_of_windows(overlap, begins):
    (axis, _) = models.axes(UNet(2, features=(1, 1)), 2)
    cuts = tiles.cut(axis, 48, tile=16, overlap=overlap)
    if isinstance(begins, tuple):
        assert cuts.begins == begins
    else:
        assert len(cuts.begins) == begins


def test_run_puts_the_windows_together():
    """A net that returns its input gives the image back, with batches of 3."""
    axis, _ = models.axes(UNet(2, features=(1, 1)), 2)
    image = np.random.default_rng(0).normal(size=(40, 26, 1)).astype(np.float32)
    cuts = [tiles.cut(axis, n, tile=10, overlap=0.3) for n in image.shape[:2]]
    shapes = []

    def net(batch):
        shapes.append(batch.shape)
        return batch

    out = tiles.run(net, image, cuts, channels=1, batch_size=3)
    np.testing.assert_allclose(out, image, rtol=1e-5, atol=1e-6)
    assert set(shapes) == {(3, 10, 10, 1)}
