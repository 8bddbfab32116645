"""The ISBI 2012 measures against closed forms, loops over pixels and Fiji's figures."""

import math
import os
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from unet_jax import partition
from unet_jax.types import InputError


def picture(text):
    """A map of the characters of a text, one row a line."""
    return np.array([list(row) for row in text.split()])


def cells(text):
    return picture(text) == "#"


def literal_watershed(height):
    """The flooding a pixel at a time, with a queue, level by level.

    A pixel is None while unseen, "mask" at this level, "queued", 0 as a dam, or of a
    region.
    """
    tall, wide = height.shape
    state = {(x, y): None for x in range(wide) for y in range(tall)}
    regions = 0

    def around(place):
        x, y = place
        near = [(x - 1, y), (x, y - 1), (x + 1, y), (x, y + 1)]
        return [other for other in near if other in state]

    for level in sorted(set(height.ravel().tolist())):
        pixels = [place for place in state if height[place[1], place[0]] == level]
        queue = deque()
        for place in pixels:
            state[place] = "mask"
            if any(isinstance(state[other], int) for other in around(place)):
                state[place] = "queued"
                queue.append(place)
        while queue:
            place = queue.popleft()
            may_change = False
            for other in around(place):
                here, there = state[place], state[other]
                if there == "mask":
                    state[other] = "queued"
                    queue.append(other)
                elif isinstance(there, int) and there > 0:
                    if here == "queued" or (here == 0 and may_change):
                        state[place] = there
                    elif isinstance(here, int) and here > 0 and here != there:
                        state[place] = 0
                        may_change = False
                elif there == 0 and here == "queued":
                    state[place] = 0
                    may_change = True
        for place in pixels:
            if state[place] != "mask":
                continue
            regions += 1
            state[place] = regions
            queue.append(place)
            while queue:
                for other in around(queue.popleft()):
                    if state[other] == "mask":
                        state[other] = regions
                        queue.append(other)
    return np.array([[state[x, y] for x in range(wide)] for y in range(tall)])


def disks(rng, size, number):
    """Round cells that touch and overlap, as probability maps have them."""
    inside = np.zeros(size, bool)
    for _ in range(number):
        y, x = np.indices(size)
        y, x = y - rng.uniform(0, size[0]), x - rng.uniform(0, size[1])
        inside |= y**2 + x**2 < rng.uniform(1, 5) ** 2
    return inside


@pytest.mark.parametrize("size", [(1, 11), (11, 1), (7, 5), (24, 31)])
def test_thinned_is_the_flooding_a_pixel_at_a_time(rng, size):
    maps = [rng.random(size) < density for density in (0.03, 0.1, 0.3, 0.6, 0.9)]
    maps += [disks(rng, size, 1 + number) for number in range(6)]
    for inside in maps:
        expected = literal_watershed(~inside)
        assert np.array_equal(partition.thinned(inside), expected)
        assert partition.thinned(inside).dtype == np.int32


def test_thinned_is_what_fiji_makes_of_it():
    """`WatershedTransform2D` of Fiji at commit 41c7083 wrote this."""
    y, x = np.indices((12, 16))
    inside = ((x * y + 2 * x + 3 * y) % 29 == 0) | ((x - 4) ** 2 + (y - 7) ** 2 < 5)
    expected = picture("""
        1111.444.6666666
        111.4444.6666666
        11.44444.6666666
        1..444444.666666
        .22.......66666.
        222.333333..66.7
        ...333333333..77
        33333333333.5.77
        3333333333.55.77
        333333333.5555.7
        33333333.555555.
        33333333.5555555""")
    expected = np.where(expected == ".", "0", expected).astype(int)
    assert np.array_equal(partition.thinned(inside), expected)


@pytest.mark.parametrize("gap", range(1, 7))
def test_a_gap_between_two_regions_becomes_one_dam(gap):
    """In the middle if that is a pixel, or else to the right of it, or below."""
    inside = np.ones((6, gap + 4), bool)
    inside[:, 2:-2] = False
    regions = partition.thinned(inside)
    expected = np.repeat(1 + (np.arange(gap + 4) > 2 + gap // 2)[None], 6, axis=0)
    expected[:, 2 + gap // 2] = 0
    assert np.array_equal(regions, expected)
    assert np.array_equal(partition.thinned(inside.T), expected.T)


def test_regions_that_touch_at_a_corner_are_two():
    inside = cells("##.. ##.. ..## ..##")
    assert partition.components(inside).max() == 2
    assert partition.thinned(inside).max() == 2


def test_a_map_of_one_kind_is_one_region():
    for inside in (np.zeros((4, 5), bool), np.ones((4, 5), bool)):
        assert (partition.thinned(inside) == 1).all()
    assert not partition.components(np.zeros((4, 5), bool)).any()
    alone = np.zeros((30, 40), bool)
    alone[3, 4] = True
    assert (partition.thinned(alone) == 1).all()


def every_pair(label, proposal):
    """All ordered pairs of the label's pixels, a loop; a dam is alone with itself."""
    pairs = zip(label.ravel(), proposal.ravel(), strict=True)
    pixels = [(a, b) for a, b in pairs if a]
    both = merged = split = 0
    for i, (a, b) in enumerate(pixels):
        for j, (c, d) in enumerate(pixels):
            together = i == j or (b == d and b > 0)
            both += a == c and together
            merged += a != c and together
            split += a == c and not together
    return both, merged, split


def test_rand_scores_against_all_pairs_of_pixels(rng):
    for regions in (1, 2, 5):
        label, proposal = rng.integers(0, regions + 1, (2, 5, 6))
        both, merged, split = every_pair(label, proposal)
        assert partition.pair_counts(label, proposal) == (both, merged, split)
        scores = partition.rand_scores(label, proposal)
        assert scores.split == pytest.approx(both / (both + split))
        assert scores.merge == pytest.approx(both / (both + merged))
        # Arganda-Carreras et al. 2015: alpha = 0.5 between the two.
        half = (both + merged) / 2 + (both + split) / 2
        assert scores.f == pytest.approx(both / half)


def entropy(values):
    numbers = np.unique(np.asarray(values), axis=0, return_counts=True)[1]
    return -sum(n / len(values) * math.log(n / len(values)) for n in numbers)


def information(label, proposal):
    """Entropies of label, proposal and both, a dam being a region of its own."""
    alone = proposal.max() + 1 + np.arange(proposal.size).reshape(proposal.shape)
    proposal = np.where(proposal == 0, alone, proposal)
    pairs = np.stack([label[label > 0], proposal[label > 0]], axis=1)
    return entropy(pairs[:, 0]), entropy(pairs[:, 1]), entropy(pairs)


def test_information_scores_from_first_principles(rng):
    for regions in (2, 3, 6):
        label, proposal = rng.integers(0, regions + 1, (2, 7, 9))
        of_label, of_proposal, of_both = information(label, proposal)
        shared = of_label + of_proposal - of_both
        scores = partition.information_scores(label, proposal)
        assert scores.split == pytest.approx(shared / of_proposal)
        assert scores.merge == pytest.approx(shared / of_label)
        expected = 2 * shared / (of_label + of_proposal)
        assert scores.f == pytest.approx(expected)


def test_two_cells_merged_one_split_and_a_dam():
    label = np.repeat([[1, 1, 1, 1, 2, 2, 2, 2]], 2, axis=0)
    one = np.ones_like(label)
    # 2 x 8^2 pairs belong together and 16^2 are put together.
    assert partition.rand_scores(label, one) == (1.0, 0.5, 2 / 3)
    assert partition.information_scores(label, one) == (0.0, 1.0, 0.0)
    halves = np.repeat([[1, 1, 2, 2, 3, 3, 4, 4]], 2, axis=0)
    # Of each 8^2 pairs 2 x 4^2 stay; of log 4 in the proposal log 2 is the label's.
    assert partition.rand_scores(label, halves) == (0.5, 1.0, 2 / 3)
    split, merge, f = partition.information_scores(label, halves)
    assert (split, merge, f) == pytest.approx((0.5, 1.0, 2 / 3))
    dam = np.repeat([[1, 1, 0, 2, 3, 3, 3, 3]], 2, axis=0)
    # A cell of 8 as 4 + 2 and two single pixels: 16 + 4 + 1 + 1 of its 64 pairs.
    assert partition.rand_scores(label, dam).split == (22 + 64) / 128
    assert partition.rand_scores(label, dam).merge == 1.0
    for scores in (partition.rand_scores, partition.information_scores):
        assert scores(label, label) == pytest.approx((1.0, 1.0, 1.0))
        assert scores(label, 7 * label + 1) == pytest.approx((1.0, 1.0, 1.0))


def test_what_lies_under_the_labels_membrane_does_not_count(rng):
    label, proposal = rng.integers(0, 4, (2, 8, 8))
    other = np.where(label == 0, rng.integers(0, 9, (8, 8)), proposal)
    for scores in (partition.rand_scores, partition.information_scores):
        assert scores(label, proposal) == scores(label, other)


def test_one_region_or_none():
    """Nothing is shared where there is no entropy: 0, as the reference has it."""
    one, none, two = np.ones((3, 4), int), np.zeros((3, 4), int), np.ones((3, 4), int)
    two[:, 2:] = 2
    assert partition.information_scores(one, one) == (0.0, 1.0, 0.0)
    assert partition.information_scores(one, two) == (1.0, 0.0, 0.0)
    assert partition.information_scores(two, one) == (0.0, 1.0, 0.0)
    assert partition.rand_scores(one, one) == (1.0, 1.0, 1.0)
    for scores in (partition.rand_scores, partition.information_scores):
        assert scores(none, two) == (0.0, 0.0, 0.0)
    # All dams: every pixel alone.
    assert partition.rand_scores(one, none) == pytest.approx((1 / 12, 1.0, 2 / 13))
    assert partition.information_scores(two, none).merge == pytest.approx(1.0)


def test_scikit_image_says_the_same_where_it_defines_the_same(rng):
    """It has no singletons and counts N (N - 1) pairs, and entropies in bits."""
    metrics = pytest.importorskip("skimage.metrics")
    label = rng.integers(0, 6, (20, 30))
    proposal = np.where(rng.random((20, 30)) < 0.8, label, rng.integers(0, 6, (20, 30)))
    alone = np.where(proposal == 0, 10 + np.arange(600).reshape(20, 30), proposal)
    both, merged, split = partition.pair_counts(label, proposal)
    n = np.count_nonzero(label)
    error, *parts = metrics.adapted_rand_error(label, alone, ignore_labels=(0,))
    # Version 0.26 calls precision what its documentation calls recall.
    expected = [(both - n) / (both + merged - n), (both - n) / (both + split - n)]
    assert sorted(parts) == pytest.approx(sorted(expected))
    assert error == pytest.approx(
        1 - (both - n) / (both - n + (merged + split) / 2), abs=1e-12
    )
    of_label, of_proposal, _ = information(label, proposal)
    splits, merges = metrics.variation_of_information(
        label, alone, ignore_labels=(0,)
    ) * math.log(2)
    shared = of_label - merges
    assert shared == pytest.approx(of_proposal - splits)
    scores = partition.information_scores(label, proposal)
    assert scores.split == pytest.approx(shared / of_proposal)
    assert scores.merge == pytest.approx(shared / of_label)


def three_slices():
    z, y, x = np.indices((3, 24, 30))
    label = ((x + z) % 9 > 1) & ((2 * y + x * z) % 13 > 2)
    wave = ((7 * x + 13 * y + 5 * x * y + 3 * z) % 11) / 10
    probability = 0.6 * np.roll(label, 1, axis=2) + 0.4 * wave
    return probability.astype(np.float32), label


def score(probability, label):
    rows = map(partition.isbi2012_counts, probability, label)
    return partition.isbi2012(np.stack(list(rows)))


def test_the_figures_of_fiji():
    """`RandError`, `VariationOfInformation` and `PixelError` of Fiji at 41c7083."""
    probability, label = three_slices()
    scores = score(probability, label)
    for key, fiji in {
        "v_rand": 0.7111418112170244,
        "v_info": 0.8459663156660112,
        "pixel_error": 0.24940805051302284,
        "rand_error": 0.3204585385523777,
    }.items():
        assert scores[key] == pytest.approx(fiji, abs=1e-12)
        assert scores[key + "_threshold"] == 0.5
    rows = np.stack(list(map(partition.isbi2012_counts, probability, label)))
    v_rand, v_info = rows[..., 0].mean(axis=0), rows[..., 3].mean(axis=0)
    # At 0, 0.3, 0.8 and the last one, which is just below 1.
    expected = [0.13347204, 0.39865718, 0.47465932, 0.34796305]
    assert v_rand[[0, 3, 8, 10]] == pytest.approx(expected, abs=1e-8)
    expected = [0, 0.53696426, 0.74459625, 0.70890366]
    assert v_info[[0, 3, 8, 10]] == pytest.approx(expected, abs=1e-8)


def test_a_row_is_what_its_parts_say(rng):
    probability, label = rng.random((2, 15, 17))
    label = label < 0.7
    rows = partition.isbi2012_counts(probability, label)
    truth = partition.components(label)
    for row, threshold in zip(rows, partition.THRESHOLDS, strict=True):
        inside = probability > threshold
        regions = partition.thinned(inside)
        split, merge, f = partition.rand_scores(truth, regions)
        assert row[:3].tolist() == [f, split, merge]
        split, merge, f = partition.information_scores(truth, regions)
        assert row[3:6].tolist() == [f, split, merge]
        pixels = [(label & inside).sum(), (inside & ~label).sum()]
        assert row[6:9].tolist() == [*pixels, (label & ~inside).sum()]
        pairs = partition.pair_counts(truth, partition.components(inside))
        assert row[9:].tolist() == list(pairs)
    assert rows.shape == (11, len(partition.COLUMNS)) and rows.dtype == np.float64


def test_the_thresholds_are_tenths_added_up():
    """So the last one is below 1, and a certain cell is one at all of them."""
    assert len(partition.THRESHOLDS) == 11
    assert partition.THRESHOLDS[3] == 0.1 + 0.1 + 0.1 > 0.3
    assert 1 - 1e-15 < partition.THRESHOLDS[-1] < 1
    label = cells("##.## ##.## .....  ##.##")
    scores = score(label[None].astype(np.float32), label[None])
    perfect = {"v_rand": 1, "v_info": 1, "pixel_error": 0, "rand_error": 0}
    for key, value in perfect.items():
        assert scores[key] == pytest.approx(value, abs=1e-12)
    rows = partition.isbi2012_counts(label.astype(np.float32), label)
    assert (rows == rows[0]).all()
    # 0.3 in float32 is above the threshold, the two in float32 would be equal.
    edge = np.full((2, 2), 0.3, np.float32)
    assert partition.isbi2012_counts(edge, np.ones((2, 2), bool))[3, 6] == 4
    # What is at the threshold itself is membrane.
    edge = np.full((2, 2), 0.5)
    rows = partition.isbi2012_counts(edge, np.ones((2, 2), bool))
    assert rows[4:6, 6].tolist() == [4, 0]


def test_the_mean_over_slices_comes_first_then_the_best_threshold():
    rows = np.zeros((2, 11, 12))
    rows[0, 2, :3], rows[1, 7, :3] = (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)
    rows[:, 5, :3] = (0.6, 0.5, 0.9)
    rows[:, 4, 3:6] = (0.25, 0.5, 0.1)
    # Of all slices together: 2 x 30 / (2 x 30 + 20 + 20), not the mean of 1 and 0.
    rows[..., 6:9] = (0, 1, 0)
    rows[0, 5, 6:9], rows[1, 5, 6:9] = (30, 0, 0), (0, 20, 20)
    rows[0, 6, 9:], rows[1, 6, 9:] = (9, 1, 1), (0, 0, 0)
    scores = partition.isbi2012(rows)
    assert scores["v_rand"] == pytest.approx(0.6)
    assert scores["v_rand_split"] == pytest.approx(0.5)
    assert scores["v_rand_merge"] == pytest.approx(0.9)
    assert scores["v_rand_threshold"] == 0.5
    assert scores["v_info"] == 0.25 and scores["v_info_threshold"] == 0.4
    assert scores["rand_error"] == pytest.approx(0.1)
    assert scores["rand_error_threshold"] == 0.6
    assert scores["pixel_error"] == pytest.approx(0.4)
    assert scores["pixel_error_threshold"] == 0.5


def test_a_slice_without_cells_scores_nothing():
    probability, label = three_slices()
    label[1] = False
    rows = partition.isbi2012_counts(probability[1], label[1])
    assert not rows[:, :6].any() and not rows[:, 9:].any()
    scores = score(probability, label)
    others = score(probability[::2], label[::2])
    assert scores["v_rand"] == pytest.approx(others["v_rand"] * 2 / 3)
    assert scores["rand_error"] == others["rand_error"]
    assert scores["pixel_error"] > others["pixel_error"]


def test_merging_costs_merge_and_splitting_costs_split():
    label = np.ones((21, 63), bool)
    label[:, 20:23] = label[:, 41:44] = False
    leak = label.copy()
    leak[10, 20:23] = True
    merged, perfect = score([leak * 1.0], [label]), score([label * 1.0], [label])
    assert merged["v_rand_split"] == 1 and merged["v_rand_merge"] < 0.7
    assert merged["v_info_split"] == pytest.approx(1) and merged["v_info_merge"] < 0.7
    wall = label.copy()
    wall[:, 10] = False
    split = score([wall * 1.0], [label])
    assert split["v_rand_merge"] == 1 and split["v_rand_split"] < 0.9
    # Width of a membrane is no error after thinning, and is one before it.
    wide = label.copy()
    wide[:, 18:25] = False
    thick = score([wide * 1.0], [label])
    assert thick["v_rand"] == perfect["v_rand"] == 1
    assert thick["pixel_error"] > 0 and thick["rand_error"] > 0


def isbi_labels(number):
    here = Path(__file__).parents[1]
    place = os.environ.get("UNET_JAX_DATA", here.parent / "shared" / "data")
    path = Path(place) / "isbi2012" / "train-labels.tif"
    if not path.is_file():
        pytest.skip(f"{path} is not there (set UNET_JAX_DATA)")
    tifffile = pytest.importorskip("tifffile")
    return tifffile.imread(path, key=range(number)) > 0


def test_the_challenges_own_labels():
    from scipy import ndimage

    label = isbi_labels(2)
    itself = score(label.astype(np.float32), label)
    for key, value in {"v_rand": 1, "v_info": 1, "pixel_error": 0}.items():
        assert itself[key] == pytest.approx(value, abs=1e-9)
    # Thicker membranes shut passages of a few pixels, and lose the smallest cells.
    thick = np.stack([ndimage.binary_erosion(x, iterations=2) for x in label])
    eroded = score(thick.astype(np.float32), label)
    assert 0.97 < eroded["v_rand"] < 1 and 0.97 < eroded["v_info"] < 1
    assert eroded["pixel_error"] > 0.05
    # Membranes two pixels thinner on both sides leak: cells merge.
    thin = np.stack([ndimage.binary_dilation(x, iterations=2) for x in label])
    leaking = score(thin.astype(np.float32), label)
    assert leaking["v_rand_split"] > 0.99 and leaking["v_rand_merge"] < 0.9
    assert leaking["v_rand"] < eroded["v_rand"]


SLICE = np.ones((4, 4), bool)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: partition.thinned(SLICE.astype(int)), "inside > 0"),
        (lambda: partition.thinned(SLICE[None]), "one by one"),
        (lambda: partition.components(SLICE * 1.0), "inside > 0"),
        (lambda: partition.rand_scores(SLICE * 1.0, SLICE * 1), "the label is float"),
        (lambda: partition.rand_scores(SLICE * 1, SLICE[:3] * 1), "one size"),
        (lambda: partition.isbi2012_counts(SLICE[:3] * 1.0, SLICE), "one size"),
        (lambda: partition.isbi2012_counts(SLICE[None], SLICE[None]), "one slice"),
        (lambda: partition.isbi2012_counts(SLICE * 1.0, SLICE * 255), "label > 0"),
        (lambda: partition.isbi2012_counts(SLICE * 2.0, SLICE), "outside 0 to 1"),
        (lambda: partition.isbi2012_counts(SLICE * np.nan, SLICE), "outside 0 to 1"),
        (lambda: partition.isbi2012(np.zeros((0, 11, 12))), "one slice or more"),
        (lambda: partition.isbi2012(np.zeros((11, 12))), "N x 11 x 12"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()
