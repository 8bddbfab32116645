"""unet_jax.data.folder: layouts, pairing, and what is wrong said in one sentence."""

import fnmatch
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from unet_jax.data import folder
from unet_jax.data.names import stands_for
from unet_jax.data.source import NoInstances
from unet_jax.types import InputError


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def fill(root: Path, names: str = "abcd", size: tuple[int, int] = (6, 8)) -> None:
    """images/x.png of grey k and masks/x.png with its first k pixels white."""
    for k, name in enumerate(names):
        image = np.full(size, k, np.uint8)
        mask = np.zeros(size, np.uint8)
        mask.flat[:k] = 255
        save(root / "images" / f"{name}.png", image)
        save(root / "masks" / f"{name}.png", mask)


def test_pairs_sorted_by_stem(tmp_path):
    fill(tmp_path, "cabd")
    source = folder.open(root=tmp_path, split="train")
    assert [source.name(i) for i in range(4)] == [f"images/{n}.png" for n in "abcd"]
    assert source.label_names == ("background", "foreground")
    grey = [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]
    assert grey == [1, 2, 0, 3]
    for i in range(len(source)):
        example = source[i]
        assert (
            example["image"].shape == (6, 8, 1) and example["image"].dtype == np.uint8
        )
        assert example["label"].shape == (6, 8) == source.size(i)
        assert example["label"].sum() == grey[i]
        assert "weight" not in example


def test_splits_are_contiguous(tmp_path):
    fill(tmp_path, "abcdefghij")
    train = folder.open(root=tmp_path, split="train[:80%]")
    rest = folder.open(root=tmp_path, split="all[-2:]")
    names = [s.name(i) for s in (train, rest) for i in range(len(s))]
    assert names == [f"images/{n}.png" for n in "abcdefghij"]
    with pytest.raises(InputError, match=r"'train\[20:\]'"):
        folder.open(root=tmp_path, split="train[20:]")


def test_split_folders(tmp_path):
    fill(tmp_path / "train", "abc")
    fill(tmp_path / "val", "d")
    assert len(folder.open(root=tmp_path, split="train[:2]")) == 2
    val = folder.open(root=tmp_path, split="val")
    assert val.name(0) == "val/images/d.png"
    # The one mask of val is empty; its classes are those of all splits all the same.
    assert val.truth.coding.foreground == 255
    with pytest.raises(InputError, match=r"no split 'test': name one of .* train, val"):
        folder.open(root=tmp_path, split="test")
    os.remove(tmp_path / "val" / "masks" / "d.png")
    assert len(folder.open(root=tmp_path, split="train")) == 3


def halves(root: Path, images: str | Path, masks: str | Path) -> None:
    """a, b, c of train and a of val, whose mask is empty, in folders {split}."""
    images, masks = root / images, root / masks
    for split, names in (("train", "abc"), ("val", "a")):
        for k, name in enumerate(names):
            mask = np.zeros((6, 8), np.uint8)
            mask.flat[:k] = 255
            grey = np.full((6, 8), k, np.uint8)
            for place, array in ((images, grey), (masks, mask)):
                file = str(place / f"{name}.png").replace("{split}", split)
                save(Path(file), array)


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images/{split}", "masks/{split}"),
        ("{split}_images", "{split}_masks"),
        ("x{split}/*.png", "y{split}/?.png"),
        ("{split}/{split}-x/[a-z].png", "{split}/y"),
        ("**/x_{split}/*.png", "deep/er/y_{split}"),
        ("x[1]/{split}", "y[1]/{split}"),
    ],
)
def test_splits_below_or_in_the_names(tmp_path, images, masks):
    places = [Path(pattern.replace("**", "deep")) for pattern in (images, masks)]
    halves(tmp_path, *(p.parent if p.suffix else p for p in places))
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "images" / "README").touch()
    options = {"root": tmp_path, "images": images, "masks": masks}
    train = folder.open(**options, split="train")
    val = folder.open(**options, split="val")
    assert [int(train[i]["label"].sum()) for i in range(len(train))] == [0, 1, 2]
    assert len(folder.open(**options, split="train[1:]")) == 2
    assert len(val) == 1 and not {val.name(0)} & {train.name(i) for i in range(3)}
    # The one mask of val is empty; its classes are those of all splits all the same.
    assert val.truth.coding.foreground == 255
    for split in ("test", "all", "..", ".", "t" * 300):
        match = r"has no split '.*' where images='.*looks for it: name .*is, train, val"
        with pytest.raises(InputError, match=match):
            folder.open(**options, split=split)


def test_splits_in_the_names_of_files(tmp_path):
    for name in ("train_1", "train_2", "val_1", "val_old_1"):
        save(tmp_path / "images" / f"{name}.png", np.zeros((4, 4), np.uint8))
        save(tmp_path / "masks" / f"{name}_m.png", np.eye(4, dtype=np.uint8))
    options = {"images": "images/{split}_*.png", "masks": "masks/{split}_*_m.png"}
    sources = {
        split: folder.open(root=tmp_path, split=split, **options)
        for split in ("train", "val_old")
    }
    names = {k: [s.name(i) for i in range(len(s))] for k, s in sources.items()}
    assert names["train"] == ["images/train_1.png", "images/train_2.png"]
    assert names["val_old"] == ["images/val_old_1.png"]


def test_masks_of_all_splits_in_one_place(tmp_path, caplog):
    halves(tmp_path, "images/{split}", "masks")
    for k, name in enumerate("de"):
        save(tmp_path / "images" / "val" / f"{name}.png", np.zeros((6, 8), np.uint8))
        save(tmp_path / "masks" / f"{name}.png", np.full((6, 8), 5 * k, np.uint8))
    os.remove(tmp_path / "images" / "val" / "a.png")
    for options in ({"masks": "masks"}, {"label_masks": (("cell", "masks"),)}):
        options |= {"root": tmp_path, "images": "images/{split}", "mask": "binary"}
        with caplog.at_level(logging.WARNING, "unet_jax"):
            sources = [folder.open(split=s, **options) for s in ("train", "val")]
        assert [len(source) for source in sources] == [3, 2]
    assert not caplog.messages
    options = {"root": tmp_path, "images": "images/{split}", "masks": "masks"}
    pairs = [
        folder.find_pairs(tmp_path, s, images="images/{split}", masks="masks",
                          suffixes=(".png",)) for s in ("train", "val")
    ]  # fmt: skip
    assert [len(own) for own, _ in pairs] == [3, 2]
    assert {*pairs[0][1]} == {*pairs[1][1]} and len(pairs[0][1]) == 5


def test_objects_and_labels_of_splits_below(tmp_path):
    halves(tmp_path, "images/{split}", "masks/{split}/vessel")
    labelled = {"root": tmp_path, "images": "images/{split}"}
    labelled["label_masks"] = (("vessel", "masks/{split}/vessel"),)
    for split, count in (("train", 3), ("val", 1)):
        source = folder.open(split=split, **labelled)
        assert len(source) == count and source.label_names == ("vessel",)
        for name in "abc"[:count]:
            squares(tmp_path / "objects" / split, name, 2)
        for masks in ("objects/{split}", "objects/{split}/*/*.png"):
            source = folder.open(
                root=tmp_path,
                split=split,
                images="images/{split}",
                masks=masks,
                mask="objects",
            )
            assert len(source) == count and source.instances(0).max() == 2


def test_the_name_of_a_split_folder_in_its_masks(tmp_path):
    halves(tmp_path, "{split}/images", "{split}/{split}_masks")
    val = folder.open(root=tmp_path, split="val", masks="{split}_masks")
    assert val.name(0) == "val/images/a.png" and val.truth.coding.foreground == 255


def test_patterns_of_splits_that_contradict(tmp_path):
    fill(tmp_path)
    match = r"'masks/\{split\}' holds .*write it in both"
    refused(match, tmp_path, masks="masks/{split}")
    label_masks = (("a", "masks"), ("b", "{split}"))
    refused("'{split}' holds", tmp_path, label_masks=label_masks)
    match = "no split 'all' where .*: put the images there, or mend the option `images`"
    refused(match, tmp_path, images="images/{split}/x", masks="masks/{split}/x")
    match = "does not exist: put the masks there"
    (tmp_path / "images_all").mkdir()
    save(tmp_path / "images_all" / "a.png", np.zeros((4, 4), np.uint8))
    refused(match, tmp_path, images="images_{split}", masks="masks_{split}")
    for name in "abcd":
        save(tmp_path / "m" / "all" / f"{name}-x.png", np.zeros((6, 8), np.uint8))
    (tmp_path / "images").rename(tmp_path / "i_all")
    match = r"glob such as 'm/\{split\}/\*-x\.png'"
    refused(match, tmp_path, images="i_{split}", masks="m/{split}")


@pytest.mark.parametrize(
    ("name", "pattern", "texts"),
    [
        ("a_1.png", "*_?.png", ("a", "1")),
        ("a[1].png", "*[[]?].png", ("a", "1")),
        ("a]b&&c", "a[]x]b[[&]&?", ("]", "&", "c")),
        ("a-b", "?[!x]?", ("a", "-", "b")),
        ("a[]b", "?[]b", ("a", "[]")),
        ("a^b", "a[&^~|]b", ("^",)),
        ("ab", "a[z-a]*", ("ab",)),
    ],
)
def test_what_wildcards_stand_for(name, pattern, texts):
    assert stands_for(name, pattern) == texts
    assert fnmatch.fnmatchcase(name, pattern) == (texts != (name,))


def test_globs(tmp_path):
    for name in ("p1", "p2"):
        save(tmp_path / "all" / name / "photo.png", np.zeros((4, 4), np.uint8))
        save(tmp_path / "all" / name / "truth.png", np.eye(4, dtype=np.uint8))
        save(tmp_path / "flat" / f"{name}.png", np.zeros((4, 4), np.uint8))
        save(tmp_path / "flat" / f"{name}_mask.png", np.eye(4, dtype=np.uint8))
    by_folder = folder.open(
        root=tmp_path, split="all", images="all/*/photo.png", masks="all/*/truth.png"
    )
    assert [by_folder.name(i) for i in (0, 1)] == [
        "all/p1/photo.png",
        "all/p2/photo.png",
    ]
    by_ending = folder.open(
        root=tmp_path, split="all", images="flat/*.png", masks="flat/*_mask.png"
    )
    assert [by_ending.name(i) for i in (0, 1)] == ["flat/p1.png", "flat/p2.png"]


def test_mixed_formats_channels_and_ignore(tmp_path):
    fill(tmp_path, "ab")
    rgb = np.full((6, 8, 3), 9, np.uint8)
    save(tmp_path / "images" / "c.jpg", rgb)
    np.save(tmp_path / "masks" / "c.npy", np.asarray([[255] * 8] + [[7] * 8] * 5))
    for channels in (1, 3):
        source = folder.open(root=tmp_path, split="all", channels=channels, ignore=7)
        assert [source[i]["image"].shape[-1] for i in range(3)] == [channels] * 3
    example = source[2]
    np.testing.assert_array_equal(example["weight"], [[1] * 8] + [[0] * 8] * 5)
    np.testing.assert_array_equal(example["label"], [[1] * 8] + [[0] * 8] * 5)


def test_any_number_of_channels(tmp_path, rng):
    fill(tmp_path, "ab")
    for suffix in (".npy", ".tif"):
        image = rng.integers(0, 256, (5, 6, 8), np.uint8)
        for name in "ab":
            for path in (tmp_path / "images").glob(f"{name}.*"):
                path.unlink()
            path = tmp_path / "images" / f"{name}{suffix}"
            if suffix == ".npy":
                np.save(path, image)
            else:
                tifffile.imwrite(path, image, photometric="minisblack")
        source = folder.open(root=tmp_path, split="all", channels=5)
        assert source.size(1) == (6, 8)
        np.testing.assert_array_equal(source[1]["image"], np.moveaxis(image, 0, -1))


def test_instances(tmp_path):
    fill(tmp_path, "a")
    objects = np.zeros((6, 8), np.uint16)
    objects[0], objects[2] = 1, 300
    Image.fromarray(objects).save(tmp_path / "masks" / "a.png")
    source = folder.open(root=tmp_path, split="all", mask="instances")
    np.testing.assert_array_equal(source[0]["label"], objects > 0)
    np.testing.assert_array_equal(source.instances(0), objects)
    assert source.instances(0).dtype == np.int32
    void = folder.open(root=tmp_path, split="all", mask="instances", ignore=300)
    np.testing.assert_array_equal(void.instances(0), np.where(objects == 1, 1, 0))
    classes = folder.open(root=tmp_path, split="all", label_names=["a"] * 301)
    with pytest.raises(NoInstances, match=r"a\.png is read as classes \(index\): set"):
        classes.instances(0)


def test_folds(tmp_path):
    fill(tmp_path, "abcde")
    fold = folder.open(root=tmp_path, split="all[fold 2/3]")
    rest = folder.open(root=tmp_path, split="all[not fold 2/3]")
    assert [fold.name(i)[-5] for i in range(len(fold))] == ["c"]
    assert [rest.name(i)[-5] for i in range(len(rest))] == ["a", "b", "d", "e"]


def test_reading_from_threads(tmp_path):
    fill(tmp_path, "abcd")
    source = folder.open(root=tmp_path, split="all")
    with ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(lambda i: int(source[i % 4]["label"].sum()), range(64)))
    assert sums == [0, 1, 2, 3] * 16


def test_mask_without_image_is_a_warning_line(tmp_path, caplog):
    fill(tmp_path, "ab")
    os.remove(tmp_path / "images" / "a.png")
    with caplog.at_level(logging.WARNING, "unet_jax"):
        assert len(folder.open(root=tmp_path, split="all")) == 1
    assert "1 mask has no image" in caplog.text and "a.png" in caplog.text


# ---- one file for each object


def squares(root: Path, name: str, count: int, size: tuple[int, int] = (6, 8)) -> None:
    """root/name/k.png, each a square that overlaps the one before in one column."""
    (root / name).mkdir(parents=True)
    for k in range(count):
        mask = np.zeros(size, np.uint8)
        mask[1:4, 2 * k : 2 * k + 3] = 255
        save(root / name / f"{k}.png", mask)


@pytest.mark.parametrize(
    "masks", ["objects", "objects/*/*.png", "objects/[ab]?_*.png", "objects/*_*.png"]
)
def test_a_file_for_each_object(tmp_path, masks):
    for name in ("a1", "b2"):
        save(tmp_path / "images" / f"{name}.png", np.zeros((6, 8), np.uint8))
    squares(tmp_path / "objects", "a1", 3)
    squares(tmp_path / "objects", "b2", 1)
    if "_" in masks:
        for path in sorted(tmp_path.glob("objects/*/*.png")):
            path.rename(path.parents[1] / f"{path.parent.name}_{path.name}")
    source = folder.open(root=tmp_path, split="all", mask="objects", masks=masks)
    expected = np.zeros((6, 8), np.int32)
    expected[1:4] = [1, 1, 1, 2, 2, 3, 3, 0]
    np.testing.assert_array_equal(source.instances(0), expected)
    assert source.instances(0).dtype == np.int32
    np.testing.assert_array_equal(source[0]["label"], expected > 0)
    assert source[0]["label"].dtype == np.uint8 and "weight" not in source[0]
    assert source.label_names == ("background", "foreground")
    assert source.instances(1).max() == 1 and not source.overlapping


def test_an_image_without_objects(tmp_path):
    for name in "ab":
        save(tmp_path / "images" / f"{name}.png", np.zeros((6, 8), np.uint8))
    squares(tmp_path / "masks", "a", 2)
    options = {"root": tmp_path, "split": "all", "mask": "objects"}
    match = r"images.b\.png has no mask: put one file for each object in .*masks/\*/\*"
    with pytest.raises(InputError, match=match):
        folder.open(**options)
    (tmp_path / "masks" / "b").mkdir()
    source = folder.open(**options, ignore=7, label_names=("no", "yes"))
    assert not source.instances(1).any() and not source[1]["label"].any()
    assert (source[1]["weight"] == 1).all() and source.label_names == ("no", "yes")
    mask = np.full((6, 8), 7, np.uint8)
    mask[0] = 255
    save(tmp_path / "masks" / "b" / "0.png", mask)
    again = folder.open(**options, ignore=7)[1]
    np.testing.assert_array_equal(again["label"], mask == 255)
    np.testing.assert_array_equal(again["weight"], mask == 255)


# ---- labels that overlap


def planes(path: Path, array: np.ndarray) -> None:
    """``[H, W, K]`` of zeros and ones, in the way that the ending means."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".tif":
        pages = np.moveaxis(array * 255, -1, 0)
        tifffile.imwrite(path, pages, photometric="minisblack")
    else:
        Image.fromarray(array * 255).save(path)


@pytest.mark.parametrize(
    ("suffix", "count"), [(".npy", 2), (".tif", 5), (".png", 3), (".png", 4)]
)
def test_planes(tmp_path, rng, suffix, count):
    fill(tmp_path, "ab")
    labels = rng.integers(0, 2, (2, 6, 8, count), np.uint8)
    for name, label in zip("ab", labels, strict=True):
        os.remove(tmp_path / "masks" / f"{name}.png")
        planes(tmp_path / "masks" / f"{name}{suffix}", label)
    source = folder.open(root=tmp_path, split="all", mask="planes")
    assert source.overlapping
    assert source.label_names == tuple(f"label_{k}" for k in range(1, count + 1))
    for i in (0, 1):
        np.testing.assert_array_equal(source[i]["label"], labels[i])
        assert source[i]["label"].dtype == np.uint8 and "weight" not in source[i]
    with pytest.raises(NoInstances, match=r"a\.png overlap"):
        source.instances(0)
    match = rf"a\{suffix} has {count} planes, but there are 1 labels, one: give every"
    refused(match, tmp_path, mask="planes", label_names=("one",))


def test_planes_ignore_each_its_own(tmp_path):
    fill(tmp_path, "a")
    mask = np.zeros((6, 8, 2), np.uint8)
    mask[0, 0], mask[0, 1] = (1, 9), (9, 1)
    os.remove(tmp_path / "masks" / "a.png")
    np.save(tmp_path / "masks" / "a.npy", mask)
    example = folder.open(root=tmp_path, split="all", mask="planes", ignore=9)[0]
    np.testing.assert_array_equal(example["label"], mask == 1)
    np.testing.assert_array_equal(example["weight"], mask != 9)
    assert example["weight"].dtype == np.float32


@pytest.mark.parametrize("kind", [dict, tuple])
def test_a_folder_for_each_label(tmp_path, kind):
    fill(tmp_path, "abc")
    vessel, tumour = np.eye(6, 8, dtype=np.uint8), np.ones((6, 8), np.uint8)
    tumour[0] = 3
    for name in "ab":
        save(tmp_path / "masks" / "vessel" / f"{name}.png", vessel * 255)
    for name in "bc":
        save(tmp_path / "tumours" / f"{name}_t.png", tumour)
    table = kind({"vessel": "masks/vessel", "tumour": "tumours/*_t.png"}.items())
    source = folder.open(root=tmp_path, split="all", label_masks=table, ignore=3)
    assert source.overlapping and source.label_names == ("vessel", "tumour")
    counted = (tumour != 3).astype(np.float32)
    ones, zeros = np.ones((6, 8), np.float32), np.zeros((6, 8), np.float32)
    for i, (label, weight) in enumerate(
        [
            ((vessel, zeros), (ones, zeros)),
            ((vessel, counted), (ones, counted)),
            ((zeros, counted), (zeros, counted)),
        ]
    ):
        np.testing.assert_array_equal(source[i]["label"], np.stack(label, -1))
        np.testing.assert_array_equal(source[i]["weight"], np.stack(weight, -1))
        assert source[i]["label"].dtype == np.uint8
    save(tmp_path / "images" / "d.png", vessel)
    match = r"d\.png has no mask: add a file of the same stem in one of .*vessel, "
    refused(match, tmp_path, label_masks=table)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"label_names": ("a",)}, "leave out `masks`, `mask`, `colors` and `lab"),
        ({"mask": "index"}, "leave out `masks`"),
        ({"masks": "m"}, "leave out `masks`"),
        ({"label_masks": (("a", "masks"), ("a", "m"))}, "names the label 'a' twice"),
        ({"label_masks": ("ab",)}, "'ab' in `label_masks` is not a label and its"),
        ({"label_masks": (3,)}, "3 in `label_masks` is not a label and its"),
        ({"label_masks": (("a", 3),)}, r"\('a', 3\) in `label_masks` is not"),
        ({"label_masks": (("a", "no"),)}, "no does not exist: .* `label_masks`"),
        ({"label_masks": (), "mask": "round"}, "'round' is not known: .*objects, pl"),
        ({"label_masks": (), "mask": "planes", "colors": [(0, 0, 0)]}, "drop one"),
        ({"label_masks": (), "mask": "objects", "masks": "**/*.png"}, "one [*] for"),
        ({"label_masks": (), "mask": "objects", "masks": "m/*/*"}, "holds no masks"),
    ],
)
def test_options_that_contradict(tmp_path, options, match):
    fill(tmp_path)
    refused(match, tmp_path, **{"label_masks": (("a", "masks"),), **options})


# ---- links, and files that are left out


def test_links_that_lead_out(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    fill(root)
    fill(other)
    for which in ("images", "masks"):
        link = root / which / "c.png"
        link.unlink()
        link.symlink_to(other / which / "c.png")
        refused(rf"{which}.c\.png leads to .*other.*, out of .*links=True", root)
        assert len(folder.open(root=root, split="all", links=True)) == 4
        link.unlink()
        link.symlink_to(root / which / "d.png")
    assert len(folder.open(root=root, split="all")) == 4
    (root / "linked").symlink_to(other / "masks")
    refused(r"linked.a\.png leads to", root, masks="linked")
    refused(r"linked.a\.png leads to", root, label_masks=(("a", "linked"),))
    squares(other / "objects", "a", 1)
    (root / "objects").symlink_to(other / "objects")
    only = {"images": "images/a.png", "masks": "objects/*/*.png", "mask": "objects"}
    refused(r"objects.a.0\.png leads to", root, **only)
    # What the user writes leads where it says.
    assert len(folder.open(root=root, split="all", masks=str(other / "masks"))) == 4
    assert len(folder.open(root=root, split="all", masks="../other/masks")) == 4


def spoilt(root: Path) -> None:
    """Of images a to h, all but a and h at fault, each in another way."""
    fill(root, "abcdefgh")
    os.remove(root / "masks" / "b.png")
    (root / "images" / "c.png").write_bytes(b"no picture")
    save(root / "masks" / "d.png", np.zeros((8, 6), np.uint8))
    mask = root / "masks" / "e.png"
    mask.write_bytes(mask.read_bytes()[:50])
    (root / "images" / "f.png").unlink()
    (root / "images" / "f.png").symlink_to("gone.png")
    save(root / "images" / "g.bmp", np.zeros((6, 8), np.uint8))


def test_files_at_fault_are_left_out(tmp_path, caplog):
    spoilt(tmp_path)
    with caplog.at_level(logging.WARNING, "unet_jax"):
        source = folder.open(root=tmp_path, split="all", on_error="skip")
    assert [source.name(i) for i in (0, 1)] == ["images/a.png", "images/h.png"]
    assert len(source) == 2 and source[1]["label"].sum() == 7
    (line,) = [
        r.message for r in caplog.records if "are left out. The first" in r.message
    ]
    assert line.startswith(f"6 faulty images of {tmp_path} are left out. The first: ")
    assert "g.bmp and" in line
    halves = [
        folder.open(root=tmp_path, split=split, on_error="skip")
        for split in ("all[:50%]", "all[50%:]")
    ]
    assert [half.name(0) for half in halves] == ["images/a.png", "images/h.png"]
    for name in ("a", "h"):
        (tmp_path / "images" / f"{name}.png").write_bytes(b"")
    match = r"All images of .* are faulty, 8 in number\. .*g\.png are both"
    with pytest.raises(InputError, match=match):
        folder.open(root=tmp_path, split="all", on_error="skip")
    refused(r"data\.on_error = 'ask' is not known", tmp_path, on_error="ask")


def test_one_file_at_fault_is_left_out(tmp_path, caplog):
    fill(tmp_path, "ab")
    (tmp_path / "images" / "b.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "unet_jax"):
        folder.open(root=tmp_path, split="all", on_error="skip")
    (line,) = caplog.messages
    file = tmp_path / "images" / "b.png"
    assert line.startswith(f"1 faulty image of {tmp_path} is left out: {file} cannot")
    os.remove(tmp_path / "images" / "a.png")
    with pytest.raises(InputError, match=r"All images of .* are faulty\. .*b\.png"):
        folder.open(root=tmp_path, split="all", on_error="skip")


def test_masks_at_fault_are_left_out(tmp_path, rng):
    for name in "abc":
        save(tmp_path / "images" / f"{name}.png", np.zeros((6, 8), np.uint8))
    (tmp_path / "masks" / "a").mkdir(parents=True)
    (tmp_path / "masks" / "a" / "0.png").write_bytes(b"no picture")
    squares(tmp_path / "masks", "c", 2)
    options = {"root": tmp_path, "split": "all", "on_error": "skip"}
    source = folder.open(**options, mask="objects")
    assert [source.name(i) for i in range(len(source))] == ["images/c.png"]
    (tmp_path / "planes").mkdir()
    (tmp_path / "planes" / "a.npy").write_bytes(b"no array")
    label = rng.integers(0, 2, (6, 8, 2), np.uint8)
    np.save(tmp_path / "planes" / "b.npy", label)
    source = folder.open(**options, mask="planes", masks="planes")
    assert len(source) == 1 and source.label_names == ("label_1", "label_2")
    np.testing.assert_array_equal(source[0]["label"], label)


# ---- bad input: one sentence with the file's name and the remedy


def refused(match: str, root: Path, **options: object) -> None:
    with pytest.raises(InputError, match=match) as caught:
        source = folder.open(root=root, split="all", **options)
        for i in range(len(source)):
            source[i]
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    assert text.count(". ") == 0


def test_image_without_mask(tmp_path):
    fill(tmp_path)
    os.remove(tmp_path / "masks" / "c.png")
    refused(r"images.c\.png has no mask: add a file of the same stem in", tmp_path)


def test_masks_named_with_an_ending(tmp_path):
    fill(tmp_path)
    for name in "abcd":
        mask = tmp_path / "masks" / f"{name}.png"
        mask.rename(mask.with_name(f"{name}_mask.png"))
    refused(r"a\.png has no mask \(4 of 4 .*glob such as 'masks/\*_mask.png'", tmp_path)
    assert len(folder.open(root=tmp_path, split="all", masks="masks/*_mask.png")) == 4


@pytest.mark.parametrize(
    ("place", "masks", "renamed"),
    [
        ("gt/train", "gt/train", "?_m.png"),
        ("gt/[x]", "gt/[x]/", "?_[m].png"),
        ("gt/x", "gt/*/*.png", "?_m.png"),
        ("gt/x", "gt/x/mask_*.png", "mask_?_m.png"),
        ("gt/all", "gt/{split}", "?_m.png"),
    ],
)
def test_what_is_advised_for_images_without_masks_works(
    place, masks, renamed, tmp_path
):
    images = "images/{split}" if "{split}" in masks else "images"
    # Of 1_m and 10_m the second begins with the first image's name as well.
    for name in ("1", "10", "11"):
        at = images.replace("{split}", "all")
        save(tmp_path / at / f"{name}.png", np.zeros((6, 8), np.uint8))
        file = tmp_path / place / renamed.replace("?", name)
        save(file, np.eye(6, 8, dtype=np.uint8))
    with pytest.raises(InputError, match="has no mask") as caught:
        folder.open(root=tmp_path, split="all", images=images, masks=masks)
    (advised,) = re.findall("a glob such as '(.*)'", str(caught.value))
    source = folder.open(root=tmp_path, split="all", images=images, masks=advised)
    assert [Path(source.name(i)).stem for i in range(3)] == ["1", "10", "11"]


def test_names_too_long_for_a_file(tmp_path):
    fill(tmp_path)
    long = "x" * 300
    refused("has no folder|does not exist", tmp_path, images=long)
    refused("does not exist: put the masks there", tmp_path, masks=long)
    refused("does not exist", tmp_path, label_masks=(("a", long),))
    refused("holds no masks", tmp_path, masks=f"{long}*")
    refused("holds no masks", tmp_path, masks=f"{long}/*/*", mask="objects")
    many = "masks/" + "*" * 300 + ".png"
    assert len(folder.open(root=tmp_path, split="all", masks=many)) == 4


def test_sizes_that_differ(tmp_path, monkeypatch):
    fill(tmp_path)
    save(tmp_path / "masks" / "c.png", np.zeros((8, 6), np.uint8))
    match = r"c\.png has the size 6 x 8, but its mask .*c\.png 8 x 6 .*the same size"
    with pytest.raises(InputError, match=match):
        folder.open(root=tmp_path, split="all")
    monkeypatch.setattr(folder, "CHECK_AT_OPENING", 0)
    source = folder.open(root=tmp_path, split="all")
    with pytest.raises(InputError, match=match):
        source[2]


def test_value_out_of_range(tmp_path):
    fill(tmp_path)
    save(tmp_path / "masks" / "c.png", np.full((6, 8), 4, np.uint8))
    refused(
        r"masks.c\.png has the value 4, but the 3 classes a, b, c are 0 to 2: mend",
        tmp_path,
        mask="index",
        label_names=("a", "b", "c"),
        ignore=255,
    )
    refused(r"values 0, 4, 255 \(such as 4 in .*c\.png\)", tmp_path)


@pytest.mark.parametrize("which", ["images", "masks"])
@pytest.mark.parametrize("kept", [0, 40, -26])
def test_damaged_file(tmp_path, which, kept):
    fill(tmp_path)
    path = tmp_path / which / "c.png"
    path.write_bytes(path.read_bytes()[:kept])
    for mask in ("auto", "binary"):
        refused(
            rf"{which}.c\.png cannot be read \(.*\): it may be", tmp_path, mask=mask
        )


def test_nan_pixels(tmp_path):
    fill(tmp_path)
    np.save(tmp_path / "images" / "e.npy", np.full((6, 8), np.nan, np.float32))
    save(tmp_path / "masks" / "e.png", np.zeros((6, 8), np.uint8))
    refused(r"e\.npy has NaN or infinite pixels \(48 of 48 values\): replace", tmp_path)


def test_nothing_there(tmp_path):
    refused(r"The folder .*no does not exist: check `data.root`", tmp_path / "no")
    refused(r"masks does not exist: put the masks there", tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    refused(r"masks holds no masks: put \.png", tmp_path)
    save(tmp_path / "masks" / "a.png", np.zeros((6, 8), np.uint8))
    (tmp_path / "images" / "notes.txt").touch()
    refused(r"images holds no images: put \.png, .*option `images`", tmp_path)


def test_one_stem_twice(tmp_path):
    fill(tmp_path)
    save(tmp_path / "images" / "a.jpg", np.zeros((6, 8), np.uint8))
    refused(r"a\.jpg and .*a\.png are both the image 'a': keep one", tmp_path)


def test_jpeg_masks(tmp_path, rng):
    fill(tmp_path)
    os.remove(tmp_path / "masks" / "d.png")
    blob = np.zeros((6, 8), np.uint8)
    blob[1:4, 2:6] = 255
    save(tmp_path / "masks" / "d.jpg", blob)
    refused(
        r"d\.jpg is a JPEG, which blurs .* as PNG, or set `mask` to binary", tmp_path
    )
    source = folder.open(root=tmp_path, split="all", mask="binary")
    np.testing.assert_array_equal(source[3]["label"], blob // 255)


def test_soft_edges_and_transparency(tmp_path):
    fill(tmp_path, "ab")
    soft = np.linspace(0, 255, 48).astype(np.uint8).reshape(6, 8)
    save(tmp_path / "masks" / "b.png", soft)
    with pytest.raises(InputError, match=r"set `mask` to binary if .* soft edges"):
        folder.open(root=tmp_path, split="all")
    source = folder.open(root=tmp_path, split="all", mask="binary")
    np.testing.assert_array_equal(source[1]["label"], soft >= 128)
    for colour in (0, 255):
        shape = np.full((6, 8, 4), colour, np.uint8)
        shape[..., 3] = soft
        save(tmp_path / "masks" / "b.png", shape)
        for mask in ("auto", "binary", "index"):
            refused(r"b\.png has one colour everywhere and", tmp_path, mask=mask)
        shape[..., 3] = 255
        save(tmp_path / "masks" / "b.png", shape)
        source = folder.open(root=tmp_path, split="all", mask="binary")
        assert (source[1]["label"] == colour // 255).all()


# ---- the real nuclei


def data(name: str) -> Path:
    here = Path(__file__).resolve().parents[1]
    place = (
        Path(os.environ.get("UNET_JAX_DATA", here.parent / "shared" / "data")) / name
    )
    if not place.is_dir():
        pytest.skip(f"{place} is not there (set UNET_JAX_DATA)")
    return place


@pytest.mark.parametrize("channels", [1, 3])
def test_dsb2018(channels):
    options = {
        "root": data("dsb2018"),
        "images": "stage1_train/*/images/*.png",
        "masks": "derived_labels/*.png",
        "mask": "instances",
        "channels": channels,
    }
    source = folder.open(split="all[-20:]", **options)
    assert len(source) == 20 and len(folder.open(split="all", **options)) == 102
    for i in (0, 19):
        example = source[i]
        assert example["image"].shape == (*source.size(i), channels)
        assert 0 < example["label"].mean() < 0.9
        assert source.instances(i).max() > 1


def test_dsb2018_by_object():
    """The files of the objects give what the derived masks were made of."""
    options = {"root": data("dsb2018"), "split": "all[20:28]", "channels": 1}
    images = "stage1_train/*/images/*.png"
    objects = folder.open(
        images=images, masks="stage1_train/*/masks/*.png", mask="objects", **options
    )
    derived = folder.open(
        images=images, masks="derived_labels", mask="instances", **options
    )
    assert len(objects) == len(derived) == 8
    for i in range(8):
        assert objects.name(i) == derived.name(i)
        np.testing.assert_array_equal(objects.instances(i), derived.instances(i))
        np.testing.assert_array_equal(objects[i]["label"], derived[i]["label"])
