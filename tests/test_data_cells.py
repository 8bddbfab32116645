"""The built-in data: reproducible, touching, and not to be had by a threshold."""

import numpy as np
import pytest
from scipy import ndimage

from unet_jax.data import cells
from unet_jax.types import InputError


def _dice(found, truth):
    return 2 * (found & truth).sum() / (found.sum() + truth.sum())


def _best_threshold_dice(image, label):
    """The Dice of the best threshold there is, either side of it being the cells."""
    on = np.bincount(image[label > 0], minlength=256)
    off = np.bincount(image[label == 0], minlength=256)
    best = 0.0
    for hit, miss in ((on, off), (on[::-1], off[::-1])):
        hits, misses = np.cumsum(hit), np.cumsum(miss)
        best = max(best, float((2 * hits / (hits + misses + on.sum())).max()))
    return best


@pytest.mark.parametrize(
    ("options", "size", "count"),
    [
        ({"split": "train"}, (128, 128), 200),
        ({"split": "val"}, (128, 128), 32),
        ({"split": "val", "rank": 3}, (32, 64, 64), 32),
        ({"split": "x[25%:]", "size": (70, 41), "examples": 4}, (70, 41), 3),
        ({"split": "x[not fold 2/5]", "size": (30, 41), "examples": 5}, (30, 41), 4),
    ],
)
def test_examples(options, size, count):
    source = cells.open(**options)
    assert len(source) == count
    assert source.label_names == ("background", "cell")
    example = source[count - 1]
    assert source.size(count - 1) == size
    assert example["image"].shape == (*size, 1)
    assert example["image"].dtype == np.uint8
    assert example["label"].shape == size
    assert example["label"].dtype == np.uint8
    assert set(np.unique(example["label"])) == {0, 1}
    instances = source.instances(count - 1)
    assert instances.dtype == np.int32
    np.testing.assert_array_equal(instances > 0, example["label"] > 0)
    np.testing.assert_array_equal(np.unique(instances), np.arange(instances.max() + 1))


def test_a_picture_depends_on_seed_split_and_number_alone():
    whole, part = cells.open(split="train"), cells.open(split="train[10:]")
    image = whole[12]["image"]
    np.testing.assert_array_equal(image, whole[12]["image"])
    np.testing.assert_array_equal(image, part[2]["image"])
    assert whole.name(12) == part.name(2) == "cells-train-0012"
    for other in (
        whole[11],
        cells.open(split="train", seed=1)[12],
        cells.open(split="val")[12],
    ):
        assert not np.array_equal(image, other["image"])


@pytest.mark.parametrize(("rank", "count"), [(2, 16), (3, 3)])
def test_no_threshold_finds_the_cells(rank, count):
    source = cells.open(split="val", rank=rank, examples=count)
    images = np.stack([source[i]["image"][..., 0] for i in range(count)])
    labels = np.stack([source[i]["label"] for i in range(count)])
    # One threshold for all, and each picture's own, both chosen knowing the truth.
    assert _best_threshold_dice(images, labels) < 0.8
    assert max(map(_best_threshold_dice, images, labels)) < 0.8
    smooth = [ndimage.uniform_filter(image, 7) for image in images]
    assert np.mean(list(map(_best_threshold_dice, smooth, labels))) < 0.8
    # Nor is "everything" an answer.
    assert 0.15 < labels.mean() < 0.6


def test_outlines_and_texture_tell_the_cells():
    # What a net has to find: light that changes within a few pixels and what it
    # encloses. Without training, an edge measure alone is well above every threshold.
    source = cells.open(split="val", examples=8, noise=0.0)
    scores = []
    for i in range(8):
        image = source[i]["image"][..., 0].astype(np.float32)
        edges = np.abs(image - ndimage.median_filter(image, 7)) / (image + 20)
        edges = ndimage.gaussian_filter(edges, 1)
        found = ndimage.binary_fill_holes(ndimage.binary_closing(edges > 0.05))
        scores.append(_dice(found, source[i]["label"] > 0))
    assert np.mean(scores) > 0.8


def test_cells_touch_and_have_sensible_sizes():
    source = cells.open(split="val", examples=8)
    touching = 0
    for i in range(8):
        instances = source.instances(i)
        left, right = instances[:, :-1], instances[:, 1:]
        touching += ((left != right) & (left > 0) & (right > 0)).any()
        sizes = np.bincount(instances.ravel())[1:]
        assert 5 <= len(sizes) <= 60
        assert sizes.max() < np.pi * 20**2
        pieces = sum(
            ndimage.label(instances == k)[1] for k in range(1, instances.max() + 1)
        )
        assert pieces <= 1.15 * len(sizes)
    assert touching == 8


def test_gap_parts_the_cells():
    options = {"split": "val", "examples": 2}
    plain, gapped = cells.open(**options), cells.open(**options, gap=True)
    instances = gapped.instances(0)
    np.testing.assert_array_equal(plain[0]["image"], gapped[0]["image"])
    np.testing.assert_array_equal(instances > 0, gapped[0]["label"] > 0)
    pieces, count = ndimage.label(instances)
    for piece in range(1, count + 1):
        assert len(np.unique(instances[pieces == piece])) == 1
    kept = instances > 0
    np.testing.assert_array_equal(instances[kept], plain.instances(0)[kept])
    assert 0 < (plain[0]["label"] > gapped[0]["label"]).sum() < 0.1 * kept.sum()


def test_options_change_the_picture():
    options = {"split": "val", "examples": 4}
    plain = cells.open(**options)
    few = cells.open(**options, crowding=0.3)
    assert few[0]["label"].mean() < plain[0]["label"].mean()
    none = cells.open(**options, crowding=0.0)
    assert none[0]["label"].max() == 0
    assert none.instances(0).max() == 0
    large = cells.open(**options, radius=(20, 30))
    assert large.instances(0).max() < plain.instances(0).max()
    clean = cells.open(**options, noise=0.0)
    rough = [
        np.abs(np.diff(s[0]["image"].astype(int), axis=0)).mean()
        for s in (clean, plain)
    ]
    assert rough[0] < rough[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, "choose 2 or 3"),
        ({"size": (128,)}, "give 2 numbers"),
        ({"size": (8, 128)}, "16 pixels or more"),
        ({"radius": (9,)}, "smallest and the largest"),
        ({"radius": (9, 5)}, "smallest and the largest"),
        ({"noise": -1.0}, "0 or more"),
        ({"examples": -1}, "0 or more"),
        ({"split": "val["}, "cannot be read"),
        ({"split": "val[40:]"}, "outside the 32 examples"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        cells.open(**{"split": "val", **options})
