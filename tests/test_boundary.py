"""Distances of boundaries against closed forms and a loop over pairs of pixels."""

import itertools
import math

import numpy as np
import pytest

from unet_jax import boundary
from unet_jax.types import InputError


def square(begin, side=10, size=40):
    mask = np.zeros((size,) * len(begin), bool)
    mask[tuple(slice(b, b + side) for b in begin)] = True
    return mask


def ball(radius, centre, size=(41, 41)):
    grid = np.indices(size).reshape(len(size), -1).T
    inside = np.linalg.norm(grid - np.asarray(centre), axis=1) <= radius
    return inside.reshape(size)


def edge_pixels(mask):
    """The boundary by its definition, a pixel at a time."""
    found = []
    for place in zip(*np.nonzero(mask), strict=True):
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            near = list(place)
            near[axis] += step
            inside = 0 <= near[axis] < mask.shape[axis]
            if not inside or not mask[tuple(near)]:
                found.append(place)
                break
    return np.asarray(found, float).reshape(-1, mask.ndim)


def brute_force(label, prediction, spacing):
    """The distances of all pairs of pixels; the least of each row and column."""
    first, second = (edge_pixels(m) * np.asarray(spacing) for m in (label, prediction))
    table = np.linalg.norm(first[:, None] - second[None], axis=-1)
    return table.min(axis=1), table.min(axis=0)


@pytest.mark.parametrize(("size", "density"), [((9, 12), 0.3), ((5, 6, 7), 0.7)])
@pytest.mark.parametrize("anisotropic", [False, True])
def test_random_masks_against_all_pairs(rng, size, density, anisotropic):
    spacing = (0.5, 2.0, 3.0)[: len(size)] if anisotropic else (1.0,) * len(size)
    given = {"spacing": spacing} if anisotropic else {}
    for _ in range(10):
        label, prediction = (rng.random(size) < density for _ in range(2))
        there, back = brute_force(label, prediction, spacing)
        for percentile in (50.0, 95.0, 100.0):
            expected = max(np.percentile(x, percentile) for x in (there, back))
            actual = boundary.hausdorff(
                label, prediction, percentile=percentile, **given
            )
            assert actual == pytest.approx(expected, abs=1e-12)
        for tolerance in (0.0, 1.0, 1.5):
            near = (there <= tolerance).sum() + (back <= tolerance).sum()
            actual = boundary.surface_dice(
                label, prediction, tolerance=tolerance, **given
            )
            assert actual == pytest.approx(near / (there.size + back.size))


def test_the_frame_of_the_image_is_a_boundary():
    """A mask that fills its image has one: 16 of 25 pixels, the others inside."""
    full, inner = np.ones((5, 5), bool), np.zeros((5, 5), bool)
    inner[1:4, 1:4] = True
    assert boundary.hausdorff(full, inner, percentile=100) == math.sqrt(2)
    # All but the corners are at distance 1: 12 of 16, and all 8 of the inner mask.
    assert boundary.surface_dice(full, inner, tolerance=1.0) == 20 / 24


def test_a_shifted_square_is_as_far_as_its_shift():
    label, prediction = square((10, 10)), square((10, 13))
    assert boundary.hausdorff(label, prediction, percentile=100) == 3.0
    scaled = boundary.hausdorff(label, prediction, percentile=100, spacing=(9.0, 0.5))
    assert scaled == 1.5
    diagonal = boundary.hausdorff(label, square((13, 14)), percentile=100)
    assert diagonal == 5.0
    # Of each outline's 36 pixels the 14 stay where the long sides overlap.
    assert boundary.surface_dice(label, prediction, tolerance=0.0) == 14 / 36
    assert boundary.surface_dice(label, prediction, tolerance=3.0) == 1.0


@pytest.mark.parametrize("size", [(41, 41), (31, 31, 31)])
def test_concentric_balls_are_as_far_as_their_radii_differ(size):
    centre = [n // 2 for n in size]
    inner, outer = ball(8, centre, size), ball(12, centre, size)
    distance = boundary.hausdorff(inner, outer)
    assert distance == pytest.approx(4.0, abs=1.0)
    assert boundary.surface_dice(inner, outer, tolerance=2.0) == 0.0
    assert boundary.surface_dice(inner, outer, tolerance=6.0) == 1.0


def test_the_percentile_does_not_see_a_stray_pixel_and_the_maximum_does():
    label = square((5, 5), side=20)
    prediction = label.copy()
    prediction[38, 15] = True
    assert boundary.hausdorff(label, prediction) == 0.0
    assert boundary.hausdorff(label, prediction, percentile=100) == 14.0


def test_symmetric_and_the_same_wherever_it_lies(rng):
    label, prediction = rng.random((2, 12, 12)) < 0.4
    wide = [np.pad(mask, ((3, 9), (20, 1))) for mask in (label, prediction)]
    for score in (
        lambda a, b: boundary.hausdorff(a, b, spacing=(1.0, 2.0)),
        lambda a, b: boundary.surface_dice(a, b, tolerance=1.0, spacing=(1.0, 2.0)),
    ):
        assert score(label, prediction) == score(prediction, label)
        assert score(label, prediction) == score(*wide)
    assert boundary.hausdorff(label, label) == 0.0
    assert boundary.surface_dice(label, label, tolerance=0.0) == 1.0


def test_empty_masks():
    empty, full = np.zeros((30, 40), bool), square((3, 3), size=40)[:30]
    assert boundary.hausdorff(empty, empty) == 0.0
    assert boundary.surface_dice(empty, empty, tolerance=1.0) == 1.0
    for pair in ((empty, full), (full, empty)):
        assert boundary.hausdorff(*pair) == 50.0
        assert boundary.hausdorff(*pair, spacing=(2.0, 2.0)) == 100.0
        assert boundary.surface_dice(*pair, tolerance=1e9) == 0.0
    corners = np.zeros((2, 30, 40), bool)
    corners[0, 0, 0] = corners[1, -1, -1] = True
    furthest = boundary.hausdorff(*corners)
    assert furthest == pytest.approx(math.hypot(29, 39))
    assert furthest < 50.0
    nothing = np.zeros((0, 4), bool)
    assert boundary.hausdorff(nothing, nothing) == 0.0


MASK = np.ones((4, 4), bool)


@pytest.mark.parametrize(
    ("label", "prediction", "options", "words"),
    [
        (MASK.astype(int), MASK, {}, "label == 1"),
        (MASK, MASK.astype(np.float32), {}, "prediction == 1"),
        (np.bool_(True), MASK, {}, "not a boolean mask"),
        (MASK, MASK[:3], {}, "one size"),
        (MASK, MASK, {"spacing": (1.0,)}, "each of the 2 axes"),
        (MASK, MASK, {"spacing": (1.0, 0.0)}, "each of the 2 axes"),
        (MASK, MASK, {"percentile": 0.0}, "percentile = 0.0"),
        (MASK, MASK, {"percentile": 101.0}, "percentile = 101.0"),
        (MASK, MASK, {"tolerance": -1.0}, "tolerance = -1.0"),
        (MASK, MASK, {"tolerance": float("nan")}, "tolerance = nan"),
    ],
)
def test_what_cannot_be_measured_is_refused(label, prediction, options, words):
    score = boundary.surface_dice if "tolerance" in options else boundary.hausdorff
    with pytest.raises(InputError, match=words):
        score(label, prediction, **options)
