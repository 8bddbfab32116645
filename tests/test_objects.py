"""Measures of objects against closed forms and loops over masks."""

import itertools

import numpy as np
import pytest

from unet_jax import objects
from unet_jax.types import InputError


def blocks(rng, size, number):
    """Boxes at random, the later on top: in parts, touching, with gaps in numbers."""
    image = np.zeros(size, np.int32)
    for name in rng.permutation(3 * number)[:number] + 1:
        begin = [rng.integers(0, n) for n in size]
        side = rng.integers(1, 6, len(size))
        image[tuple(slice(b, b + s) for b, s in zip(begin, side, strict=True))] = name
    return image


def shaken(rng, label):
    """A prediction much like the label: moved by a pixel, with holes and a stray."""
    moved = np.roll(label, rng.integers(-1, 2), axis=rng.integers(0, label.ndim))
    noise = rng.random(label.shape)
    return np.where(noise < 0.05, 0, np.where(noise > 0.97, 99, moved)).astype(np.int32)


def masks(image):
    return {name: image == name for name in np.unique(image).tolist() if name}


def brute_force(label, prediction, weight):
    """What `counts` says, by its definition: every mask with every other."""
    counted = weight > 0
    references = {r: m & counted for r, m in masks(label).items()}
    references = {r: m for r, m in references.items() if m.any()}
    predicted = masks(prediction)
    seg = 0.0
    found = {t: {} for t in objects.THRESHOLDS}
    for (r, truth), (p, mask) in itertools.product(
        references.items(), predicted.items()
    ):
        inside = mask & counted
        shared, union = (truth & inside).sum(), (truth | inside).sum()
        seg += shared / union if shared > 0.5 * truth.sum() else 0.0
        for t in objects.THRESHOLDS:
            if shared / union > t:
                assert r not in found[t] and p not in found[t].values()
                found[t][r] = p
    row = {"seg": seg, "references": len(references)}
    row["iou"] = sum(
        (references[r] & predicted[p]).sum()
        / (references[r] | (predicted[p] & counted)).sum()
        for r, p in found[0.5].items()
    )
    for t, pairs in found.items():
        lost = {p for p, m in predicted.items() if (m & ~counted).sum() > m.sum() / 2}
        row[f"tp@{t:g}"] = len(pairs)
        row[f"fp@{t:g}"] = len(set(predicted) - set(pairs.values()) - lost)
        row[f"fn@{t:g}"] = len(references) - len(pairs)
    return row


def sizes():
    return [(17, 23), (7, 8, 9)]


@pytest.mark.parametrize("size", sizes())
@pytest.mark.parametrize("weighted", [False, True])
def test_counts_against_every_mask_with_every_other(rng, size, weighted):
    for trial in range(12):
        label = blocks(rng, size, 1 + trial)
        prediction = shaken(rng, label) if trial % 3 else blocks(rng, size, trial)
        weight = np.ones(size, np.float32)
        if weighted:
            weight[blocks(rng, size, 3) > 0] = 0
            weight[: size[0] // 3] *= 0.5
        given = (weight,) if weighted else ()
        row = objects.counts(label, prediction, *given)
        expected = brute_force(label, prediction, weight)
        assert set(expected) == set(objects.COLUMNS)
        assert row == pytest.approx([expected[key] for key in objects.COLUMNS])
        total, number = objects.seg(label, prediction, *given)
        assert (total, number) == pytest.approx((expected["seg"], row[1]))
        for threshold in (0.5, 0.75):
            ids, iou = objects.matches(label, prediction, *given, threshold=threshold)
            assert len(ids) == expected[f"tp@{threshold:g}"]
            assert (iou > threshold).all()
            assert len(set(ids[:, 0])) == len(set(ids[:, 1])) == len(ids)


def test_overlaps_count_every_pixel_once(rng):
    label, prediction = rng.integers(0, 4, (2, 9, 11)) * 2**29
    table = objects.overlaps(label, prediction)
    for first, second, pixels in table:
        assert pixels == ((label == first) & (prediction == second)).sum()
    assert table[:, 2].sum() == label.size
    weight = np.zeros((9, 11))
    weight[2:5, 3:6] = 0.1
    part = objects.overlaps(label[2:5, 3:6], prediction[2:5, 3:6])
    assert np.array_equal(objects.overlaps(label, prediction, weight), part)


def pair(shared, only_label, only_prediction):
    """One object each, with so many pixels in both and in either alone."""
    label = np.repeat([1, 1, 0], [shared, only_label, only_prediction])
    prediction = np.repeat([1, 0, 1], [shared, only_label, only_prediction])
    return label[None], prediction[None]


def test_a_pair_of_a_known_overlap():
    scores = objects.summarise(objects.counts(*pair(8, 1, 1))[None])
    assert scores["pq"] == scores["sq"] == scores["seg"] == pytest.approx(0.8)
    assert scores["rq"] == scores["f1@0.5"] == scores["ap@0.75"] == 1
    # 0.8 is above the six thresholds from 0.5 to 0.75 and not above 0.8.
    assert scores["ap"] == scores["f1"] == pytest.approx(0.6)
    assert scores["ap@0.8"] == scores["f1@0.8"] == 0


def test_half_is_not_more_than_half():
    for threshold in objects.THRESHOLDS:
        k = round(threshold * 20)
        row = objects.counts(*pair(k, 20 - k, 0))
        key = objects.COLUMNS.index(f"tp@{threshold:g}")
        assert row[key] == 0
        assert objects.counts(*pair(k * 100 + 1, (20 - k) * 100 - 1, 0))[key] == 1
    # SEG: half of the reference object is not covered by more than half.
    assert objects.seg(*pair(5, 5, 0)) == (0.0, 1)
    assert objects.seg(*pair(6, 5, 0)) == (pytest.approx(6 / 11), 1)
    # More than half covered is enough, whatever else is: here an IoU of 0.3.
    assert objects.seg(*pair(6, 4, 10)) == (pytest.approx(0.3), 1)
    assert objects.summarise(objects.counts(*pair(6, 4, 10))[None])["pq"] == 0


def test_a_split_a_merger_and_a_miss():
    label = np.repeat([1, 2, 3, 0, 4], 10)[None]
    prediction = np.repeat([7, 7, 3, 5, 0], 10)[None]
    # 1 and 2 are merged, 3 is found, 5 is nothing, 4 is missed. Each half of 7 covers
    # a reference object: SEG 0.5 for both, though neither matches.
    row = dict(zip(objects.COLUMNS, objects.counts(label, prediction), strict=True))
    assert (row["tp@0.5"], row["fp@0.5"], row["fn@0.5"]) == (1, 2, 3)
    scores = objects.summarise(objects.counts(label, prediction)[None])
    assert scores["seg"] == pytest.approx((0.5 + 0.5 + 1 + 0) / 4)
    assert scores["pq"] == pytest.approx(1 / (1 + 5 / 2))
    assert scores["ap@0.5"] == pytest.approx(1 / 6)
    assert scores["ap"] == pytest.approx(1 / 6)
    assert scores["f1"] == pytest.approx(2 / 7)
    # Split in equal halves: neither is above a half, of IoU or of the object.
    label, halves = np.ones((1, 10), int), np.repeat([1, 2], 5)[None]
    scores = objects.summarise(objects.counts(label, halves)[None])
    assert scores["seg"] == scores["pq"] == scores["sq"] == scores["ap@0.5"] == 0


def test_pooled_scores_and_means_over_images():
    good = objects.counts(*pair(10, 0, 0))
    missed = objects.counts(np.repeat([1, 2, 3], 4)[None], np.zeros((1, 12), int))
    wrong = objects.counts(np.zeros((1, 9), int), np.ones((1, 9), int))
    nothing = objects.counts(np.zeros((1, 9), int), np.zeros((1, 9), int))
    scores = objects.summarise(np.stack([good, missed, wrong, nothing]))
    # TP 1, FP 1, FN 3; the image with nothing is in no mean.
    for key in ("pq", "rq", "f1@0.9", "ap", "image_pq"):
        assert scores[key] == pytest.approx(1 / 3)
    assert scores["sq"] == 1
    assert scores["seg"] == pytest.approx(1 / 4)
    alone = objects.summarise(nothing[None])
    assert all(np.isnan(value) for value in alone.values())
    only_wrong = objects.summarise(wrong[None])
    assert only_wrong["ap"] == only_wrong["pq"] == only_wrong["sq"] == 0
    assert np.isnan(only_wrong["seg"])
    assert set(objects.summarise(np.zeros((0, 33)))) == set(scores)


def test_what_lies_in_weight_zero():
    """An ignored strip: its objects are not there, nor their predictions' mistakes."""
    label = np.repeat([1, 0, 2], 10)[None]
    prediction = np.repeat([1, 0, 5], 10)[None]
    weight = np.repeat([1.0, 1.0, 0.0], 10)[None]
    scores = objects.summarise(objects.counts(label, prediction, weight)[None])
    assert scores["pq"] == scores["ap"] == scores["seg"] == 1
    # Six of ten pixels ignored: excused. Five: to blame. A match counts in any case.
    for ignored, false in ((6, 0), (5, 1)):
        weight = np.ones((1, 20))
        weight[0, :ignored] = 0
        prediction = np.repeat([3, 0], 10)[None]
        row = objects.counts(np.zeros((1, 20), int), prediction, weight)
        assert row[objects.COLUMNS.index("fp@0.5")] == false
        row = objects.counts(np.repeat([8, 0], 10)[None], prediction, weight)
        assert row[objects.COLUMNS.index("tp@0.95")] == 1
        assert row[objects.COLUMNS.index("fp@0.5")] == 0


@pytest.mark.parametrize("size", sizes())
def test_numbers_are_only_names(rng, size):
    label = blocks(rng, size, 9)
    prediction = shaken(rng, label)
    row = objects.counts(label, prediction)
    for _ in range(5):
        names = np.concatenate([[0], rng.permutation(10**6)[:99] + 1])
        again = objects.counts(names[label], names[prediction])
        assert row == pytest.approx(again)
    mirrored = objects.counts(label[::-1], prediction[::-1])
    assert row == pytest.approx(mirrored)


@pytest.mark.parametrize("size", sizes())
def test_scores_are_within_their_bounds_and_perfect_is_one(rng, size):
    rows = []
    for trial in range(8):
        label = blocks(rng, size, 1 + trial)
        perfect = objects.summarise(objects.counts(label, label)[None])
        assert set(perfect.values()) == {1.0}
        total, number = objects.seg(label, shaken(rng, label))
        assert 0 <= total <= number == len(masks(label))
        rows.append(objects.counts(label, shaken(rng, label)))
    scores = objects.summarise(np.stack(rows))
    assert all(0 <= value <= 1 for value in scores.values())
    assert scores["pq"] == pytest.approx(scores["sq"] * scores["rq"])
    ap = [scores[f"ap@{t:g}"] for t in objects.THRESHOLDS]
    assert ap == sorted(ap, reverse=True) and scores["ap"] == pytest.approx(np.mean(ap))
    # Of two rows the first counts twice if it is there twice, as in a bootstrap.
    twice = objects.summarise(np.stack([rows[0], rows[0], rows[1]]))
    total = 2 * rows[0] + rows[1]
    assert twice["seg"] == pytest.approx(total[0] / total[1])


def test_seg_is_not_symmetric_and_matches_are():
    label, prediction = np.repeat([1, 1, 0], 4)[None], np.repeat([1, 2, 2], 4)[None]
    assert objects.seg(label, prediction)[0] == 0
    assert objects.seg(prediction, label)[0] == pytest.approx(4 / 8)
    label, prediction = pair(8, 1, 2)
    (there, iou), (back, other) = (
        objects.matches(label, prediction),
        objects.matches(prediction, label),
    )
    assert np.array_equal(there, back[:, ::-1]) and np.array_equal(iou, other)


IMAGE = np.ones((4, 4), int)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: objects.counts(IMAGE * 1.0, IMAGE), "the label is float64"),
        (lambda: objects.counts(IMAGE, IMAGE > 0), "the prediction is bool"),
        (lambda: objects.counts(IMAGE, -IMAGE), "below 0"),
        (lambda: objects.counts(IMAGE, IMAGE * 2**31), "above"),
        (lambda: objects.counts(IMAGE, IMAGE[:3]), "4 x 4, 3 x 4: bring"),
        (lambda: objects.seg(IMAGE, IMAGE, IMAGE[:3]), "one size"),
        (lambda: objects.matches(IMAGE, IMAGE, threshold=0.4), "two others"),
        (lambda: objects.matches(IMAGE, IMAGE, threshold=1.0), "below 1"),
        (lambda: objects.summarise(np.zeros(33)), "N x 33"),
        (lambda: objects.summarise(np.zeros((2, 32))), "2 x 32"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()
