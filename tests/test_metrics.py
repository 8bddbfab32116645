"""Counts against a loop over pixels; scores against their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_jax import metrics
from unet_jax.types import InputError

NAMES = ("background", "cell", "wall")
TASKS = ["classes", "labels"]


def data(rng, size=(5, 6), task="classes", batch=3, classes=3):
    """Coarse logits, so that there are ties, with garbage labels under weight 0."""
    logits = rng.integers(-2, 3, (batch, *size, classes)).astype(np.float32)
    shape = logits.shape[:-1] if task == "classes" else logits.shape
    label = rng.integers(0, classes if task == "classes" else 2, shape)
    weight = rng.choice([0.0, 0.5, 1.0, 7.0], shape).astype(np.float32)
    label = np.where(weight > 0, label, rng.choice([255, -1, 1], shape))
    return logits, label.astype(np.int32), weight


def brute_force(logits, label, weight, task, threshold):
    """One pixel at a time, in Python."""
    batch, classes = logits.shape[0], logits.shape[-1]
    inner = (classes, classes) if task == "classes" else (classes, 2, 2)
    table = np.zeros((batch, *inner), np.int64)
    for place in np.ndindex(*label.shape):
        if weight[place] <= 0:
            continue
        if task == "classes":
            best = max(range(classes), key=lambda k: (logits[place][k], -k))
            table[place[0], label[place], best] += 1
        else:
            said = 1 / (1 + math.exp(-logits[place])) > threshold
            table[place[0], place[-1], label[place], int(said)] += 1
    return table


def confusion(*arrays, **options):
    return np.asarray(metrics.confusion(*map(jnp.asarray, arrays), **options))


@pytest.mark.parametrize("size", [(5, 6), (2, 3, 4)])
@pytest.mark.parametrize("threshold", [0.5, 0.8])
@pytest.mark.parametrize("task", TASKS)
def test_confusion_equals_a_loop_over_pixels(rng, size, threshold, task):
    arrays = data(rng, size, task)
    options = {"task": task, "threshold": threshold}
    expected = brute_force(*arrays, **options)
    actual = confusion(*arrays, **options)
    assert actual.dtype == np.int32
    np.testing.assert_array_equal(actual, expected)
    jitted = jax.jit(lambda *x: metrics.confusion(*x, **options))
    np.testing.assert_array_equal(jitted(*map(jnp.asarray, arrays)), expected)


@pytest.mark.parametrize("task", TASKS)
def test_small_label_types_and_bfloat16_logits(rng, task):
    logits, label, weight = data(rng, task=task)
    label = np.where(label < 0, 255, label)
    low = jnp.asarray(logits).astype(jnp.bfloat16)
    table = metrics.confusion(
        low, jnp.asarray(label.astype(np.uint8)), jnp.asarray(weight), task=task
    )
    np.testing.assert_array_equal(table, confusion(logits, label, weight, task=task))


@pytest.mark.parametrize("task", TASKS)
def test_counts_are_exact_above_two_to_the_24(task):
    """17 million pixels plus one of another kind: float32 would lose the one."""
    size = (1, 16, 2**10, 2**10 + 8)
    pixels = int(np.prod(size))
    assert pixels > 2**24
    last = jnp.zeros((), jnp.float32)
    label = jnp.zeros(size, jnp.uint8).at[0, -1, -1, -1].set(1)
    if task == "classes":
        logits = jnp.broadcast_to(jnp.stack([last + 1, last]), (*size, 2))
        table = confusion(logits, label, jnp.ones(size), task=task)[0]
    else:
        logits = jnp.broadcast_to(last - 1, (*size, 1))
        label = label[..., None]
        table = confusion(logits, label, jnp.ones((*size, 1)), task=task)[0, 0]
    np.testing.assert_array_equal(table, [[pixels - 1, 0], [1, 0]])


def test_argmax_ties_go_to_the_lowest_class_and_the_threshold_is_strict():
    assert metrics.decide(jnp.zeros((4, 3)), task="classes").tolist() == [0] * 4
    assert metrics.decide(jnp.zeros((2, 1)), task="labels").tolist() == [[0], [0]]
    said = metrics.decide(jnp.asarray([0.1]), task="labels", threshold=0.6)
    assert said.tolist() == [0]
    assert said.dtype == jnp.int32


def test_scores_of_a_table_worked_by_hand():
    """truth 0: 50 right, 10 called 1; truth 1: 5 called 0, 30 right; 2: 5 right."""
    table = np.asarray([[[50, 10, 0], [5, 30, 0], [0, 0, 5]]])
    scores = metrics.summarise(table, task="classes", label_names=NAMES)
    expected = {
        "dice/background": 100 / 115,
        "dice/cell": 60 / 75,
        "dice/wall": 1.0,
        "iou/background": 50 / 65,
        "iou/cell": 30 / 45,
        "precision/background": 50 / 55,
        "precision/cell": 30 / 40,
        "recall/cell": 30 / 35,
        "dice": (60 / 75 + 1) / 2,
        "iou": (30 / 45 + 1) / 2,
        "pixel_accuracy": 85 / 100,
        "image_dice/cell": 60 / 75,
        "image_iou/cell": 30 / 45,
        "image_dice": (60 / 75 + 1) / 2,
        "image_iou": (30 / 45 + 1) / 2,
    }
    for key, value in expected.items():
        assert scores[key] == pytest.approx(value, abs=1e-15), key
    assert all(type(value) is float for value in scores.values())


def test_scores_of_one_sigmoid_label_worked_by_hand():
    """[[TN, FP], [FN, TP]] of two images."""
    tables = np.asarray([[[[80, 10], [2, 8]]], [[[90, 0], [0, 10]]]])
    scores = metrics.summarise(tables, task="labels", label_names=("cell",))
    assert scores["dice/cell"] == pytest.approx(36 / 48)
    assert scores["dice"] == scores["dice/cell"]
    assert scores["precision/cell"] == pytest.approx(18 / 28)
    assert scores["recall/cell"] == pytest.approx(18 / 20)
    assert scores["pixel_accuracy"] == pytest.approx(188 / 200)
    assert scores["image_dice/cell"] == pytest.approx((16 / 28 + 1) / 2)
    listed = metrics.per_image(tables, task="labels", label_names=("cell",))
    np.testing.assert_allclose(listed, [[16 / 28], [1.0]])


@pytest.mark.parametrize("task", TASKS)
def test_scores_equal_their_definition_on_masks(rng, task):
    """Dice from the sets of pixels themselves, pooled and for each image."""
    logits, label, weight = data(rng, task=task)
    names = NAMES if task == "classes" else ("a", "b", "c")
    table = confusion(logits, label, weight, task=task)
    scores = metrics.summarise(table, task=task, label_names=names)
    said = np.asarray(metrics.decide(jnp.asarray(logits), task=task))
    for k, name in enumerate(names):
        if task == "classes":
            true, found, counted = label == k, said == k, weight > 0
        else:
            true, found = label[..., k] == 1, said[..., k] == 1
            counted = weight[..., k] > 0
        true, found = true & counted, found & counted
        dice = 2 * (true & found).sum() / (true.sum() + found.sum())
        assert scores[f"dice/{name}"] == pytest.approx(dice)
        iou = (true & found).sum() / (true | found).sum()
        assert scores[f"iou/{name}"] == pytest.approx(iou)
        each = [
            2 * (t & f).sum() / (t.sum() + f.sum())
            for t, f in zip(true, found, strict=True)
        ]
        assert scores[f"image_dice/{name}"] == pytest.approx(np.mean(each))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.integers(0, 6))
def test_adding_up_parts_is_the_whole(seed, cut):
    """Batches in any split, summed or stacked, give the same pooled scores."""
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 5, (6, 3, 3))
    whole = metrics.summarise(table, task="classes", label_names=NAMES)
    parts = table[:cut].sum(0) + table[cut:].sum(0)
    merged = metrics.summarise(parts[None], task="classes", label_names=NAMES)
    again = metrics.summarise(table[::-1], task="classes", label_names=NAMES)
    for key, value in whole.items():
        assert again[key] == pytest.approx(value, nan_ok=True)
        if not key.startswith("image_"):
            assert merged[key] == value or math.isnan(value)
        assert math.isnan(value) or 0 <= value <= 1
    for name in NAMES:
        dice, iou = whole[f"dice/{name}"], whole[f"iou/{name}"]
        assert dice == pytest.approx(2 * iou / (1 + iou), nan_ok=True)


@pytest.mark.parametrize(("empty", "worth"), [("skip", None), ("one", 1), ("zero", 0)])
def test_empty_against_empty_is_what_the_policy_says(empty, worth):
    """Image 0 has cells and half are found; image 1 has none and none are said."""
    table = np.asarray([[[4, 0, 0], [2, 2, 0], [0] * 3], [[8, 0, 0], [0] * 3, [0] * 3]])
    options = {"task": "classes", "label_names": NAMES, "empty": empty}
    scores = metrics.summarise(table, **options)
    half = 4 / 6
    assert scores["dice/cell"] == pytest.approx(half)
    if worth is None:
        assert math.isnan(scores["dice/wall"])
        assert math.isnan(scores["precision/wall"])
        assert math.isnan(scores["image_dice/wall"])
        assert scores["dice"] == pytest.approx(half)
        assert scores["image_dice/cell"] == pytest.approx(half)
        assert scores["image_dice"] == pytest.approx(half)
    else:
        assert scores["dice/wall"] == scores["recall/wall"] == worth
        assert scores["image_dice/wall"] == worth
        assert scores["dice"] == pytest.approx((half + worth) / 2)
        assert scores["image_dice/cell"] == pytest.approx((half + worth) / 2)
    listed = metrics.per_image(table, **options)
    np.testing.assert_equal(listed[1, 1], np.nan if worth is None else worth)


@pytest.mark.parametrize("empty", ["skip", "one", "zero"])
@pytest.mark.parametrize("task", TASKS)
def test_rows_and_labels_without_any_pixel_never_count(rng, empty, task):
    names = NAMES if task == "classes" else ("a", "b", "c")
    table = rng.integers(1, 9, (4, 3, 3) if task == "classes" else (4, 3, 2, 2))
    longer = np.concatenate([table, np.zeros_like(table[:2])])
    options = {"task": task, "label_names": names, "empty": empty}
    assert metrics.summarise(longer, **options) == metrics.summarise(table, **options)
    assert np.isnan(metrics.per_image(longer, **options)[4:]).all()
    if task == "labels":
        table[1, 2] = 0  # label c is not annotated in image 1
        kept = metrics.per_image(table, **options)
        assert np.isnan(kept[1, 2])
        mean = metrics.summarise(table, **options)["image_dice/c"]
        assert mean == pytest.approx(np.delete(kept[:, 2], 1).mean())


def test_nothing_at_all_is_nan_without_a_warning():
    table = np.zeros((0, 3, 3), np.int32)
    scores = metrics.summarise(table, task="classes", label_names=NAMES)
    assert all(math.isnan(value) for value in scores.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label_names": ("a", "b")}, r"expected \[N, 2, 2\]"),
        ({"label_names": ("a", "b", "a")}, "repeat"),
        ({"empty": "half"}, "skip, one or zero"),
    ],
)
def test_summarise_refuses_what_does_not_fit(change, words):
    options = {"task": "classes", "label_names": NAMES, **change}
    with pytest.raises(InputError, match=words):
        metrics.summarise(np.ones((2, 3, 3), int), **options)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), task=st.sampled_from(["classes", "labels"]))
def test_invariants_of_the_scores(seed, task):
    """Bounds, Dice and IoU of each other, and what no score depends on."""
    rng = np.random.default_rng(seed)
    names = ("background", "a", "b")
    shape = (5, 3, 3) if task == "classes" else (5, 3, 2, 2)
    table = rng.integers(0, 4, shape) * rng.integers(0, 2, shape)
    found = metrics.summarise(table, task=task, label_names=names)
    for key, value in found.items():
        assert np.isnan(value) or 0 <= value <= 1, key
    for name in names:
        dice, iou = found[f"dice/{name}"], found[f"iou/{name}"]
        np.testing.assert_allclose(dice, 2 * iou / (1 + iou), rtol=1e-12)
        assert np.isnan(dice) or iou <= dice
    # The order of the images is nothing, and neither are images without a pixel.
    order = rng.permutation(5)
    padded = np.concatenate([table[order], np.zeros((2, *shape[1:]), int)])
    other = metrics.summarise(padded, task=task, label_names=names)
    for key, value in found.items():
        np.testing.assert_allclose(other[key], value, rtol=1e-12)
    # Truth and prediction exchanged, precision becomes recall and Dice stays.
    swapped = np.swapaxes(table, -1, -2)
    other = metrics.summarise(swapped, task=task, label_names=names)
    for name in names:
        for one, two in (("dice", "dice"), ("iou", "iou"), ("precision", "recall")):
            np.testing.assert_allclose(
                other[f"{two}/{name}"], found[f"{one}/{name}"], rtol=1e-12
            )
