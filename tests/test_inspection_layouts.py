"""unet_jax.inspection: which layout a folder has, and what its files are called."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from unet_jax.inspection import inspect, layouts, listing, words
from unet_jax.inspection.examples import open_parts
from unet_jax.inspection.layout import Layout
from unet_jax.types import InputError

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
MASK = np.eye(8, dtype=np.uint8) * 255


def write(root: Path, *names: str) -> None:
    """Files of these names: pictures, stacks, volumes, or what else the ending says."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = (*Path(name).parts[:-1], path.stem)
        array = MASK if "mask" in {words.role(part).what for part in parts} else GREY
        if name.endswith(".json"):
            path.write_text("{}")
        elif name.endswith((".nii", ".nii.gz")):
            nibabel = pytest.importorskip("nibabel")
            volume = np.stack([array.astype(np.int16)] * 3)
            nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)
        elif name.endswith(".stack.tif"):
            path = path.with_name(path.name.replace(".stack", ""))
            tifffile.imwrite(path, np.stack([array] * 3), photometric="minisblack")
        elif name.endswith(".npy"):
            np.save(path, np.stack([array] * 9))
        elif name.endswith(".txt"):
            path.write_text("notes")
        else:
            Image.fromarray(array).save(path)


def both(left: str, right: str, names: str = "abc") -> list[str]:
    """The same names in two patterns."""
    return [pattern.replace("?", name) for name in names for pattern in (left, right)]


CASES = {
    "plain": (
        both("images/?.png", "masks/?.png"),
        ("folder", {"images": "images", "masks": "masks"}, "train[:80%]", 3),
    ),
    "any case": (
        both("Imgs/?.jpg", "Ground_Truth/?.png"),
        ("folder", {"images": "Imgs", "masks": "Ground_Truth"}, "train[:80%]", 3),
    ),
    "voc": (
        [*both("JPEGImages/?.jpg", "SegmentationClass/?.png"), "JPEGImages/x.jpg"],
        (
            "folder",
            {"images": "JPEGImages", "masks": "SegmentationClass"},
            "train[:80%]",
            3,
        ),
    ),
    "x and y": (
        both("x/?.png", "y/?.png"),
        ("folder", {"images": "x", "masks": "y"}, "train[:80%]", 3),
    ),
    "splits above": (
        both("train/images/?.png", "train/labels/?.png")
        + both("valid/images/?.png", "valid/labels/?.png", "d"),
        ("folder", {"images": "images", "masks": "labels"}, "train", 4),
    ),
    "train above alone": (
        both("Train/img/?.png", "Train/gt/?.png"),
        ("folder", {"images": "img", "masks": "gt"}, "Train[:80%]", 3),
    ),
    "splits below": (
        both("images/train/?.png", "masks/train/?.png")
        + both("images/val/?.png", "masks/val/?.png", "d"),
        (
            "folder",
            {"images": "images/{split}", "masks": "masks/{split}"},
            "train",
            4,
        ),
    ),
    "splits below, but no masks of the others": (
        [*both("images/train/?.png", "masks/train/?.png"), "images/test/z.png"],
        (
            "folder",
            {"images": "images/train", "masks": "masks/train"},
            "train[:80%]",
            3,
        ),
    ),
    "splits below, one folder a class": (
        both("images/train/?.png", "masks/train/vessel/?.png")
        + both("images/dev/?.png", "masks/dev/vessel/?.png", "d"),
        (
            "folder",
            {
                "images": "images/{split}",
                "label_masks": (("vessel", "masks/{split}/vessel"),),
            },
            "train",
            4,
        ),
    ),
    "splits below train": (
        both("train/images/train/?.png", "train/masks/train/?.png")
        + both("train/images/val/?.png", "train/masks/val/?.png", "d"),
        (
            "folder",
            {"images": "images/{split}", "masks": "masks/{split}"},
            "train",
            4,
        ),
    ),
    "splits of a year": (
        both("images/train2017/?.png", "masks/train2017/?.png")
        + both("images/val2017/?.png", "masks/val2017/?.png", "d"),
        (
            "folder",
            {"images": "images/{split}", "masks": "masks/{split}"},
            "train2017",
            4,
        ),
    ),
    "splits below, masks of all in one place": (
        both("images/train/?.png", "masks/?_x.png")
        + both("images/val/?.png", "masks/?_x.png", "d"),
        (
            "folder",
            {"images": "images/{split}/*.png", "masks": "masks/*_x.png"},
            "train",
            4,
        ),
    ),
    "splits below, masks of all in one folder a class": (
        both("images/train/?.png", "masks/vessel/?.png")
        + both("images/dev/?.png", "masks/vessel/?.png", "d"),
        (
            "folder",
            {
                "images": "images/{split}",
                "label_masks": (("vessel", "masks/vessel"),),
            },
            "train",
            4,
        ),
    ),
    "splits below, masks of the training part alone": (
        [*both("images/train/?.png", "masks/?.png"), "images/test/z.png"],
        ("folder", {"images": "images/train", "masks": "masks"}, "train[:80%]", 3),
    ),
    "numbered folders are no splits": (
        both("train1/images/?.png", "train1/masks/?.png")
        + both("train2/images/?.png", "train2/masks/?.png", "d"),
        (
            "folder",
            {"images": "*/images/*.png", "masks": "*/masks/*.png"},
            "train[:80%]",
            4,
        ),
    ),
    "splits in all names": (
        both("train_images/train_?.jpg", "train_masks/train_?_mask.png")
        + both("validation_images/validation_?.jpg",
               "validation_masks/validation_?_mask.png", "d"),
        (
            "folder",
            {
                "images": "{split}_images/*.jpg",
                "masks": "{split}_masks/*_mask.png",
            },
            "train",
            4,
        ),
    ),
    "decathlon with labels of all": (
        both("imagesTr/?.npy", "labelsTr/?.npy")
        + both("imagesTs/?.npy", "labelsTs/?.npy", "d"),
        (
            "volumes",
            {"images": "images{split}", "masks": "labels{split}", "slices": False},
            "Tr",
            4,
        ),
    ),
    "splits in names": (
        [*both("train_images/?.png", "train_masks/?.png"), "test_images/z.png"],
        (
            "folder",
            {"images": "train_images", "masks": "train_masks"},
            "train[:80%]",
            3,
        ),
    ),
    "other stems": (
        both("images/?.jpg", "masks/?_mask.png"),
        (
            "folder",
            {"images": "images/*.jpg", "masks": "masks/*_mask.png"},
            "train[:80%]",
            3,
        ),
    ),
    "both affixed": (
        both("images/image_?.png", "labels/label_?.png", "0123456789"),
        (
            "folder",
            {"images": "images/image_*.png", "masks": "labels/label_*.png"},
            "train[:80%]",
            10,
        ),
    ),
    "below patients": (
        both("images/p1/?.png", "masks/p1/?.png")
        + both("images/p2/?.png", "masks/p2/?.png", "de"),
        (
            "folder",
            {"images": "images/*/*.png", "masks": "masks/*/*.png"},
            "train[:80%]",
            5,
        ),
    ),
    "a folder a class": (
        [*both("images/?.png", "masks/vessel/?.png"), "masks/tumour/a.png"],
        (
            "folder",
            {
                "images": "images",
                "label_masks": (("tumour", "masks/tumour"), ("vessel", "masks/vessel")),
            },
            "train[:80%]",
            3,
        ),
    ),
    "a folder of objects an image": (
        [*both("images/?.png", "masks/?/0.png"), "masks/a/1.png"],
        (
            "folder",
            {"images": "images/*.png", "masks": "masks/*/*.png", "mask": "objects"},
            "train[:80%]",
            3,
        ),
    ),
    "samples of objects": (
        [
            *both("s/?/images/?.png", "s/?/masks/?0.png"),
            *("s/a/masks/a1.png", "derived_labels/a.png", "sheet.png"),
        ],
        (
            "folder",
            {
                "images": "s/*/images/*.png",
                "masks": "s/*/masks/*.png",
                "mask": "objects",
            },
            "train[:80%]",
            3,
        ),
    ),
    "samples of one mask": (
        both("?/image/?.png", "?/mask/?.png"),
        (
            "folder",
            {"images": "*/image/*.png", "masks": "*/mask/*.png"},
            "train[:80%]",
            3,
        ),
    ),
    "samples of one name": (
        both("?/images/0.png", "?/masks/0.png"),
        (
            "folder",
            {"images": "*/images/0.png", "masks": "*/masks/0.png"},
            "train[:80%]",
            3,
        ),
    ),
    "samples of two files": (
        both("?/photo.png", "?/truth.png"),
        ("folder", {"images": "*/photo.png", "masks": "*/truth.png"}, "train[:80%]", 3),
    ),
    "side by side": (
        both("?.png", "?_mask.png"),
        ("folder", {"images": "*.png", "masks": "*_mask.png"}, "train[:80%]", 3),
    ),
    "side by side, a word each": (
        both("?_sat.jpg", "?-gt.png"),
        ("folder", {"images": "*_sat.jpg", "masks": "*-gt.png"}, "train[:80%]", 3),
    ),
    "side by side, before": (
        both("?.jpg", "label_?.png"),
        ("folder", {"images": "*.jpg", "masks": "label_*.png"}, "train[:80%]", 3),
    ),
    "side by side, in splits": (
        both("train/?.png", "train/?_seg.png")
        + both("val/?.png", "val/?_seg.png", "d"),
        ("folder", {"images": "*.png", "masks": "*_seg.png"}, "train", 4),
    ),
    "one stack": (
        ["train-volume.stack.tif", "train-labels.stack.tif", "test-volume.stack.tif"],
        (
            "volumes",
            {"images": "train-volume.tif", "masks": "train-labels.tif", "slices": True},
            "train[:80%]",
            1,
        ),
    ),
    "many stacks": (
        both("images/?.stack.tif", "masks/?.stack.tif"),
        (
            "volumes",
            {"images": "images", "masks": "masks", "slices": True},
            "train[:80%]",
            3,
        ),
    ),
    "decathlon without its json": (
        [*both("imagesTr/?.nii.gz", "labelsTr/?.nii.gz"), "imagesTs/z.nii.gz"],
        (
            "volumes",
            {"images": "imagesTr", "masks": "labelsTr", "slices": False},
            "train[:80%]",
            3,
        ),
    ),
    "nifti side by side": (
        both("?.nii", "?_seg.nii"),
        (
            "volumes",
            {"images": "*.nii", "masks": "*_seg.nii", "slices": False},
            "train[:80%]",
            3,
        ),
    ),
    "npy volumes": (
        both("images/?.npy", "masks/?.npy"),
        (
            "volumes",
            {"images": "images", "masks": "masks", "slices": False},
            "train[:80%]",
            3,
        ),
    ),
    "dataset.json": (
        ["dataset.json", *both("imagesTr/?_0000.png", "labelsTr/?.png")],
        ("nnunet", {}, "train[:80%]", None),
    ),
    "tracking": (
        both("01/t00?.tif", "01_GT/SEG/man_seg00?.tif", "012")
        + both("02/t00?.tif", "02_GT/SEG/man_seg00?.tif", "0"),
        ("ctc", {}, "01", None),
    ),
    "one folder within": (
        [*both("data/images/?.png", "data/masks/?.png"), "notes.txt"],
        ("folder", {"images": "images", "masks": "masks"}, "train[:80%]", 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_layouts(name, tmp_path):
    files, (source, options, train, pairs) = CASES[name]
    write(tmp_path, *files)
    found = layouts.find(tmp_path)
    assert (found.source, dict(found.options), found.train) == (source, options, train)
    listed = listing.files_of(found)
    assert (listed and len(listed.pairs)) == pairs
    if listed is not None:
        assert listed.twice == ()
        for pair in listed.pairs:
            assert pair.image not in pair.masks
    assert found.why


def test_what_the_layouts_say_of_splits(tmp_path):
    write(tmp_path, *CASES["splits in names"][0])
    (note,) = layouts.find(tmp_path).notes
    assert "the split test cannot be evaluated on" in note
    other = tmp_path / "other"
    write(other, *both("images/train/?.png", "masks/train/?.png"))
    write(other, *both("images/val/?.png", "masks/val/?_x.png", "de"))
    found = layouts.find(other)
    (note,) = found.notes
    assert "the split val" in note and found.evaluation == "train[80%:]"


@pytest.mark.parametrize(
    ("others", "evaluation"),
    [
        (("val",), "val"),
        (("validation", "test"), "validation"),
        (("valid",), "valid"),
        (("test",), "test"),
    ],
)
@pytest.mark.parametrize("pattern", ["?/{}", "?_{}", "{}-?", "{}/?", "?/{}2012"])
def test_a_split_of_its_own_is_evaluated_on(pattern, others, evaluation, tmp_path):
    for number, split in enumerate(("train", *others)):
        for side in ("images", "masks"):
            place = pattern.replace("?", side).format(split)
            write(tmp_path, *(f"{place}/{name}.png" for name in f"ab{number}"))
    found = layouts.find(tmp_path)
    year = pattern.removeprefix("?/{}") if pattern.endswith("2012") else ""
    assert (found.train, found.evaluation) == (f"train{year}", f"{evaluation}{year}")
    assert found.notes == ()
    listed = listing.files_of(found)
    assert len(listed.pairs) == 6 and not listed.bare and not listed.spare
    opened = open_parts(found)
    assert not opened.errors and not opened.said
    names = [s.name(i) for s in opened.sources.values() for i in range(len(s))]
    assert len(set(names)) == 6
    assert sorted(names) == sorted(pair.name for pair in listed.pairs)


def test_masks_of_all_splits_in_one_place_are_not_spare(tmp_path):
    for split, names in (("train", "abc"), ("val", "de")):
        write(tmp_path, *(f"images/{split}/{n}.png" for n in names))
        write(tmp_path, *(f"masks/{n}.png" for n in names))
    write(tmp_path, "masks/x.png")
    options = {"images": "images/{split}", "masks": "masks"}
    layout = Layout("folder", tmp_path, options, "train", "val")
    listed = listing.files_of(layout)
    assert len(listed.pairs) == 5 and listed.spare == ("masks/x.png",)
    assert [len(s) for s in open_parts(layout).sources.values()] == [3, 2]


def test_a_mask_that_two_splits_may_mean_is_no_layout(tmp_path):
    files = both("images/train/?.png", "masks/?.png")
    write(tmp_path, *files, "images/val/a.png")
    with pytest.raises(InputError, match="none of the layouts"):
        layouts.find(tmp_path)


@pytest.mark.parametrize("shape", [(2**63, 4, 4), (2**70,), (0, -1), (4, 4, 4)])
def test_npy_whose_header_is_not_believed(shape, tmp_path):
    write(tmp_path, *both("images/?.npy", "masks/?.npy"))
    with (tmp_path / "images" / "a.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
    found = inspect(layouts.find(tmp_path))
    errors = [f.text for f in found.findings if f.level == "error"]
    assert any(
        "a.npy cannot be read" in text or "a.npy says" in text for text in errors
    )


def test_names_too_long_for_a_file(tmp_path):
    write(tmp_path, *both("images/?.png", "masks/?.png"))
    long = "x" * 300
    for options in ({"images": long}, {"masks": long}, {"images": f"{long}/*.png"}):
        layout = Layout("folder", tmp_path, options)
        assert listing.files_of(layout).pairs == ()
        opened = open_parts(layout)
        assert opened.errors and not opened.sources
    with pytest.raises(InputError, match="does not exist"):
        layouts.find(tmp_path / long)
    with pytest.raises(InputError, match="does not exist"):
        layouts.find(Path("~nobody-of-this-name/data"))


def test_unpaired_files_are_listed(tmp_path):
    names = both("images/?.png", "masks/?.png")
    write(tmp_path, *names, "images/x.png", "masks/y.png", "images/a.jpg")
    listed = listing.files_of(layouts.find(tmp_path))
    assert [p.name for p in listed.pairs][1:] == ["images/b.png", "images/c.png"]
    assert listed.bare == ("images/x.png",)
    assert listed.spare == ("masks/y.png",)
    assert listed.twice == ("a",)


def test_names_with_what_a_glob_reads_as_its_own(tmp_path):
    write(tmp_path, *both("images/?.png", "masks/?_[m]-[!]x.png"))
    found = layouts.find(tmp_path)
    assert len(listing.files_of(found).pairs) == 3
    opened = open_parts(found)
    assert not opened.errors and sum(map(len, opened.sources.values())) == 3


def test_objects_are_gathered_by_image(tmp_path):
    write(tmp_path, *CASES["samples of objects"][0])
    listed = listing.files_of(layouts.find(tmp_path))
    assert [len(pair.masks) for pair in listed.pairs] == [2, 1, 1]


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (
            ["annotations/instances_train.json", "annotations/instances_val.json"],
            ("train", "val"),
        ),
        (
            ["train/_annotations.coco.json", "valid/_annotations.coco.json"],
            ("train", "valid"),
        ),
        (["annotations.json"], ("train[:80%]", "train[80%:]")),
        (["annotations/instances_val2017.json"], ("val2017[:80%]", "val2017[80%:]")),
        (
            [f"annotations/instances_{s}{y}.json" for s in ("train", "val")
             for y in (2014, 2017)],
            ("train2017", "val2017"),
        ),
    ],
)  # fmt: skip
def test_coco(files, splits, tmp_path):
    held = {"images": [], "annotations": [], "categories": []}
    for name in files:
        write(tmp_path, name)
        (tmp_path / name).write_text(json.dumps(held))
    write(tmp_path, "images/a.png", "other.json")
    found = layouts.find(tmp_path)
    assert found.source == "coco"
    assert (found.train, found.evaluation) == splits


def annotated(root: Path, path: str, images: str, names: str) -> None:
    """A JSON of COCO's with a square in each of some images, and the images."""
    write(root, *(f"{images}/{name}.png" for name in names), path)
    square = [[1, 1, 5, 1, 5, 5, 1, 5]]
    held = {
        "images": [
            {"id": i, "file_name": f"{name}.png"} for i, name in enumerate(names)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "segmentation": square}
            for i in range(len(names))
        ],
        "categories": [{"id": 1, "name": "cell"}],
    }
    (root / path).write_text(json.dumps(held))


@pytest.mark.parametrize(
    ("path", "images", "splits"),
    [
        ("annotations/instances_?.json", "?", ("train2017", "val2017")),
        ("annotations/instances_?.json", "images/?", ("train2017", "val2017")),
        ("annotations/?.json", "?", ("train", "validation")),
        ("?/_annotations.coco.json", "?", ("train", "valid")),
    ],
)
def test_coco_opens_with_what_is_found(path, images, splits, tmp_path):
    for split, names in zip(splits, ("abc", "de"), strict=True):
        annotated(tmp_path, path.replace("?", split), images.replace("?", split), names)
        # COCO has key points of the same images beside the objects.
        if "instances" in path:
            other = f"annotations/person_keypoints_{split}.json"
            text = (tmp_path / path.replace("?", split)).read_text()
            (tmp_path / other).write_text(text)
    found = layouts.find(tmp_path)
    assert (found.source, found.train, found.evaluation) == ("coco", *splits)
    opened = open_parts(found)
    assert not opened.errors and not opened.said
    assert [len(source) for source in opened.sources.values()] == [3, 2]
    seen = inspect(found)
    assert seen.usable and seen.label_names == ("background", "cell")


def test_coco_without_an_object_is_nothing_to_learn_from(tmp_path):
    annotated(tmp_path, "annotations.json", "images", "abcde")
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    found = inspect(layouts.find(tmp_path))
    errors = [f.text for f in found.findings if f.level == "error"]
    assert any("No mask has any foreground" in text for text in errors)
    assert not found.usable


def test_nothing_known_says_what_is_there(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        layouts.find(tmp_path / "nowhere")
    with pytest.raises(InputError, match="it holds nothing"):
        layouts.find(tmp_path)
    write(tmp_path, "cats/a.jpg", "dogs/b.jpg", "a.png", "b.png", "labels.txt")
    with pytest.raises(InputError) as caught:
        layouts.find(tmp_path)
    text = str(caught.value)
    for word in ("folders cats, dogs", "2 .png (such as a.png)", ".txt", "masks/CLASS"):
        assert word in text
    with pytest.raises(InputError, match="is a file"):
        layouts.find(tmp_path / "a.png")


def test_links_that_lead_out_are_refused(tmp_path):
    write(tmp_path / "away", "masks/a.png")
    root = tmp_path / "root"
    write(root, "images/a.png")
    (root / "masks").symlink_to(tmp_path / "away" / "masks")
    found = layouts.find(root)
    with pytest.raises(InputError, match="leads to"):
        listing.files_of(found)
    assert len(listing.files_of(found, links=True).pairs) == 1


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("imagesTr", ("image", "train", True)),
        ("JPEGImages", ("image", "", True)),
        ("SegmentationClass", ("mask", "", True)),
        ("val_masks", ("mask", "val", True)),
        ("image_masks", ("mask", "", False)),
        ("a_x", ("", "", False)),
        ("validation", ("", "val", True)),
        ("stage1_train", ("", "train", False)),
        ("train2017", ("", "train", True)),
        ("instances_val2017", ("", "val", False)),
        ("train2", ("", "", False)),
        ("2017", ("", "", False)),
    ],
)
def test_roles(name, role):
    assert tuple(words.role(name)) == role


def test_names_that_match():
    assert words.match(["a", "b"], ["a", "b"]) == ("*", "*", 2)
    assert words.match(["1", "2", "12"], ["1_m", "2_m", "12_m"]) == ("*", "*_m", 3)
    assert words.match(["i[1]", "i[2]"], ["m[1]", "m[2]"]) == ("i[[]*]", "m[[]*]", 2)
    assert words.match(["a"], ["b"]) is None
    assert words.match([], ["b"]) is None


def test_images_without_masks_are_told_so(tmp_path):
    write(tmp_path, *both("a/images/?.png", "a/masks/?.png"))
    with pytest.raises(
        InputError, match=rf"no masks were found: give {tmp_path / 'a'}"
    ):
        layouts.find(tmp_path / "a" / "images")
    write(tmp_path, "b/images/x.png", "b/images/y.png")
    for place in (tmp_path / "b", tmp_path / "b" / "images"):
        with pytest.raises(InputError, match="put masks of the same names into"):
            layouts.find(place)
