"""Distances and slack against closed forms and a loop over pairs of pixels."""

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


def relaxed_brute_force(probability, label, weight, tolerance, thresholds):
    """Every predicted pixel with every true one."""
    rows = []
    true = np.argwhere(label & (weight > 0))
    for threshold in thresholds:
        predicted = np.argwhere((probability > threshold) & (weight > 0))
        apart = ((predicted[:, None] - true[None]) ** 2).sum(axis=-1)
        near = apart <= tolerance**2
        right, found = near.any(axis=1).sum(), near.any(axis=0).sum()
        rows.append([right, len(predicted), found, len(true)])
    return rows


@pytest.mark.parametrize("size", [(14, 17), (6, 7, 8)])
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 1.5, 3.0])
def test_relaxed_counts_against_all_pairs(rng, size, tolerance):
    thresholds = (-1.0, 0.0, 0.5, 0.9, 0.97, 1.0)
    for density in (0.0, 0.02, 0.3):
        probability, label = rng.random(size), rng.random(size) < density
        weight = (rng.random(size) < 0.8).astype(np.float32)
        for given in (None, weight):
            counts = boundary.relaxed_counts(
                probability, label, given, tolerance=tolerance, thresholds=thresholds
            )
            kept = np.ones(size) if given is None else weight
            assert counts.tolist() == relaxed_brute_force(
                probability, label, kept, tolerance, thresholds
            )
            assert counts.dtype == np.int64


def test_slack_forgives_three_pixels_and_not_four():
    road = np.zeros((20, 40), bool)
    road[10] = True
    for shift, right in ((0, 40), (3, 40), (4, 0)):
        moved = np.roll(road, shift, axis=0) * 1.0
        counts = boundary.relaxed_counts(moved, road, thresholds=(0.5,))
        assert counts.tolist() == [[right, 40, right, 40]]
    # At its threshold a pixel is not predicted, as everywhere else.
    counts = boundary.relaxed_counts(road * 0.5, road, thresholds=(0.49, 0.5))
    assert counts.tolist() == [[40, 40, 40, 40], [0, 0, 0, 40]]
    # A road that is too wide is right as far as 3 pixels, one that ends is missed
    # from 3 pixels on: columns 0 to 12 of 40 are near a prediction of 0 to 9.
    wide = np.zeros((20, 40))
    wide[5:16] = 1.0
    counts = boundary.relaxed_counts(wide, road, thresholds=(0.5,))
    assert counts.tolist() == [[7 * 40, 11 * 40, 40, 40]]
    short = road * 1.0
    short[:, 10:] = 0.0
    counts = boundary.relaxed_counts(short, road, thresholds=(0.5,))
    assert counts.tolist() == [[10, 10, 13, 40]]


def test_break_even_is_where_the_lines_cross():
    counts = np.array([[[5, 10, 9, 10], [8, 10, 7, 10], [9, 10, 1, 10]]])
    scores = boundary.break_even(counts, thresholds=(0.2, 0.4, 0.6))
    # Precision 0.5 + 0.3 s and recall 0.9 - 0.2 s meet at s = 0.8.
    assert scores["break_even"] == pytest.approx(0.74)
    assert scores["break_even_threshold"] == pytest.approx(0.36)
    # Images are added up: 12 of 20 and 24 of 40, though each alone is apart.
    counts = np.array([[[9, 10, 4, 20]], [[3, 10, 20, 20]]])
    assert boundary.break_even(counts, thresholds=(0.5,)) == {
        "break_even": 0.6,
        "break_even_threshold": 0.5,
    }
    # Of several crossings the highest, at a threshold or between two.
    counts = np.array([[[6, 10, 8, 10], [8, 10, 6, 10], [9, 10, 9, 10], [0, 0, 0, 10]]])
    scores = boundary.break_even(counts, thresholds=(0.1, 0.2, 0.3, 0.4))
    assert scores == {"break_even": 0.9, "break_even_threshold": 0.3}


def test_break_even_of_nothing_is_nan():
    for counts in (
        [[[0, 0, 0, 10]]],  # nothing is predicted
        [[[0, 10, 0, 0]]],  # nothing is there
        [[[9, 10, 5, 10], [10, 10, 1, 10]]],  # precision is always above
    ):
        levels = tuple(range(len(counts[0])))
        scores = boundary.break_even(np.array(counts), thresholds=levels)
        assert all(np.isnan(value) for value in scores.values())
    levels = len(boundary.RELAXED_THRESHOLDS)
    none = boundary.break_even(np.zeros((0, levels, 4), int))
    assert np.isnan(none["break_even"])


def test_break_even_of_a_perfect_and_of_a_better_map(rng):
    label = np.zeros((3, 40, 40), bool)
    label[:, 8:12] = label[:, :, 30:33] = True

    def score(noise):
        logits = 2 * label - 1 + noise * field
        maps = (1 / (1 + np.exp(-logits))).astype(np.float32)
        rows = map(boundary.relaxed_counts, maps, label)
        return boundary.break_even(np.stack(list(rows)))["break_even"]

    field = rng.normal(size=label.shape)
    perfect, good, poor = score(0.0), score(1.5), score(3.0)
    assert perfect == 1.0
    assert 1.0 > good > poor > 0.5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: boundary.relaxed_counts(MASK * 1.0, MASK * 1), "label == 1"),
        (lambda: boundary.relaxed_counts(MASK[:3] * 1.0, MASK), "one size"),
        (lambda: boundary.relaxed_counts(MASK, MASK, MASK[:3]), "one size"),
        (lambda: boundary.relaxed_counts(MASK * np.nan, MASK), "not finite"),
        (lambda: boundary.relaxed_counts(MASK, MASK, tolerance=-1.0), "-1.0 must be"),
        (lambda: boundary.relaxed_counts(MASK, MASK, thresholds=(0.5, 0.1)), "rising"),
        (lambda: boundary.relaxed_counts(MASK, MASK, thresholds=()), "rising"),
        (lambda: boundary.break_even(np.zeros((1, 3, 4))), "N x 104 x 4"),
    ],
)
def test_what_has_no_slack_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_an_unknown_pixel_of_weight_zero_may_hold_anything():
    probability, weight = np.full((4, 4), 0.8), np.ones((4, 4))
    probability[0, 0], weight[0, 0] = np.nan, 0
    counts = boundary.relaxed_counts(probability, MASK, weight, thresholds=(0.5,))
    assert counts.tolist() == [[15, 15, 15, 15]]
