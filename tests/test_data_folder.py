"""unet_jax.data.folder: layouts, pairing, and what is wrong said in one sentence."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unet_jax.data import folder
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
    assert val.coding.foreground == 255
    with pytest.raises(InputError, match=r"no split 'test': name one of .* train, val"):
        folder.open(root=tmp_path, split="test")
    os.remove(tmp_path / "val" / "masks" / "d.png")
    assert len(folder.open(root=tmp_path, split="train")) == 3


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
    assert "1 masks have no image" in caplog.text and "a.png" in caplog.text


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
