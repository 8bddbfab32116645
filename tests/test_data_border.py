"""The paper's weight map: formulas by brute force, gaps by flood fill, its files."""

import inspect
import itertools
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from configs import default
from unet_jax import data
from unet_jax.data import border, cells, folder
from unet_jax.data.border import (
    Bordered,
    border_weight,
    class_balance,
    instances_of,
    separate,
)
from unet_jax.data.source import Labelled, NoInstances, Resized, Wrapper, instances
from unet_jax.types import InputError


def brute_border(numbers, w0, sigma, spacing):
    """Equation 2 pixel by pixel: the distance to every pixel of every object."""
    places = {
        k: np.argwhere(numbers == k) * spacing for k in np.unique(numbers) if k > 0
    }
    answer = np.zeros(numbers.shape)
    if len(places) < 2:
        return answer
    for at in np.ndindex(numbers.shape):
        if numbers[at] == 0:
            here = np.asarray(at) * spacing
            distances = sorted(
                np.sqrt(((pixels - here) ** 2).sum(axis=1)).min()
                for pixels in places.values()
            )
            answer[at] = w0 * np.exp(
                -((distances[0] + distances[1]) ** 2) / 2 / sigma**2
            )
    return answer


def flood(label):
    """Face-connected components of equal numbers above 0, by a walk over the pixels."""
    seen, pieces = set(), []
    for start in map(tuple, np.argwhere(label > 0)):
        if start in seen:
            continue
        piece, waiting = [], [start]
        seen.add(start)
        while waiting:
            at = waiting.pop()
            piece.append(at)
            for axis, step in itertools.product(range(label.ndim), (-1, 1)):
                near = (*at[:axis], at[axis] + step, *at[axis + 1 :])
                inside = all(0 <= x < n for x, n in zip(near, label.shape, strict=True))
                if inside and near not in seen and label[near] == label[at]:
                    seen.add(near)
                    waiting.append(near)
        pieces.append(frozenset(piece))
    return pieces


def as_sets(numbers):
    return {
        frozenset(map(tuple, np.argwhere(numbers == k)))
        for k in np.unique(numbers)
        if k > 0
    }


def blobs(rng, shape, count, radius):
    """Random balls with random numbers; later ones grow over earlier ones."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    numbers = np.zeros(shape, np.int32)
    for k in rng.choice(1000, count, replace=False) + 1:
        centre = rng.uniform(0, shape)
        numbers[((grid - centre) ** 2).sum(axis=-1) < rng.uniform(1, radius) ** 2] = k
    return numbers


# ---- the formulas


@pytest.mark.parametrize(
    ("shape", "count", "spacing", "w0", "sigma"),
    [
        ((40, 45), 12, (1.0, 1.0), 10.0, 5.0),
        ((40, 45), 25, (1.0, 1.0), 10.0, 1.0),
        ((30, 50), 9, (0.7, 2.5), 3.0, 4.0),
        ((30, 30), 2, (1.0, 1.0), 10.0, 20.0),
        ((9, 17, 19), 8, (1.0, 1.0, 1.0), 10.0, 5.0),
        ((9, 17, 19), 8, (3.1, 0.5, 0.8), 10.0, 2.0),
    ],
)
def test_border_weight_is_brute_force(rng, shape, count, spacing, w0, sigma):
    for _ in range(3):
        numbers = blobs(rng, shape, count, 6)
        got = border_weight(numbers, w0=w0, sigma=sigma, spacing=spacing)
        expected = brute_border(numbers, w0, sigma, spacing)
        assert got.dtype == np.float32 and expected.max() > 0.1
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", range(1, 9))
def test_border_weight_of_a_straight_gap(width):
    # d1 + d2 is the width and one more, wherever in the gap.
    numbers = np.zeros((7, 20 + width), np.int32)
    numbers[:, :10], numbers[:, 10 + width :] = 1, 2
    got = border_weight(numbers)
    expected = 10 * np.exp(-((width + 1) ** 2) / (2 * 5**2))
    np.testing.assert_allclose(got[:, 10 : 10 + width], expected, rtol=1e-6)
    assert not got[numbers > 0].any()


def test_border_weight_without_two_objects():
    numbers = np.zeros((9, 9), np.int32)
    assert not border_weight(numbers).any()
    numbers[2:4, 2:8] = 7
    assert not border_weight(numbers).any()
    numbers[6:8, 2:8] = 8
    assert border_weight(numbers).any()
    assert not border_weight(numbers, w0=0).any()


def test_numbers_of_objects_do_not_matter(rng):
    numbers = blobs(rng, (40, 40), 9, 6)
    ids = np.unique(numbers)
    others = np.append(0, rng.choice(2**31 - 1, len(ids) - 1, replace=False) + 1)
    renamed = others[np.searchsorted(ids, numbers)]
    np.testing.assert_array_equal(border_weight(renamed), border_weight(numbers))
    assert as_sets(instances_of(renamed)) == as_sets(instances_of(numbers))


@pytest.mark.parametrize(
    "wrong", [{"w0": -1}, {"sigma": 0}, {"spacing": (1,)}, {"spacing": (1, 0)}]
)
def test_border_weight_refuses(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))} = "):
        border_weight(np.zeros((4, 4), np.int32), **wrong)


def test_class_balance():
    label = np.repeat([0, 1, 3], [60, 30, 10]).reshape(10, 10)
    got = class_balance(label, 4)
    assert got.dtype == np.float32
    for k, count in ((0, 60), (1, 30), (3, 10)):
        np.testing.assert_allclose(got[label == k], 100 / (3 * count), rtol=1e-6)
    np.testing.assert_allclose(got.mean(), 1, rtol=1e-6)
    # Capped after that: 60 and 30 pixels keep their weight, the mean falls below 1.
    capped = class_balance(label, 4, most=2.5)
    np.testing.assert_array_equal(capped, np.minimum(got, np.float32(2.5)))
    assert capped.mean() < 1


def test_class_balance_counts_what_has_weight():
    label = np.repeat([0, 1, 255], [50, 30, 20])
    weight = np.ones(100, np.float32)
    weight[:20], weight[80:] = 0, 0
    got = class_balance(label, 2, weight=weight)
    np.testing.assert_array_equal(got, weight)  # 30 and 30
    weight[40:50] = 0.1  # a pixel is a pixel
    np.testing.assert_array_equal(
        class_balance(label, 2, weight=weight) > 0, weight > 0
    )
    assert not class_balance(label, 2, weight=np.zeros(100, np.float32)).any()
    only = class_balance(np.ones((3, 3), np.uint8), 2)
    np.testing.assert_array_equal(only, np.ones((3, 3), np.float32))


# ---- components and gaps

LABELS = st.sampled_from([(7, 8), (1, 9), (3, 4, 4)]).flatmap(
    lambda shape: arrays.arrays(np.uint8, shape, elements=st.integers(0, 3))
)


@settings(max_examples=60, deadline=None)
@given(LABELS)
def test_instances_of_is_a_flood_fill(label):
    got = instances_of(label)
    assert got.dtype == np.int32
    assert as_sets(got) == set(flood(label))
    np.testing.assert_array_equal(np.unique(got[got > 0]), np.arange(1, got.max() + 1))
    np.testing.assert_array_equal(got > 0, label > 0)


@settings(max_examples=100, deadline=None)
@given(LABELS)
def test_separate_leaves_nothing_that_touches(numbers):
    gap = separate(numbers)
    assert gap.dtype == bool and not (gap & (numbers == 0)).any()
    left = np.where(gap, 0, numbers)
    # Components of what is left, whatever its numbers, against the objects' own.
    pieces, before = flood(left > 0), flood(numbers)
    owners = [{k for k, part in enumerate(before) if piece & part} for piece in pieces]
    assert all(len(owner) == 1 for owner in owners)
    assert len({min(owner) for owner in owners}) == len(pieces)


@pytest.mark.parametrize(("shape", "count"), [((60, 70), 25), ((14, 20, 22), 14)])
def test_separated_objects_are_the_components(rng, shape, count):
    for _ in range(5):
        numbers = blobs(rng, shape, count, 8)
        # Voronoi cells of them: everything touches something, nothing is thin.
        places = np.stack(
            [np.argwhere(numbers == k)[0] for k in np.unique(numbers)[1:]]
        )
        grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
        away = np.linalg.norm(grid[..., None, :] - places, axis=-1)
        cut = np.where(away.min(axis=-1) < 7, away.argmin(axis=-1) + 1, 0)
        gap = separate(cut)
        before = [part for part in flood(cut) if len(part) > 9 ** (len(shape) - 1)]
        pieces = flood((cut > 0) & ~gap)
        assert all(sum(bool(part & piece) for piece in pieces) == 1 for part in before)
        assert gap.sum() < 0.35 * (cut > 0).sum()


def test_separate_takes_from_the_larger():
    numbers = np.ones((6, 9), np.int32)
    numbers[:, 6:] = 2
    numbers[2, 1] = 3
    expected = np.zeros((6, 9), bool)
    expected[:, 5] = True
    expected[[1, 3, 2, 2], [1, 1, 0, 2]] = True
    np.testing.assert_array_equal(separate(numbers), expected)
    numbers = np.eye(5, dtype=np.int32) * np.arange(1, 6)
    assert not separate(numbers).any()  # corners do not touch


def test_separate_saves_a_thin_object():
    # The frame has more pixels than the square in it and would lose all but 4.
    numbers = np.zeros((7, 7), np.int32)
    numbers[1:6, 1:6], numbers[2:5, 2:5] = 1, 2
    left = np.where(separate(numbers), 0, numbers)
    assert (left == 1).sum() == 16
    np.testing.assert_array_equal(np.argwhere(left == 2), [[3, 3]])
    # Of two single pixels one has to go.
    assert separate(np.asarray([[1, 2]])).sum() == 1


def test_separate_lets_no_object_vanish():
    # Of this frame a corner is left, or of the square in it nothing.
    numbers = np.ones((4, 4), np.int32)
    numbers[1:3, 1:3] = 2
    left = np.where(separate(numbers), 0, numbers)
    assert [(left == k).sum() for k in (1, 2)] == [1, 4]


def test_separate_drops_what_it_cuts_off():
    # Object 2 leaves object 1 a bridge of one pixel, which touches it and goes.
    numbers = np.ones((5, 9), np.int32)
    numbers[:4, 6] = 2
    left = np.where(separate(numbers), 0, numbers)
    assert not left[:, 7:].any() and (left[:, :5] == 1).all()
    assert sorted(map(len, flood(left > 0))) == [4, 26]


# ---- the source


class Plain:
    """Two touching squares and a third one apart, in class 1; class 2 in a corner."""

    label_names = ("background", "cell", "dirt")

    def __init__(self, *, weight=None):
        self.weight, self.reads = weight, 0

    def __len__(self):
        return 1

    def name(self, i):
        return "plain-0"

    def size(self, i):
        return (24, 30)

    def __getitem__(self, i):
        self.reads += 1
        label = np.zeros((24, 30), np.uint8)
        label[4:14, 3:11] = label[4:14, 11:20] = label[4:14, 24:29] = 1
        label[20:, :4] = 2
        image = np.arange(720, dtype=np.uint16).reshape(24, 30, 1)
        example = {"image": image, "label": label}
        return example if self.weight is None else {**example, "weight": self.weight}


class Numbered(Plain):
    def instances(self, i):
        numbers = instances_of(self[i]["label"])
        numbers[4:14, 11:20] = 9
        return numbers


def test_bordered_fills_label_and_weight():
    plain, source = Numbered()[0], Bordered(Numbered(), cache="none")
    example = source[0]
    numbers = Numbered().instances(0)
    gap = separate(numbers)
    assert 0 < gap.sum() <= 20
    np.testing.assert_array_equal(example["image"], plain["image"])
    np.testing.assert_array_equal(example["label"], np.where(gap, 0, plain["label"]))
    assert example["label"].dtype == np.uint8 and example["weight"].dtype == np.float32
    term = border_weight(np.where(gap, 0, numbers))
    expected = class_balance(example["label"], 3) + term
    np.testing.assert_allclose(example["weight"], expected, rtol=1e-6)
    assert term[gap].min() > 9
    bare = Bordered(Numbered(), balance=False, gap=False, w0=2, sigma=3, cache="none")[
        0
    ]
    np.testing.assert_array_equal(bare["label"], plain["label"])
    expected = 1 + border_weight(numbers, w0=2, sigma=3)
    np.testing.assert_allclose(bare["weight"], expected, rtol=1e-6)


def test_bordered_takes_components_where_there_are_no_objects():
    # Without numbers the two touching squares are one object.
    example = Bordered(Plain(), balance=False, cache="none")[0]
    plain = Plain()[0]
    np.testing.assert_array_equal(example["label"], plain["label"])
    expected = 1 + border_weight(instances_of(plain["label"]))
    np.testing.assert_allclose(example["weight"], expected, rtol=1e-6)


def test_bordered_scales_the_weight_that_is_there(rng):
    weight = rng.choice([0, 0.5, 1], (24, 30)).astype(np.float32)
    weight[:, 24:] = 0
    weight[4:14, 3:20] = 1
    example = Bordered(Plain(weight=weight), balance=False, cache="none")[0]
    np.testing.assert_array_equal(example["weight"] > 0, weight > 0)
    # The square under weight 0 is no neighbour; dirt is, where it counts.
    label = np.where(weight > 0, Plain()[0]["label"], 0)
    gap = separate(instances_of(label))
    assert not gap.any()
    expected = weight * (1 + border_weight(instances_of(label)))
    np.testing.assert_allclose(example["weight"], expected, rtol=1e-6)


def test_an_object_that_does_not_count_is_no_neighbour():
    weight = np.ones((24, 30), np.float32)
    weight[4:14, 11:20] = 0
    numbers = np.where(weight > 0, Numbered().instances(0), 0)
    example = Bordered(Numbered(weight=weight), balance=False, cache="none")[0]
    np.testing.assert_array_equal(example["label"], Plain()[0]["label"])
    expected = weight * (1 + border_weight(numbers))
    np.testing.assert_allclose(example["weight"], expected, rtol=1e-6)


def test_instances_pass_through_wrappers():
    numbers = Numbered().instances(0)
    source = Labelled(Bordered(Wrapper(Numbered()), cache="none"), task="labels")
    np.testing.assert_array_equal(source.instances(0), numbers)
    np.testing.assert_array_equal(instances(source, 0), numbers)
    larger = Resized(Numbered(), (48, 60)).instances(0)
    np.testing.assert_array_equal(larger, numbers.repeat(2, 0).repeat(2, 1))
    with pytest.raises(NoInstances, match="plain-0 comes with classes and without"):
        Labelled(Wrapper(Plain()), task="classes").instances(0)


def test_bordered_refuses():
    for options in ({"most": 0}, {"most": -1.0}):
        with pytest.raises(InputError, match="most = "):
            Bordered(Plain(), cache="none", **options)
    with pytest.raises(InputError, match=r"spacing = \(1, 1, 1\)"):
        Bordered(Plain(), cache="none", spacing=(1, 1, 1))[0]
    with pytest.raises(TypeError, match="sigmas"):
        Bordered(Plain(), sigmas=1)


# ---- the files of its cache


@pytest.fixture
def computed(monkeypatch):
    """How often a map has been computed."""
    calls = []

    def counting(*args, **options):
        calls.append(options)
        return border_weight(*args, **options)

    monkeypatch.setattr(border, "border_weight", counting)
    return calls


def test_a_map_is_computed_once(tmp_path, computed):
    first = Bordered(Numbered(), cache=str(tmp_path))[0]
    assert len(computed) == 1
    again = Bordered(Numbered(), cache=str(tmp_path))[0]
    assert len(computed) == 1
    for key, value in first.items():
        np.testing.assert_array_equal(again[key], value)
    # What the map does not depend on is not in the key, what it does is.
    Bordered(Numbered(), cache=str(tmp_path), balance=False, most=3)[0]
    assert len(computed) == 1
    others = [
        {"w0": 9.0},
        {"sigma": 4.0},
        {"gap": False},
        {"spacing": (1.0, 2.0)},
        {"spacing": (1.0, 3.0)},
    ]
    for options in others:
        Bordered(Numbered(), cache=str(tmp_path), **options)[0]
    Bordered(Plain(), cache=str(tmp_path))[0]
    assert len(computed) == 7 == len(list(tmp_path.iterdir()))


def test_another_version_computes_anew(tmp_path, computed, monkeypatch):
    Bordered(Numbered(), cache=str(tmp_path))[0]
    monkeypatch.setattr(border, "VERSION", border.VERSION + 1)
    Bordered(Numbered(), cache=str(tmp_path))[0]
    assert len(computed) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "other", "no zip"])
def test_a_damaged_file_is_computed_anew(tmp_path, computed, damage):
    expected = Bordered(Numbered(), cache=str(tmp_path))[0]
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "other":
        np.savez(path, border=np.zeros((3, 4), np.float32), gap=np.zeros((3, 4), bool))
    elif damage == "flipped":
        middle = len(whole) // 3
        path.write_bytes(
            whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
        )
    else:
        content = {"cut": whole[: len(whole) // 2], "empty": b"", "no zip": b"x" * 99}
        path.write_bytes(content[damage])
    for count in (2, 2):  # and it is mended by that
        again = Bordered(Numbered(), cache=str(tmp_path))[0]
        np.testing.assert_array_equal(again["weight"], expected["weight"])
        assert len(computed) == count
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, computed, caplog):
    (tmp_path / "file").write_text("in the way")
    source = Bordered(Numbered(), cache=str(tmp_path / "file" / "maps"))
    expected = Bordered(Numbered(), cache="none")[0]
    with caplog.at_level(logging.WARNING, "unet_jax"):
        for _ in range(3):
            np.testing.assert_array_equal(source[0]["weight"], expected["weight"])
    assert len(computed) == 4
    assert len(caplog.records) == 1 and "set data.border.cache to" in caplog.text


def test_many_at_once_write_the_same_file(tmp_path):
    expected = Bordered(Numbered(), cache="none")[0]["weight"]
    sources = [Bordered(Numbered(), cache=str(tmp_path)) for _ in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for example in pool.map(lambda source: source[0], sources):
            np.testing.assert_array_equal(example["weight"], expected)
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".npz"


def test_where_the_files_are(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    Bordered(Numbered())[0]
    assert len(list((tmp_path / "xdg" / "unet_jax" / "border").iterdir())) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Bordered(Numbered())[0]
    assert (tmp_path / "home" / ".cache" / "unet_jax" / "border").is_dir()
    Bordered(Numbered(), cache=str(tmp_path / "here"))[0]
    assert (tmp_path / "here").is_dir()


# ---- data.build

CELLS = {"source": "cells", "train": "train", "evaluation": "val"}
CELLS |= {"cells": {"examples": 3, "size": (48, 64)}, "task": "classes"}


def test_build_borders_the_training_part_alone():
    plain = data.build(**CELLS)
    made = data.build(**CELLS, border={"w0": 10.0, "sigma": 3.0, "cache": "none"})
    for i in range(3):
        np.testing.assert_array_equal(
            made.evaluation[i]["label"], plain.evaluation[i]["label"]
        )
        np.testing.assert_array_equal(
            made.evaluation[i]["weight"], plain.evaluation[i]["weight"]
        )
        gap = separate(plain.train.instances(i))
        changed = made.train[i]["label"] != plain.train[i]["label"]
        np.testing.assert_array_equal(changed, gap)
        assert made.train[i]["weight"].max() > 5
        np.testing.assert_array_equal(made.train[i]["image"], plain.train[i]["image"])


def test_build_broadcasts_the_map_over_labels():
    options = {**CELLS, "task": "labels", "border": {"w0": 10.0, "cache": "none"}}
    example = data.build(**options).train[0]
    assert example["label"].shape == example["weight"].shape == (48, 64, 1)
    np.testing.assert_array_equal(
        example["weight"][..., 0],
        data.build(**{**options, "task": "classes"}).train[0]["weight"],
    )


def test_build_takes_the_border_of_the_resized(tmp_path):
    options = {**CELLS, "resize": (24, 32), "normalisation": "example"}
    made = data.build(**options, border={"w0": 10.0, "cache": "none"})
    numbers = made.train.instances(0)
    assert numbers.shape == made.train.size(0) == (24, 32)
    example = made.train[0]
    label = np.where(separate(numbers), 0, numbers > 0)
    np.testing.assert_array_equal(example["label"], label)
    assert abs(example["image"].mean()) < 1e-5
    assert made.evaluation[0]["image"].shape == (24, 32, 1)


def test_build_switches():
    plain = data.build(**CELLS).train[0]
    off = data.build(**CELLS, border={"w0": 0.0, "sigma": 3.0}).train[0]
    np.testing.assert_array_equal(off["weight"], plain["weight"])
    with pytest.raises(InputError, match=r"data\.border\.sigma does nothing without"):
        data.build(**CELLS, border={"sigma": 3.0})
    for w0 in (0.0, 10.0):
        with pytest.raises(TypeError, match="sigmas"):
            data.build(**CELLS, border={"w0": w0, "sigmas": 3.0})


def test_config_has_every_option():
    keys = set(default.get_config().data.border.keys())
    assert keys == set(inspect.signature(Bordered).parameters) - {"source"}


# ---- the real nuclei


def test_dsb2018_nuclei_are_set_apart():
    here = Path(__file__).resolve().parents[1]
    place = Path(os.environ.get("UNET_JAX_DATA", here.parent / "shared" / "data"))
    place = place / "dsb2018"
    if not place.is_dir():
        pytest.skip(f"{place} is not there (set UNET_JAX_DATA)")
    source = folder.open(
        root=place,
        split="all[:8]",
        images="stage1_train/*/images/*.png",
        masks="derived_labels/*.png",
        mask="instances",
        channels=1,
    )
    bordered = Bordered(source, cache="none")
    for i in range(8):
        numbers, example = source.instances(i), bordered[i]
        parts = instances_of(numbers)
        assert instances_of(example["label"]).max() == parts.max()
        assert example["weight"].min() > 0


def test_cells_with_a_gap_are_as_many_components():
    # In this picture a narrower rule leaves one cell too few or too many.
    for rank, examples in ((2, 40), (3, 3)):
        options = {"split": "train", "rank": rank, "examples": examples}
        plain, gapped = cells.open(**options), cells.open(**options, gap=True)
        for i in range(examples):
            parts = instances_of(plain.instances(i)).max()
            assert instances_of(gapped[i]["label"]).max() == parts
