"""Data sets of the other sources that cannot be right: volumes, CTC, COCO, nnU-Net."""

import gzip
import json
import shutil
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reliability.bad_images import (
    Change,
    disc,
    halved,
    harmed,
    npy,
    npy_of,
    pairs,
    picture,
    tiff_of,
)
from benchmarks.reliability.case import Case, train_on

STACK = np.stack([picture(k) for k in range(4)])
LABELS = np.stack([disc(k) for k in range(4)])


# --- Stacks and volumes --------------------------------------------------------------


def nifti(array: np.ndarray, **fields: Any) -> bytes:
    """A NIfTI file of ``u8[D, H, W]``, with other values in its header.

    Args:
        array: Its voxels.
        fields: ``dim``, ``datatype``, ``pixdim``, ``vox_offset``, ``magic``.
    """
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    dim = (array.ndim, *array.shape, *[1] * (7 - array.ndim))
    struct.pack_into("<8h", header, 40, *fields.get("dim", dim))
    struct.pack_into("<2h", header, 70, *fields.get("datatype", (2, 8)))
    pixdim = fields.get("pixdim", (1.0,) * 8)
    struct.pack_into("<8f", header, 76, *pixdim)
    struct.pack_into("<f", header, 108, fields.get("vox_offset", 352.0))
    header[344:348] = fields.get("magic", b"n+1\0")
    return bytes(header) + array.tobytes(order="F")


def _stacks(root: Path) -> None:
    root.mkdir()
    (root / "train-volume.tif").write_bytes(tiff_of(STACK))
    (root / "train-labels.tif").write_bytes(tiff_of(LABELS))


def _of(image: bytes, mask: bytes | None = None, ending: str = ".tif") -> Change:
    """A volume's file, and its mask's, instead of those there are."""

    def change(root: Path) -> None:
        for name, content in (("volume", image), ("labels", mask)):
            if content is not None:
                (root / f"train-{name}.tif").unlink()
                (root / f"train-{name}{ending}").write_bytes(content)
        if mask is None and ending != ".tif":
            (root / "train-labels.tif").unlink()
            (root / f"train-labels{ending}").write_bytes(image)

    return change


def _nii(**fields: Any) -> Change:
    return _of(nifti(STACK, **fields), nifti(LABELS // 255), ".nii")


NII = {"images": "*-volume.nii", "masks": "*-labels.nii"}
GZ = {"images": "*-volume.nii.gz", "masks": "*-labels.nii.gz"}
NPY = {"images": "*-volume.npy", "masks": "*-labels.npy"}
V = "train-volume"

VOLUMES: dict[str, tuple[Change, Mapping[str, object], str]] = {
    "empty": (_of(b""), {}, rf"{V}\.tif"),
    "text": (_of(b"no stack at all" * 9), {}, rf"{V}\.tif"),
    "cut short": (lambda d: halved(d / f"{V}.tif"), {}, rf"{V}\.tif"),
    "a page less": (
        _of(tiff_of(STACK[:3])),
        {},
        rf"{V}\.tif.*3 x 16 x 16",
    ),
    "pages of half the size": (
        _of(tiff_of(STACK), tiff_of(LABELS[:, :8])),
        {},
        r"train-.*16",
    ),
    "no masks": (lambda d: (d / "train-labels.tif").unlink(), {}, "train-labels"),
    "no images": (lambda d: (d / f"{V}.tif").unlink(), {}, V),
    "no root": (lambda d: shutil.rmtree(d), {}, "data"),
    "a folder": (
        lambda d: ((d / f"{V}.tif").unlink(), (d / f"{V}.tif").mkdir()),
        {},
        V,
    ),
    "one page as volume": (
        _of(tiff_of(STACK[0]), tiff_of(LABELS[0])),
        {"slices": False},
        "crop|page",
    ),
    "two axes of npy": (_of(npy(STACK[0]), ending=".npy"), NPY, rf"{V}\.npy"),
    "five axes of npy": (_of(npy(STACK[None, None]), ending=".npy"), NPY, rf"{V}\.npy"),
    "objects of npy": (
        _of(npy(np.array([{}, []], object)), ending=".npy"),
        NPY,
        rf"{V}\.npy.*Python objects",
    ),
    "absurd npy": (_of(npy_of("(9999999, 99999, 9)"), ending=".npy"), NPY, V),
    "text as NIfTI": (_of(b"x" * 999, ending=".nii"), NII, rf"{V}\.nii|labels\.nii"),
    "a short header": (_of(bytes(99), ending=".nii"), NII, r"train-.*\.nii"),
    "another magic": (_nii(magic=b"abc\0"), NII, rf"{V}\.nii"),
    "negative sizes": (_nii(dim=(3, -4, 16, 16, 1, 1, 1, 1)), NII, rf"{V}\.nii"),
    "no sizes": (_nii(dim=(0,) * 8), NII, rf"{V}\.nii"),
    "a bomb": (_nii(dim=(3, 32767, 32767, 32767, 1, 1, 1, 1)), NII, rf"{V}\.nii"),
    "more than the file": (_nii(dim=(3, 400, 16, 16, 1, 1, 1, 1)), NII, rf"{V}\.nii"),
    "complex voxels": (_nii(datatype=(32, 64)), NII, rf"{V}\.nii"),
    "unknown voxels": (_nii(datatype=(9999, 8)), NII, rf"{V}\.nii"),
    "voxels before the file": (_nii(vox_offset=-5.0), NII, rf"{V}\.nii"),
    "cut short gz": (
        _of(gzip.compress(nifti(STACK))[:-300], ending=".nii.gz"),
        GZ,
        r"train-.*\.nii\.gz",
    ),
    "no gz": (_of(nifti(STACK), ending=".nii.gz"), GZ, r"train-.*\.nii\.gz"),
    "a gz bomb": (
        _of(gzip.compress(nifti(STACK[:1, :4, :4]) + bytes(2**27)), ending=".nii.gz"),
        GZ | {"slices": False},
        r"train-.*\.nii\.gz",
    ),
    "voxels of nan": (
        _of(nifti(STACK, pixdim=(np.nan,) * 8), nifti(LABELS // 255), ".nii"),
        NII | {"slices": False, "spacing": "(1.,1.,1.)"},
        rf"{V}|spacing",
    ),
    "spacing of slices": (lambda d: None, {"spacing": "(1.,1.,1.)"}, "slices=False"),
    "spacing of two": (
        lambda d: None,
        {"spacing": "(1.,1.)", "slices": False},
        "three positive",
    ),
    "spacing of nan": (
        _nii(),
        NII | {"spacing": "(float('nan'),1.,1.)", "slices": False},
        "spacing",
    ),
    "spacing of texts": (
        lambda d: None,
        {"spacing": "('a','b','c')", "slices": False},
        "spacing",
    ),
    "a spacing too fine": (
        _nii(),
        NII | {"spacing": "(1e-12,1e-12,1e-12)", "slices": False},
        "spacing|fit this machine",
    ),
    "spacing of TIFF": (
        lambda d: None,
        {"spacing": "(1.,1.,1.)", "slices": False},
        "voxel size",
    ),
}


# --- Cell Tracking Challenge ---------------------------------------------------------


def _ctc(root: Path) -> None:
    for sequence in ("01", "02"):
        masks = root / f"{sequence}_GT" / "SEG"
        masks.mkdir(parents=True)
        (root / sequence).mkdir()
        for t in range(2):
            (root / sequence / f"t{t:03}.tif").write_bytes(tiff_of(picture(t)))
            mask = (disc(t) // 255).astype(np.uint16)
            (masks / f"man_seg{t:03}.tif").write_bytes(tiff_of(mask))


def _moved(root: Path, old: str, new: str) -> None:
    (root / old).rename(root / new)


def _put(root: Path, name: str, content: bytes) -> None:
    (root / name).write_bytes(content)


CTC: dict[str, tuple[Change, Mapping[str, object], str]] = {
    "no sequence": (lambda d: shutil.rmtree(d / "01"), {}, "01"),
    "no truth": (lambda d: shutil.rmtree(d / "01_GT"), {}, "01_GT"),
    "no masks": (lambda d: shutil.rmtree(d / "01_GT/SEG"), {}, "01_GT"),
    "an image missing": (lambda d: (d / "01/t001.tif").unlink(), {}, "man_seg001|t001"),
    "odd names of frames": (
        lambda d: _moved(d, "01/t001.tif", "01/frame one.tif"),
        {},
        "man_seg001|t001",
    ),
    "odd names of masks": (
        lambda d: [
            _moved(d, f"01_GT/SEG/man_seg00{t}.tif", f"01_GT/SEG/mask{t}.tif")
            for t in range(2)
        ],
        {},
        "01_GT",
    ),
    "a damaged frame": (lambda d: halved(d / "01/t001.tif"), {}, r"01/t001\.tif"),
    "a damaged mask": (
        lambda d: halved(d / "01_GT/SEG/man_seg001.tif"),
        {},
        r"man_seg001\.tif",
    ),
    "an empty frame": (lambda d: _put(d, "01/t001.tif", b""), {}, r"01/t001\.tif"),
    "another size": (
        lambda d: _put(d, "01/t001.tif", tiff_of(picture()[:8])),
        {},
        r"t001\.tif.*8 x 16",
    ),
    "a mask of a page that is not there": (
        lambda d: _moved(
            d, "01_GT/SEG/man_seg001.tif", "01_GT/SEG/man_seg_001_007.tif"
        ),
        {},
        "man_seg_001_007",
    ),
    "halves in a mask": (
        lambda d: _put(d, "01_GT/SEG/man_seg001.tif", tiff_of(disc() / 510)),
        {},
        r"man_seg001\.tif",
    ),
    "another truth": (lambda d: None, {"truth": "XX"}, "XX"),
    "three names": (
        lambda d: None,
        {"label_names": "('a','b','c')"},
        "label_names|two",
    ),
    "spacing of three": (lambda d: None, {"spacing": "(1.,1.,1.)"}, "spacing"),
    "negative distance": (lambda d: None, {"unknown": -1.0}, "unknown"),
}


# --- COCO ----------------------------------------------------------------------------


def _coco_content() -> dict[str, Any]:
    outline = [[2.0, 2.0, 9.0, 2.0, 9.0, 9.0, 2.0, 9.0]]
    return {
        "images": [
            {"id": k, "file_name": f"{letter}.png", "height": 16, "width": 16}
            for k, letter in enumerate("abcd")
        ],
        "annotations": [
            {"id": k, "image_id": k, "category_id": 1, "segmentation": outline}
            for k in range(4)
        ],
        "categories": [{"id": 1, "name": "cell"}],
    }


def _coco(root: Path) -> None:
    pairs(root)
    (root / "annotations.json").write_text(json.dumps(_coco_content()))


def _said(
    *path: str | int, to: object, content: Callable[[], Any]
) -> Callable[[], Any]:
    """A content of JSON with another entry; ... removes it."""

    def changed() -> Any:
        found = content()
        place = found
        for key in path[:-1]:
            place = place[key]
        if to is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = to
        return found

    return changed


def _json(name: str, content: Callable[[], Any]) -> Change:
    return lambda root: (root / name).write_text(json.dumps(content()))


def _coco_with(*path: str | int, to: object) -> Change:
    return _json("annotations.json", _said(*path, to=to, content=_coco_content))


def _coco_raw(content: bytes) -> Change:
    return lambda root: (root / "annotations.json").write_bytes(content)


def _rle(size: object, counts: object) -> Change:
    runs = {"size": size, "counts": counts}
    return _coco_with("annotations", 1, "segmentation", to=runs)


IMAGE, NOTE = r"images\[1\]", r"annotations\[1\]"
J = r"annotations\.json"

COCO: dict[str, tuple[Change, Mapping[str, object], str]] = {
    "no file": (lambda d: (d / "annotations.json").unlink(), {}, "data"),
    "empty": (_coco_raw(b""), {}, J),
    "no JSON": (_coco_raw(b"{'images': []}"), {}, J),
    "cut short": (lambda d: halved(d / "annotations.json"), {}, J),
    "UTF-16": (_coco_raw(json.dumps(_coco_content()).encode("utf-16")), {}, J),
    "deep": (_coco_raw(b"[" * 99999), {}, J),
    "a long number": (_coco_raw(b'{"images": ' + b"9" * 9999 + b"}"), {}, J),
    "a list": (_coco_raw(b"[]"), {}, J),
    "no images": (_coco_with("images", to=...), {}, "list `images`"),
    "no annotations": (_coco_with("annotations", to=...), {}, "`annotations`"),
    "no categories": (_coco_with("categories", to=[]), {}, "categories"),
    "images of texts": (_coco_with("images", 1, to="b.png"), {}, IMAGE),
    "no file name": (_coco_with("images", 1, "file_name", to=...), {}, IMAGE),
    "a name that leads out": (
        _coco_with("images", 1, "file_name", to="../../secret.png"),
        {},
        rf"{IMAGE}.*leads out",
    ),
    "an absolute name": (
        _coco_with("images", 1, "file_name", to="/etc/passwd"),
        {},
        rf"{IMAGE}.*leads out",
    ),
    "a name of Windows": (
        _coco_with("images", 1, "file_name", to="C:\\a\\b.png"),
        {},
        rf"{IMAGE}.*leads out",
    ),
    "a name with a zero": (
        _coco_with("images", 1, "file_name", to="b\0.png"),
        {},
        IMAGE,
    ),
    "a name that is no text": (
        _coco_with("images", 1, "file_name", to="\ud800.png"),
        {},
        IMAGE,
    ),
    "a name too long": (
        _coco_with("images", 1, "file_name", to="b" * 9999 + ".png"),
        {},
        IMAGE,
    ),
    "a file that is not there": (
        _coco_with("images", 1, "file_name", to="x.png"),
        {},
        r"x\.png",
    ),
    "another size": (_coco_with("images", 1, "height", to=99), {}, r"b\.png.*99"),
    "a negative size": (_coco_with("images", 1, "height", to=-16), {}, IMAGE),
    "an id twice": (_coco_with("images", 1, "id", to=0), {}, IMAGE),
    "an id that is a list": (_coco_with("images", 1, "id", to=[1]), {}, IMAGE),
    "an unknown image": (_coco_with("annotations", 1, "image_id", to=77), {}, NOTE),
    "an unknown category": (
        _coco_with("annotations", 1, "category_id", to=77),
        {},
        f"{NOTE}.*77",
    ),
    "a category twice": (
        _coco_with("categories", to=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]),
        {},
        r"categories\[1\]",
    ),
    "no outline": (_coco_with("annotations", 1, "segmentation", to=[]), {}, NOTE),
    "two points": (
        _coco_with("annotations", 1, "segmentation", to=[[1, 2, 3, 4]]),
        {},
        NOTE,
    ),
    "texts for numbers": (
        _coco_with("annotations", 1, "segmentation", to=[["a"] * 6]),
        {},
        NOTE,
    ),
    "a corner of nan": (
        _coco_with("annotations", 1, "segmentation", to=[[1, 2, 3, 4, 5, np.nan]]),
        {},
        NOTE,
    ),
    "a corner far away": (
        _coco_with("annotations", 1, "segmentation", to=[[1, 2, 3, 4, 5, 1e30]]),
        {},
        NOTE,
    ),
    "runs of another size": (_rle([16, 99], [16 * 99]), {}, "16 x 99"),
    "runs that do not add up": (_rle([16, 16], [5]), {}, NOTE),
    "runs that fill the memory": (_rle([10**9, 10**9], [10**18]), {}, "1000000000"),
    "runs of no text": (_rle([16, 16], "\u00e9!!"), {}, NOTE),
    "runs without a size": (_rle(None, [256]), {}, NOTE),
    "a category that is not there": (lambda d: None, {"label_names": "('x',)"}, "'x'"),
    "another folder": (lambda d: None, {"images": "nowhere"}, "nowhere"),
    "another JSON": (lambda d: None, {"annotations": "x.json"}, r"x\.json"),
    "overlap for classes": (lambda d: None, {"overlap": True}, "task"),
}


# --- nnU-Net -------------------------------------------------------------------------


def _nn_content() -> dict[str, Any]:
    return {
        "channel_names": {"0": "CT", "1": "PET"},
        "labels": {"background": 0, "liver": 1},
        "numTraining": 2,
        "file_ending": ".nii",
    }


def _nn(root: Path) -> None:
    (root / "imagesTr").mkdir(parents=True)
    (root / "labelsTr").mkdir()
    for case in ("a", "b"):
        for k in range(2):
            (root / f"imagesTr/{case}_{k:04}.nii").write_bytes(nifti(STACK))
        (root / f"labelsTr/{case}.nii").write_bytes(nifti(LABELS // 255))
    (root / "dataset.json").write_text(json.dumps(_nn_content()))


def _nn_with(*path: str | int, to: object) -> Change:
    return _json("dataset.json", _said(*path, to=to, content=_nn_content))


NNUNET: dict[str, tuple[Change, Mapping[str, object], str]] = {
    "no dataset.json": (lambda d: (d / "dataset.json").unlink(), {}, r"dataset\.json"),
    "no JSON": (lambda d: _put(d, "dataset.json", b"{"), {}, r"dataset\.json"),
    "a list": (lambda d: _put(d, "dataset.json", b"[]"), {}, r"dataset\.json"),
    "no channels": (_nn_with("channel_names", to=...), {}, "channels"),
    "channels from 1 on": (_nn_with("channel_names", to={"1": "CT"}), {}, "from 0"),
    "no labels": (_nn_with("labels", to=...), {}, "labels"),
    "a label of text": (_nn_with("labels", "liver", to="x"), {}, "liver"),
    "a negative label": (_nn_with("labels", "liver", to=-1), {}, "liver"),
    "an absurd label": (_nn_with("labels", "liver", to=10**12), {}, "liver"),
    "one number for two labels": (_nn_with("labels", "x", to=1), {}, "'x'"),
    "labels that the files do not have": (
        _nn_with("labels", to={"background": 0, "liver": 2}),
        {},
        r"labelsTr/.\.nii.*value 1",
    ),
    "an unknown ending": (_nn_with("file_ending", to=".mha"), {}, r"\.mha"),
    "another ending": (_nn_with("file_ending", to=".tif"), {}, r"\.tif"),
    "an ending that leads out": (_nn_with("file_ending", to="/../x.nii"), {}, "ending"),
    "names that lead out": (
        _nn_with("training", to=[{"image": "../x.nii", "label": "../y.nii"}]),
        {},
        "leads out",
    ),
    "training of texts": (_nn_with("training", to=["a.nii"]), {}, r"training\[0\]"),
    "a channel missing": (
        lambda d: (d / "imagesTr/a_0000.nii").unlink(),
        {},
        r"a_0001\.nii",
    ),
    "a label missing": (lambda d: (d / "labelsTr/b.nii").unlink(), {}, r"b\.nii"),
    "no images": (lambda d: shutil.rmtree(d / "imagesTr"), {}, "imagesTr"),
    "a damaged channel": (lambda d: halved(d / "imagesTr/a_0001.nii"), {}, "a_0001"),
    "channels of two sizes": (
        lambda d: _put(d, "imagesTr/a_0001.nii", nifti(STACK[:2])),
        {},
        r"a_0000.*a_0001",
    ),
    "channels at two places": (
        lambda d: _put(
            d, "imagesTr/a_0001.nii", nifti(STACK, pixdim=(1.0, *[3.0] * 7))
        ),
        {},
        r"a_0000.*a_0001",
    ),
    "a label of another size": (
        lambda d: _put(d, "labelsTr/a.nii", nifti(LABELS[:2] // 255)),
        {},
        r"a_0000.*labelsTr/a\.nii",
    ),
    "a crop of two axes": (lambda d: None, {}, r"train\.crop"),
    "regions for classes": (lambda d: None, {"regions": True}, "task"),
    "a spacing of texts": (lambda d: None, {"spacing": "('a',2,3)"}, "spacing"),
}

# --- TensorFlow Datasets -------------------------------------------------------------

TFDS: dict[str, tuple[Change, Mapping[str, object], str]] = {
    "an unknown name": (lambda d: None, {"name": "no_such_set_at_all"}, "no_such_set"),
    "no name": (lambda d: None, {}, r"tfds\.name|name"),
    "a name that leads out": (lambda d: None, {"name": "../../x"}, r"\.\./\.\./x"),
}


def _command(
    folder: Path,
    source: str,
    make: Change,
    change: Change,
    options: Mapping[str, object],
    split: tuple[str, str],
) -> list[str]:
    make(folder / "data")
    change(folder / "data")
    keys = {f"data__{source}__{key}": value for key, value in options.items()}
    parts = {"data__train": split[0], "data__evaluation": split[1]}
    return train_on(folder, source, **parts, **keys)


def _cases(
    kind: str,
    source: str,
    table: Mapping[str, tuple[Change, Mapping[str, object], str]],
    make: Change,
    split: tuple[str, str],
) -> list[Case]:
    fixed: dict[str, Any] = {"source": source, "make": make, "split": split}
    return [
        Case(kind, name, partial(_command, change=c, options=o, **fixed), says, harmed)
        for name, (c, o, says) in table.items()
    ]


CASES = [
    *_cases("volumes", "volumes", VOLUMES, _stacks, ("all", "all")),
    *_cases("CTC", "ctc", CTC, _ctc, ("01", "02")),
    *_cases("COCO", "coco", COCO, _coco, ("all[:2]", "all[2:]")),
    *_cases("nnU-Net", "nnunet", NNUNET, _nn, ("all[:1]", "all[1:]")),
    *_cases("TFDS", "tfds", TFDS, Path.mkdir, ("train", "test")),
]
