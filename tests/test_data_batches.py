"""Batches: what a step gets, whoever reads it, with however many threads."""

import itertools
import subprocess
import sys

import jax
import numpy as np
import pytest

from unet_jax import data
from unet_jax.data import batches
from unet_jax.data.batches import eval_batches, train_batches
from unet_jax.data.plan import plan
from unet_jax.data.source import Cached, Checked, Labelled, Resized, Standardised
from unet_jax.types import InputError


class Numbered:
    """Example i has the value ``base + position``, so a pixel tells where it is from.

    The label repeats it modulo 5, the weight is 1 and in one corner 0.5.
    """

    label_names = ("background", "a", "b", "c", "d")

    def __init__(self, *sizes, channels=1, title="image"):
        self.sizes, self.channels, self.reads = sizes, channels, 0
        self.title = title

    def __len__(self):
        return len(self.sizes)

    def name(self, i):
        return f"{self.title}-{i}.png"

    def size(self, i):
        return self.sizes[i]

    def __getitem__(self, i):
        self.reads += 1
        count = int(np.prod(self.sizes[i]))
        values = (1000 * i + np.arange(count)).reshape(self.sizes[i])
        weight = np.ones(self.sizes[i], np.float32)
        weight.flat[0] = 0.5
        return {
            "image": np.repeat(values[..., None], self.channels, -1).astype(np.uint16),
            "label": (values % 5).astype(np.uint8),
            "weight": weight,
        }


def _take(batches, count):
    return list(itertools.islice(batches, count))


def _assert_same(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys() == {"image", "label", "weight", "index"}
        for key in one:
            assert one[key].dtype == other[key].dtype
            np.testing.assert_array_equal(one[key], other[key])


OPTIONS = {"seed": 3, "batch_size": 4, "crop": (6, 5)}
SIZES = ((9, 8), (6, 5), (7, 12), (20, 6), (6, 6))


def test_a_training_batch():
    source = Numbered(*SIZES, channels=3)
    (batch,) = _take(train_batches(source, **OPTIONS), 1)
    assert {key: (v.shape, v.dtype.str) for key, v in batch.items()} == {
        "image": ((4, 6, 5, 3), "<u2"),
        "label": ((4, 6, 5), "|u1"),
        "weight": ((4, 6, 5), "<f4"),
        "index": ((4,), "<i4"),
    }
    index, offset = plan(3, 0, examples=5, batch_size=4, rank=2)
    np.testing.assert_array_equal(batch["index"], index)
    for row, (i, at) in enumerate(zip(index, offset, strict=True)):
        begin = np.floor(at * (np.array(SIZES[i]) - (6, 5) + 1)).astype(int)
        window = tuple(slice(b, b + c) for b, c in zip(begin, (6, 5), strict=True))
        for key in ("image", "label", "weight"):
            np.testing.assert_array_equal(batch[key][row], source[i][key][window])


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
def test_threads_change_nothing(threads):
    source = Numbered(*SIZES)
    expected = _take(train_batches(source, **OPTIONS, threads=0), 12)
    got = _take(train_batches(source, **OPTIONS, threads=threads), 12)
    _assert_same(got, expected)


@pytest.mark.parametrize("start", [1, 7, 1_000_000])
def test_resuming_equals_going_on(start):
    source = Numbered(*SIZES)
    if start == 1_000_000:
        index, _ = plan(3, start, examples=5, batch_size=4, rank=2)
        (batch,) = _take(train_batches(source, **OPTIONS, start=start), 1)
        np.testing.assert_array_equal(batch["index"], index)
    else:
        whole = _take(train_batches(source, **OPTIONS), 10)
        tail = _take(train_batches(source, **OPTIONS, start=start), 10 - start)
        _assert_same(tail, whole[start:])


def test_rows_of_the_processes_make_the_whole():
    source = Numbered(*SIZES)
    whole = _take(train_batches(source, **OPTIONS, margin=2), 6)
    parts = [
        _take(train_batches(source, **OPTIONS, margin=2, rows=rows), 6)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    joined = [
        {key: np.concatenate([p[key] for p in pair]) for key in pair[0]}
        for pair in zip(*parts, strict=True)
    ]
    _assert_same(joined, whole)


@pytest.mark.parametrize("margin", [2, (3, 0), 11])
def test_margin_and_small_images_are_mirrored_with_weight_0(margin):
    # 4 x 30 is lower than the crop, 9 x 1 a line; mirroring 11 runs back and forth.
    source = Numbered((4, 30), (9, 1), (12, 9))
    margins = (margin, margin) if isinstance(margin, int) else margin
    batches = train_batches(
        source, seed=1, batch_size=3, crop=(8, 7), margin=margin, threads=0
    )
    seen_mirror = False
    for step, batch in enumerate(_take(batches, 20)):
        index, offset = plan(1, step, examples=3, batch_size=3, rank=2)
        for row, (i, at) in enumerate(zip(index, offset, strict=True)):
            example, window, pads = source[i], [], []
            for n, c, m, o in zip(source.size(i), (8, 7), margins, at, strict=True):
                short = max(c - n - 2 * m, 0)
                pads.append((m + short // 2, m + short - short // 2))
                begin = int(np.floor(o * (n + sum(pads[-1]) - c + 1)))
                window.append(slice(begin, begin + c))
            expected = {
                "image": np.pad(example["image"], [*pads, (0, 0)], mode="reflect"),
                "label": np.pad(example["label"], pads, mode="reflect"),
                "weight": np.pad(example["weight"], pads),
            }
            for key, value in expected.items():
                np.testing.assert_array_equal(batch[key][row], value[tuple(window)])
            seen_mirror |= bool((batch["weight"][row] == 0).any())
    assert seen_mirror


def test_every_place_of_a_crop_is_met():
    source = Numbered((4, 3))
    begins = set()
    for batch in _take(
        train_batches(source, seed=0, batch_size=8, crop=(2, 3), threads=0), 20
    ):
        begins |= set(batch["image"][:, 0, 0, 0].tolist())
    assert begins == {0, 3, 6}


def test_volumes():
    source = Numbered((5, 6, 7), (4, 9, 4))
    options = {"seed": 0, "batch_size": 2, "crop": (4, 4, 4), "margin": 1}
    (batch,) = _take(train_batches(source, **options), 1)
    assert batch["image"].shape == (2, 4, 4, 4, 1)
    (batch,) = eval_batches(Numbered((4, 6, 7)), batch_size=2, pads=_to_multiple(4))
    assert batch["image"].shape == (2, 4, 8, 8, 1)


@pytest.mark.parametrize(
    ("crop", "margin", "message"),
    [
        ((21, 5), 0, r"21 x 5 is larger than every training image \(at most 20 x 12"),
        ((6, 13), 0, "choose a smaller crop"),
        ((25, 6), (2, 0), "mirrored margin of 2 x 0"),
        ((4, 4, 4), 0, "has 3 axes, but image-0.png has 2"),
    ],
)
def test_impossible_crop(crop, margin, message):
    with pytest.raises(InputError, match=message):
        train_batches(Numbered(*SIZES), seed=0, batch_size=1, crop=crop, margin=margin)


def test_no_examples():
    with pytest.raises(InputError, match="no examples"):
        train_batches(Numbered(), seed=0, batch_size=1, crop=(2, 2))
    assert list(eval_batches(Numbered(), batch_size=2, pads=_to_multiple(4))) == []


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_errors_of_reading_come_out_as_they_are(threads):
    class Broken(Numbered):
        def __getitem__(self, i):
            if i == 2:
                raise InputError("image-2.png is truncated: save it again.")
            return super().__getitem__(i)

    batches = train_batches(Broken(*SIZES), **OPTIONS, threads=threads)
    with pytest.raises(InputError, match=r"^image-2.png is truncated"):
        _take(batches, 3)
    batches = eval_batches(
        Broken(*SIZES), batch_size=2, pads=_to_multiple(4), threads=threads
    )
    with pytest.raises(InputError, match=r"^image-2.png is truncated"):
        list(batches)


def _to_multiple(k):
    def pads(size):
        return tuple(((-n % k) // 2, -n % k - (-n % k) // 2) for n in size)

    return pads


@pytest.mark.parametrize("threads", [0, 2])
def test_evaluation_covers_each_example_once(threads):
    sizes = ((8, 8), (5, 9), (7, 8), (12, 12), (8, 6), (6, 12), (3, 5))
    source = Numbered(*sizes)
    pads = _to_multiple(4)
    batches = list(eval_batches(source, batch_size=2, pads=pads, threads=threads))
    # 8 x 8 holds 0, 2, 4; 8 x 12 holds 1, 5; then 12 x 12 and 4 x 8.
    assert [b["index"].tolist() for b in batches] == [
        [0, 2],
        [4, -1],
        [1, 5],
        [3, -1],
        [6, -1],
    ]
    for batch in batches:
        assert batch["index"].dtype == np.int32
        assert batch["weight"].dtype == np.float32
        for row, i in enumerate(batch["index"]):
            if i < 0:
                assert not batch["weight"][row].any()
                assert not batch["image"][row].any()
                continue
            example, pad = source[i], pads(sizes[i])
            expected = {
                "image": np.pad(example["image"], [*pad, (0, 0)], mode="reflect"),
                "label": np.pad(example["label"], pad, mode="reflect"),
                "weight": np.pad(example["weight"], pad),
            }
            for key, value in expected.items():
                np.testing.assert_array_equal(batch[key][row], value)


def test_evaluation_rows_make_the_whole():
    source = Numbered((8, 8), (8, 8), (4, 4))
    options = {"batch_size": 4, "pads": _to_multiple(4)}
    whole = list(eval_batches(source, **options))
    parts = [
        list(eval_batches(source, **options, rows=rows))
        for rows in (slice(0, 2), slice(2, 4))
    ]
    joined = [
        {key: np.concatenate([p[key] for p in pair]) for key in pair[0]}
        for pair in zip(*parts, strict=True)
    ]
    _assert_same(joined, whole)


def test_labelled():
    class Plain(Numbered):
        def __getitem__(self, i):
            example = super().__getitem__(i)
            del example["weight"]
            return example

    ids = Plain((3, 4))[0]["label"]
    classes = Labelled(Plain((3, 4)), task="classes")
    assert classes.label_names == Numbered.label_names
    np.testing.assert_array_equal(classes[0]["label"], ids)
    np.testing.assert_array_equal(classes[0]["weight"], np.ones((3, 4), np.float32))

    labels = Labelled(Numbered((3, 4)), task="labels")
    assert labels.label_names == ("a", "b", "c", "d")
    example = labels[0]
    assert example["label"].dtype == np.uint8
    np.testing.assert_array_equal(example["label"], np.eye(5)[ids][..., 1:])
    assert example["weight"].shape == (3, 4, 4)
    assert example["weight"].dtype == np.float32
    np.testing.assert_array_equal(example["weight"][0, 0], np.full(4, 0.5))
    (batch,) = _take(
        train_batches(labels, seed=0, batch_size=2, crop=(4, 4), margin=1), 1
    )
    assert batch["label"].shape == batch["weight"].shape == (2, 4, 4, 4)
    assert (batch["weight"] == 0).any()

    Plain.label_names = ("background",)
    with pytest.raises(InputError, match="name a second one"):
        Labelled(Plain((3, 4)), task="labels")


def test_cached_keeps_what_fits():
    source = Numbered((64, 64), (64, 64), (64, 64))
    size = 64 * 64 * (2 + 1 + 4)
    cached = Cached(source, 2.5 * size / 2**20)
    for _ in range(4):
        for i in range(3):
            np.testing.assert_array_equal(cached[i]["image"][0, 0], 1000 * i)
    assert source.reads == 1 + 1 + 4
    with pytest.raises(ValueError, match="read-only"):
        cached[0]["image"][0] = 0


def test_standardised():
    example = Standardised(Numbered((6, 6)))[0]
    assert example["image"].dtype == np.float32
    assert abs(example["image"].mean()) < 1e-6
    assert abs(example["image"].std() - 1) < 1e-6


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((20, 31), (7, 13)),
        ((9, 8), (20, 8)),
        ((30, 10), (10, 30)),
        ((6, 9, 8), (3, 5, 12)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_resized(size, shape, dtype, rng):
    most = 1 if dtype == np.float32 else np.iinfo(dtype).max
    image = (most * rng.random((*size, 2))).astype(dtype)

    class Noise(Numbered):
        def __getitem__(self, i):
            return {**super().__getitem__(i), "image": image}

    source = Resized(Noise(size, size), shape)
    example = source[0]
    assert source.size(1) == shape and example["image"].dtype == dtype
    # Another library's linear interpolation that averages where it shrinks.
    with jax.numpy_dtype_promotion("standard"):
        expected = jax.image.resize(image.astype(np.float32), (*shape, 2), "linear")
    near = 1e-5 if dtype == np.float32 else 0.51  # rounded to whole numbers
    np.testing.assert_allclose(example["image"], expected, rtol=1e-5, atol=near)
    # The pixel whose middle is nearest: where the new pixel's middle lies.
    picks = [
        ((np.arange(n) + 0.5) * m / n).astype(int)
        for m, n in zip(size, shape, strict=True)
    ]
    for key in ("label", "weight"):
        whole = Numbered(size)[0][key]
        np.testing.assert_array_equal(example[key], whole[np.ix_(*picks)])
        assert example[key].dtype == whole.dtype


def test_resized_images_share_a_batch():
    source = Resized(Numbered((20, 31), (7, 40), (16, 16)), (16, 12))
    batches = list(eval_batches(source, batch_size=3, pads=_to_multiple(4)))
    assert [batch["image"].shape for batch in batches] == [(3, 16, 12, 1)]
    crops = train_batches(source, seed=0, batch_size=2, crop=(16, 12))
    assert next(crops)["image"].shape == (2, 16, 12, 1)
    same = Resized(Numbered((16, 12)), (16, 12))[0]
    for key, value in Numbered((16, 12))[0].items():
        np.testing.assert_array_equal(same[key], value)
    for shape in ((16,), (16, 12, 1), (0, 12)):
        with pytest.raises(
            InputError, match=r"resize is \(.*\), but the images have 2"
        ):
            Resized(Numbered((16, 12)), shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((4, 4, 3), np.uint16)}, "image-0.png has 3 channels"),
        ({"image": np.zeros((4, 4, 4, 1), np.uint16)}, "3 spatial axes"),
        ({"image": np.zeros((4, 4, 1), np.uint8)}, "stored as uint8"),
        ({"label": np.zeros((4, 5), np.uint8)}, "size 4 x 5, but the image 4 x 4"),
        ({"label": np.full((4, 4), 7, np.int32)}, "value 7, but the 5 classes"),
        ({"label": np.full((4, 4), -1, np.int32)}, "value -1"),
        ({"label": np.zeros((4, 4), np.float32)}, "whole numbers"),
        ({"label": np.full((4, 4), 255), "weight": np.zeros((4, 4))}, None),
    ],
)
def test_checked(change, message):
    class Changed(Numbered):
        def __getitem__(self, i):
            return {**super().__getitem__(i), **change}

    source = Checked(Changed((4, 4)), channels=1, rank=2, dtype=np.dtype(np.uint16))
    if message is None:
        assert source[0]["label"].max() == 255
    else:
        with pytest.raises(InputError, match=message):
            source[0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_checked_pixels_are_numbers(value):
    class Float(Numbered):
        def __getitem__(self, i):
            image = np.full((4, 4, 1), value, np.float32)
            return {**super().__getitem__(i), "image": image}

    source = Checked(Float((4, 4)), channels=1, rank=2, dtype=np.dtype(np.float32))
    with pytest.raises(InputError, match=r"image-0.png has pixels that are NaN"):
        source[0]


@pytest.mark.parametrize("task", ["classes", "labels"])
@pytest.mark.parametrize("normalisation", ["range", "standard", "example"])
def test_build(task, normalisation):
    dataset = data.build(
        source="cells",
        train="train[:50%]",
        evaluation="val",
        task=task,
        normalisation=normalisation,
        cells={"examples": 4, "size": (32, 48)},
        folder={"no_such_option": 1},
    )
    assert (len(dataset.train), len(dataset.evaluation)) == (2, 4)
    assert (dataset.channels, dataset.rank) == (1, 2)
    assert dataset.dtype == (np.float32 if normalisation == "example" else np.uint8)
    names = ("background", "cell") if task == "classes" else ("cell",)
    assert dataset.label_names == dataset.train.label_names == names
    batch = next(train_batches(dataset.train, seed=0, batch_size=3, crop=(16, 16)))
    assert batch["image"].dtype == dataset.dtype
    assert batch["label"].shape == (3, 16, 16) + ((1,) if task == "labels" else ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"source": "cell"},
            "source = 'cell' is not known: use one of cells, coco, ctc, fold",
        ),
        ({"task": "class"}, "use one of classes, labels"),
        ({"normalisation": "z"}, "use one of auto, example, range, standard"),
        ({"train": "train[90%:80%]"}, "is empty"),
        (
            {"train": "train[:12]", "evaluation": "train[10:]"},
            r"share 2 examples, cells-train-0010 among them",
        ),
    ],
)
def test_build_errors(change, message):
    options = {"source": "cells", "train": "train", "evaluation": "val"}
    with pytest.raises(InputError, match=message):
        data.build(**{**options, "task": "classes", **change})


def test_wrong_option_is_a_type_error():
    with pytest.raises(TypeError, match="radios"):
        data.build(
            source="cells",
            train="train",
            evaluation="val",
            task="classes",
            cells={"radios": 3},
        )


def test_parts_that_do_not_fit(monkeypatch):
    parts = {"a": Numbered((4, 4)), "b": Numbered((4, 4), channels=2, title="b")}
    monkeypatch.setattr(data.importlib, "import_module", lambda _: _Opener(parts))
    options = {"source": "folder", "train": "a", "evaluation": "b", "task": "classes"}
    with pytest.raises(InputError, match=r"--config\.data\.root=DIR"):
        data.build(**options)
    options["root"] = "here"
    with pytest.raises(InputError, match=r"b-0\.png has 2 channels"):
        data.build(**options)
    parts["b"] = Numbered((4, 4), title="b")
    parts["b"].label_names = ("background", "a")
    assert data.build(**options).evaluation.label_names == Numbered.label_names
    parts["b"].label_names = ("background", "x")
    with pytest.raises(InputError, match=r"name all of them in data\.folder"):
        data.build(**options)
    parts["b"] = Numbered((4, 4))
    with pytest.raises(InputError, match=r"share 1 examples, image-0\.png"):
        data.build(**options)
    parts["b"] = Numbered()
    with pytest.raises(InputError, match=r"split 'b' .*no examples"):
        data.build(**options)


class _Opener:
    def __init__(self, parts):
        self.parts = parts

    def open(self, *, split, root, links, on_error):
        return self.parts[split]


def test_importing_data_is_light():
    heavy = ("tensorflow_datasets", "grain", "scipy", "PIL", "matplotlib", "tifffile")
    code = (
        "import sys, jax; before = set(sys.modules); import flax.linen; "
        "skip = set(sys.modules); import unet_jax.data, unet_jax.data.cells; "
        f"print([m for m in {heavy} if m in set(sys.modules) - skip])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


class Rare(Numbered):
    """One pixel of class 1 and four of class 2, at places that the example decides."""

    label_names = ("background", "one", "two")

    def __getitem__(self, i):
        example = super().__getitem__(i)
        label = np.zeros(self.sizes[i], np.uint8)
        height, width = self.sizes[i]
        label[height // 2, width - 1] = 1
        label[0, :4] = 2
        label[height - 1, 0] = 7  # of no class: nothing counts there
        weight = (label != 7).astype(np.float32)
        return {**example, "label": label, "weight": weight}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("part", [0.0, 0.4, 1.0])
def test_the_asked_part_of_the_crops_holds_foreground(part, margin, large, monkeypatch):
    if large:  # of which some places are remembered
        monkeypatch.setattr(batches._Foreground, "LARGE", 1)
        monkeypatch.setattr(batches._Foreground, "SOME", 2)
    source = Rare((40, 40), (30, 50), (9, 41))
    crop = (6, 6)
    options = {"seed": 1, "batch_size": 50, "crop": crop, "margin": margin}
    found = _take(train_batches(source, foreground=part, threads=0, **options), 20)
    label = np.concatenate([b["label"] for b in found])
    weight = np.concatenate([b["weight"] for b in found])
    # What a net with valid padding gives out is a margin smaller on each side.
    inner = (slice(None),) + (slice(margin, 6 - margin),) * 2
    shown = ((label[inner] > 0) & (weight[inner] > 0)).any((1, 2))
    chance = np.concatenate(
        [b["label"] for b in _take(train_batches(source, threads=0, **options), 20)]
    )
    by_chance = ((chance[inner] == 1) | (chance[inner] == 2)).any((1, 2)).mean()
    expected = part + (1 - part) * by_chance
    assert abs(shown.mean() - expected) < 0.05
    if part == 1:
        # Classes are drawn evenly, however many pixels they have.
        assert 0.4 < (label[inner] == 1).any((1, 2)).mean() < 0.65
        assert shown.all()


def test_aimed_crops_are_a_function_of_the_step_and_the_same_for_all_rows():
    source = Rare((40, 40), (30, 50), (20, 20))
    options = {"seed": 5, "batch_size": 6, "crop": (8, 8), "foreground": 0.5}
    whole = _take(train_batches(source, **options), 5)
    later = _take(train_batches(source, start=3, threads=0, **options), 2)
    _assert_same(whole[3:], later)
    half = _take(train_batches(source, rows=slice(3, 6), **options), 5)
    cut = [{key: array[3:] for key, array in batch.items()} for batch in whole]
    _assert_same(cut, half)


def test_aimed_crops_of_labels_and_of_examples_without_any():
    source = Labelled(Rare((30, 30), (25, 31)), task="labels")
    (batch,) = _take(
        train_batches(source, seed=0, batch_size=40, crop=(5, 5), foreground=1.0), 1
    )
    assert (batch["label"] * (batch["weight"] > 0)).any((1, 2, 3)).all()
    empty = Numbered((9, 9))
    empty.label_names = ("background",)
    plain = type(empty).__getitem__
    nothing = type("Nothing", (Numbered,), {})
    nothing.__getitem__ = lambda self, i: {
        **plain(self, i),
        "label": np.zeros(self.sizes[i], np.uint8),
    }
    options = {"seed": 0, "batch_size": 3, "crop": (5, 5), "threads": 0}
    some = _take(train_batches(nothing((9, 9)), foreground=1.0, **options), 2)
    _assert_same(some, _take(train_batches(nothing((9, 9)), **options), 2))
    with pytest.raises(InputError, match="foreground = 2"):
        train_batches(source, foreground=2, **options)
