"""unet_jax.data.nnunet and nnunet_json: data sets with a dataset.json, written here."""

import json
import logging
import math
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image

from unet_jax import data
from unet_jax.data import nnunet, source, volumes
from unet_jax.data.source import NoInstances
from unet_jax.types import InputError

AFFINE = np.diag([2.0, 1.0, 0.5, 1.0])
LABELS = {"background": 0, "liver": 5, "cyst": 2}
V2 = {"channel_names": {"0": "CT", "1": "PET"}, "labels": LABELS, "numTraining": 3}
V2["file_ending"] = ".nii.gz"


def nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def write(
    root: Path,
    what: object = V2,
    *,
    values: tuple = (0, 2, 5),
    images: str = "{name}_{k:04}",
    count: int = 3,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The cases a0 ... of two channels, and dataset.json; returns images and labels."""
    rng = np.random.default_rng(1)
    root.mkdir(exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(what))
    everything, labels = [], []
    for i in range(count):
        array = rng.random((4 + i, 6, 5, 2), np.float32)
        label = rng.choice(np.asarray(values, np.uint8), array.shape[:3])
        for k in range(2):
            name = images.format(name=f"a{i}", k=k)
            nifti(root / "imagesTr" / f"{name}.nii.gz", array[..., k])
        nifti(root / "labelsTr" / f"a{i}.nii.gz", label)
        everything.append(array)
        labels.append(label)
    return everything, labels


def change(**entries: object) -> dict:
    """dataset.json with other entries; ... removes one."""
    return {k: v for k, v in {**V2, **entries}.items() if v is not ...}


def rows(image: str, label: str = "./labelsTr/a{}.nii.gz", count: int = 3) -> list:
    return [{"image": image.format(i), "label": label.format(i)} for i in range(count)]


def open_(root: Path, split: str = "train", **options: object) -> nnunet.NnUNet:
    return nnunet.open(root=root, split=split, **options)


# ---- the conventions


def test_nnunet_2(tmp_path):
    images, labels = write(tmp_path)
    found = open_(tmp_path, "train[1:]")
    assert [found.name(i) for i in range(len(found))] == [
        f"imagesTr/a{i}_0000.nii.gz" for i in (1, 2)
    ]
    # Numbers with gaps become classes in their order, whatever that of the names is.
    assert found.label_names == ("background", "cyst", "liver")
    assert found.channels_named == ("CT", "PET") and not found.overlapping
    assert found.size(1) == (6, 6, 5)
    for i in range(2):
        example = found[i]
        np.testing.assert_array_equal(example["image"], images[i + 1])
        ids = np.searchsorted([0, 2, 5], labels[i + 1])
        np.testing.assert_array_equal(example["label"], ids)
        assert example["label"].dtype == np.uint8 and "weight" not in example
    with pytest.raises(NoInstances):
        source.instances(found, 0)


def test_nnunet_2_with_a_list_of_files(tmp_path):
    images, _ = write(tmp_path, images="{name}-{k}")
    listed = {
        f"case{i}": {
            "images": [f"imagesTr/a{i}-{k}.nii.gz" for k in (1, 0)],
            "label": f"labelsTr/a{i}.nii.gz",
        }
        for i in (0, 2)
    }
    what = change(dataset=listed, numTraining=2)
    (tmp_path / "dataset.json").write_text(json.dumps(what))
    found = open_(tmp_path, "all")
    assert len(found) == 2
    np.testing.assert_array_equal(found[1]["image"], images[2][..., ::-1])


def test_decathlon_and_nnunet_1(tmp_path):
    what = {
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "5": "PZ", "2": "TZ"},
        "training": rows("./imagesTr/a{}.nii.gz"),
        "test": ["./imagesTs/b.nii.gz"],
    }
    images, _ = write(tmp_path, what)
    first = open_(tmp_path)
    assert first.label_names == ("background", "TZ", "PZ")
    assert first.channels_named == ("T2", "ADC")
    for i, image in enumerate(images):
        np.testing.assert_array_equal(first[i]["image"], image)
    for k in range(2):
        for path in (tmp_path / "imagesTr").glob(f"*_000{k}.nii.gz"):
            path.unlink()
    for i, image in enumerate(images):
        nifti(tmp_path / "imagesTr" / f"a{i}.nii.gz", image)
    # The Decathlon keeps all channels in one file.
    second = open_(tmp_path)
    for i, image in enumerate(images):
        np.testing.assert_array_equal(second[i]["image"], image)
        assert second.name(i) == f"imagesTr/a{i}.nii.gz"


def test_ignored_pixels(tmp_path):
    what = change(labels={**LABELS, "ignore": 6})
    _, labels = write(tmp_path, what, values=(0, 2, 5, 6))
    example = open_(tmp_path)[1]
    np.testing.assert_array_equal(example["weight"], labels[1] != 6)
    known = example["weight"] > 0
    ids = np.searchsorted([0, 2, 5], labels[1][known])
    np.testing.assert_array_equal(example["label"][known], ids)
    regions = open_(tmp_path, regions=True)[1]
    np.testing.assert_array_equal(regions["weight"], labels[1] != 6)
    assert regions["label"][~known].max() == 0


def test_regions(tmp_path):
    what = change(
        labels={"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3},
        regions_class_order=[1, 2, 3],
    )
    _, labels = write(tmp_path, what, values=(0, 1, 2, 3))
    found = open_(tmp_path)
    assert found.overlapping and found.label_names == ("whole", "core", "enhancing")
    expected = labels[0][..., None] >= np.asarray([1, 2, 3])
    np.testing.assert_array_equal(found[0]["label"], expected)
    assert found[0]["label"].dtype == np.uint8
    classes = open_(tmp_path, regions=False)
    assert classes.label_names == ("background", "class_1", "class_2", "enhancing")
    np.testing.assert_array_equal(classes[0]["label"], labels[0])
    (tmp_path / "dataset.json").write_text(json.dumps(V2))
    with pytest.raises(InputError, match=r"has the value [13], .* labels 0, 2, 5:"):
        open_(tmp_path)[0]
    write(tmp_path)
    planes = open_(tmp_path, regions=True)
    assert planes.label_names == ("liver", "cyst")
    np.testing.assert_array_equal(
        planes[2]["label"].sum(-1), open_(tmp_path)[2]["label"] > 0
    )


def test_build(tmp_path):
    write(tmp_path)
    parts = {"train": "all[not fold 3/3]", "evaluation": "all[fold 3/3]"}
    found = data.build(source="nnunet", task="classes", root=str(tmp_path), **parts)
    assert found.label_names == ("background", "cyst", "liver")
    assert (found.channels, found.rank, len(found.train)) == (2, 3, 2)
    found = data.build(
        source="nnunet",
        task="labels",
        root=str(tmp_path),
        nnunet={"regions": True, "slices": True},
        **parts,
    )
    assert found.label_names == ("liver", "cyst") and found.rank == 2
    assert found.train[0]["label"].shape == (6, 5, 2)


# ---- slices, voxel sizes, flat images


def test_slices_of_a_case_stay_together(tmp_path):
    write(tmp_path)
    whole = open_(tmp_path)
    train = open_(tmp_path, "train[:2]", slices=True)
    rest = open_(tmp_path, "train[2:]", slices=True)
    assert (len(train), len(rest)) == (4 + 5, 6)
    assert train.name(6) == "imagesTr/a1_0000.nii.gz[2]" and train.size(6) == (6, 5)
    for key in ("image", "label"):
        np.testing.assert_array_equal(train[6][key], whole[1][key][2])


def test_spacing(tmp_path):
    write(tmp_path, change(labels={**LABELS, "ignore": 6}), values=(0, 2, 5, 6))
    found = open_(tmp_path, spacing=(1, 1, 1))
    like = volumes.open(
        root=tmp_path,
        split="train",
        images="imagesTr/*_0001.nii.gz",
        masks="labelsTr/*.nii.gz",
        slices=False,
        spacing=(1, 1, 1),
        mask="index",
        label_names=tuple("abcdef"),
        ignore=6,
    )
    for i in range(3):
        assert found.size(i) == like.size(i) == (2 * (4 + i), 6, round(5 / 2))
        np.testing.assert_array_equal(found[i]["image"][..., 1:], like[i]["image"])
        np.testing.assert_array_equal(found[i]["weight"], like[i]["weight"])
        numbers = np.asarray([0, 2, 5])[found[i]["label"]]
        np.testing.assert_array_equal(numbers, like[i]["label"])
    for options in ({"slices": True}, {"spacing": (1, 1)}, {"spacing": (1, 0, 1)}):
        with pytest.raises(InputError, match="needs slices=False and three positive"):
            open_(tmp_path, **{"spacing": (1, 1, 1), **options})


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_flat_images(tmp_path, rng, ending):
    names = {"0": "R", "1": "G", "2": "B"}
    what = change(file_ending=ending, channel_names=names, numTraining=2)
    for i in range(2):
        image = rng.integers(0, 256, (6 + i, 8, 3), np.uint8)
        label = rng.choice(np.asarray([0, 2, 5], np.uint8), image.shape[:2])
        for folder, name, array in (
            ("imagesTr", f"c{i}_0000", image),
            ("labelsTr", f"c{i}", label),
        ):
            path = tmp_path / folder / f"{name}{ending}"
            path.parent.mkdir(exist_ok=True)
            if ending == ".png":
                Image.fromarray(array).save(path)
            else:
                colour = "rgb" if array.ndim == 3 else "minisblack"
                tifffile.imwrite(path, array, photometric=colour)
    (tmp_path / "dataset.json").write_text(json.dumps(what))
    found = open_(tmp_path)
    assert found.size(1) == (7, 8)
    np.testing.assert_array_equal(found[1]["image"], image)
    np.testing.assert_array_equal(found[1]["label"], np.searchsorted([0, 2, 5], label))
    with pytest.raises(InputError, match="flat image and has no slices"):
        open_(tmp_path, slices=True)
    with pytest.raises(InputError, match="does not say its voxel size"):
        open_(tmp_path, spacing=(1, 1, 1))
    names["3"] = "A"
    (tmp_path / "dataset.json").write_text(json.dumps(what))
    with pytest.raises(InputError, match=r"c0_0000.* has 3 channels, but .* names 4"):
        open_(tmp_path)[0]


def test_tiff_volumes(tmp_path, rng):
    what = change(file_ending=".tif", channel_names={"0": "EM"}, numTraining=1)
    (tmp_path / "dataset.json").write_text(json.dumps(what))
    array = rng.integers(0, 256, (3, 6, 8), np.uint8)
    for path, pages in (("imagesTr/a_0000.tif", array), ("labelsTr/a.tif", array * 0)):
        (tmp_path / path).parent.mkdir()
        tifffile.imwrite(tmp_path / path, pages, photometric="minisblack")
    found = open_(tmp_path)
    assert found.size(0) == (3, 6, 8)
    np.testing.assert_array_equal(found[0]["image"][..., 0], array)


# ---- what is wrong


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ([], "holds no object"),
        (change(channel_names=...), "names no channels"),
        (change(channel_names={"1": "CT"}), "not numbered from 0"),
        (change(labels=...), "has no `labels`"),
        (change(labels={"background": 0}), "no label beside the background"),
        (change(labels={**LABELS, "ignore": 5}), "not one number of its own"),
        (change(labels={**LABELS, "other": 5}), "the label 5 both 'liver' and 'other'"),
        (change(labels={"0": "a", "1": "b", "2": "b"}), "name 'b', which is none or"),
        (change(labels={**LABELS, "x": -1}), r"label 'x' the number \(-1,\)"),
        (change(labels={**LABELS, "x": 10**9}), "whole numbers from 0 to 65534"),
        (change(labels={**LABELS, "x": "6"}), r"label 'x' the number \('6',\)"),
        (change(file_ending=".mha"), r"file_ending='.mha'"),
        (change(file_ending=".nii"), "holds no files such as CASE_0000.nii"),
        (change(training=rows("a{}.mha", count=1)), "of no format that can be read"),
        (change(training=rows("../a{}.nii.gz")), r"training\[0\] .*leads out of"),
        (change(training=[{"image": "a.nii"}]), r"training\[0\] names no file"),
        (change(training=["a.nii"]), r"training\[0\] names no file"),
        (change(training=rows("b{}.nii.gz")), "b0.nii.gz does not exist, but the case"),
        (change(channel_names={"0": "a", "1": "b", "2": "c"}), "2 files, but .* 3 ch"),
        (change(training=rows("imagesTr/a{}.nii.gz") * 2), "the case a0 twice"),
    ],
)
def test_broken_dataset_json(tmp_path, what, match):
    write(tmp_path, what)
    with pytest.raises(InputError, match=match) as refused:
        open_(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_splits(tmp_path):
    write(tmp_path)
    with pytest.raises(InputError, match=r"'test': its test cases have no labels"):
        open_(tmp_path, "test")
    with pytest.raises(InputError, match=r"'val': name a part of its training cases"):
        open_(tmp_path, "val")
    with pytest.raises(InputError, match=r"dataset\.json does not exist: set data\.ro"):
        open_(tmp_path / "labelsTr")


def break_case(root: Path, how: str) -> None:
    """Makes the case a1 a faulty one."""
    image, label = root / "imagesTr" / "a1_0001.nii.gz", root / "labelsTr" / "a1.nii.gz"
    array = np.zeros((5, 6, 5), np.float32)
    if how == "label":
        label.unlink()
    elif how == "channel":
        (root / "imagesTr" / "a1_0000.nii.gz").unlink()
    elif how == "size":
        nifti(image, array[1:])
    elif how == "place":
        nifti(image, array, np.diag([2.0, 1.0, 0.6, 1.0]))
    elif how == "label size":
        nifti(label, array[1:])
    else:
        image.write_bytes(b"no NIfTI")


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("label", r"a1_0000\.nii\.gz has no label .*a1\.nii\.gz"),
        ("channel", r"a1_0001\.nii\.gz has no other channel before it"),
        ("size", r"a1_0000.* 5 x 6 x 5, but the channel .*a1_0001.* 4 x 6 x 5"),
        ("place", r"a1_0000.* and .*a1_0001.* lie at different places"),
        ("label size", r"a1_0000.* 5 x 6 x 5, but its mask .*a1\.nii\.gz 4 x 6 x 5"),
        ("damaged", r"a1_0001\.nii\.gz cannot be read"),
    ],
)
def test_broken_cases(tmp_path, caplog, how, match):
    write(tmp_path)
    break_case(tmp_path, how)
    with pytest.raises(InputError, match=match):
        open_(tmp_path)
    with caplog.at_level(logging.WARNING):
        found = open_(tmp_path, on_error="skip")
    assert [found.name(i)[9:11] for i in range(len(found))] == ["a0", "a2"]
    assert len(caplog.messages) == 1 and "1 faulty case of" in caplog.text
    for i in (0, 2):
        (tmp_path / "labelsTr" / f"a{i}.nii.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"All cases of .* are faulty, 3 in number"):
        open_(tmp_path, on_error="skip")


def test_labels_that_lie_elsewhere_are_told(tmp_path, caplog):
    _, labels = write(tmp_path, change(numTraining=5))
    for i in (1, 2):
        moved = AFFINE + np.eye(4)[[2]].T * [0, 0, 0, 3]
        nifti(tmp_path / "labelsTr" / f"a{i}.nii.gz", labels[i], moved)
    with caplog.at_level(logging.WARNING):
        open_(tmp_path)
    first, second = caplog.messages
    assert "says 5 cases, but there are 3" in first
    assert "2 cases, such as a1, lie elsewhere" in second


def test_links(tmp_path):
    write(tmp_path / "other")
    root = tmp_path / "root"
    root.mkdir()
    (root / "dataset.json").write_text(json.dumps(V2))
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).symlink_to(tmp_path / "other" / folder)
    with pytest.raises(InputError, match=r"set data\.links=True"):
        open_(root, on_error="skip")
    assert len(open_(root, links=True)) == 3


NASTY = [None, True, -1, 2**70, 1e308, math.nan, "", "x" * 300, "\0", "\ud800"]
NASTY += [[], [[]], {}, [{}]]


def test_nothing_but_sentences(tmp_path):
    """Whatever stands anywhere in the file, opening it works or ends in InputError."""
    write(tmp_path)
    listed = {"a0": {"images": ["imagesTr/a0_0000.nii.gz"], "label": "labelsTr/a0.nii"}}
    forms = [V2, change(training=rows("imagesTr/a{}.nii.gz")), change(dataset=listed)]
    forms.append(change(labels={"0": "a", "2": "b", "5": "c"}))
    worked = 0
    for form in forms:
        for path in paths(form)[1:]:
            for nasty in NASTY:
                what = json.loads(json.dumps(form))
                place = what
                for key in path[:-1]:
                    place = place[key]
                place[path[-1]] = nasty
                (tmp_path / "dataset.json").write_text(json.dumps(what))
                try:
                    worked += len(open_(tmp_path, "train[:1]")) > 0
                except InputError as error:
                    assert len(str(error)) < 1500
    assert worked > 20


def paths(node: object, at: tuple = ()) -> list[tuple]:
    items = node.items() if isinstance(node, dict) else ()
    items = enumerate(node) if isinstance(node, list) else items
    return [at, *(path for key, child in items for path in paths(child, (*at, key)))]


# ---- the real hippocampi


def hippocampi() -> Path:
    here = Path(__file__).resolve().parents[1]
    place = os.environ.get("UNET_JAX_DATA", here.parent / "shared" / "data")
    if not (Path(place) / "msd_hippocampus").is_dir():
        pytest.skip(f"{place} is not there (set UNET_JAX_DATA)")
    return Path(place) / "msd_hippocampus"


@pytest.mark.parametrize("version", [1, 2])
def test_hippocampus(tmp_path, version):
    """As the Decathlon describes it, and as nnU-Net 2 converts it."""
    names = sorted(p.name for p in (hippocampi() / "imagesTr").glob("h*.nii.gz"))[:4]
    what: dict = {"modality": {"0": "MRI"}, "numTraining": len(names)}
    what["labels"] = {"0": "background", "1": "Anterior", "2": "Posterior"}
    what["training"] = [
        {"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names
    ]
    if version == 2:
        what = {"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"}
        what["labels"] = {"background": 0, "Anterior": 1, "Posterior": 2}
        what["numTraining"] = len(names)
    (tmp_path / "dataset.json").write_text(json.dumps(what))
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
        for name in names:
            channel = folder == "imagesTr" and version == 2
            ours = name.replace(".", "_0000.", 1) if channel else name
            (tmp_path / folder / ours).symlink_to(hippocampi() / folder / name)
    found = open_(tmp_path, links=True)
    like = volumes.open(
        root=hippocampi(),
        split=f"all[:{len(names)}]",
        images="imagesTr",
        masks="labelsTr",
        slices=False,
        mask="index",
        label_names=("background", "Anterior", "Posterior"),
    )
    assert found.label_names == like.label_names and len(found) == len(like)
    assert found.channels_named == ("MRI",)
    for i in range(len(found)):
        assert found.size(i) == like.size(i)
        for key in ("image", "label"):
            np.testing.assert_array_equal(found[i][key], like[i][key])
