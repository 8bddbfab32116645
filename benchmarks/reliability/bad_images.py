"""Folders of images and masks that nobody can train on, each in its own way."""

import contextlib
import io
import math
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from benchmarks.reliability.case import Case, train_on

Change = Callable[[Path], object]
"""changes a sound data set in a folder"""

SIZE = (16, 16)


def disc(k: int = 0) -> np.ndarray:
    """A mask with something in it, ``u8[16, 16]`` of 0 and 255."""
    mask = np.zeros(SIZE, np.uint8)
    mask[2 + k : 9 + k, 3:11] = 255
    return mask


def picture(k: int = 0) -> np.ndarray:
    """An image of it, ``u8[16, 16]``."""
    noise = np.random.default_rng(k).integers(0, 60, SIZE)
    return (disc(k) // 2 + noise).astype(np.uint8)


def pairs(root: Path) -> None:
    """Four images and their masks, a.png to d.png."""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for k, letter in enumerate("abcd"):
        Image.fromarray(picture(k)).save(root / "images" / f"{letter}.png")
        Image.fromarray(disc(k)).save(root / "masks" / f"{letter}.png")


def halved(path: Path) -> None:
    """Cuts a file in the middle."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def saved(array: np.ndarray, ending: str = ".png", **options: Any) -> bytes:
    """An image file of an array."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, Image.registered_extensions()[ending], **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    """A npy file of an array, pickled where it holds objects."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npy_of(shape: str, descr: str = "|u1") -> bytes:
    """A npy file with such a header and 64 bytes of data."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode() + bytes(64)


def png_of(width: int, height: int, body: bytes = b"\0\1\2\0\3\4") -> bytes:
    """A PNG file that says it has this size, with the pixels of another."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(body)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff_of(array: np.ndarray, **options: Any) -> bytes:
    """A grey TIFF file of an array, its pages along the first of three axes."""
    file = io.BytesIO()
    tifffile.imwrite(file, array, photometric="minisblack", **options)
    return file.getvalue()


def instead(name: str, content: bytes, ending: str = ".png") -> Change:
    """Another content, and if wanted another ending, for a file of the data set.

    Args:
        name: Without its ending, such as ``images/b``.
        content: Of the new file.
        ending: Of the new file.
    """

    def change(root: Path) -> None:
        (root / f"{name}.png").unlink()
        (root / f"{name}{ending}").write_bytes(content)

    return change


class Code:
    """What a pickle can do: leave a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder / "harm"),)


def harmed(folder: Path) -> bool:
    """Whether code in a file has been run."""
    return (folder / "harm").exists()


def _pickled(root: Path) -> None:
    array = np.empty(1, object)
    array[0] = Code(root.parent)
    instead("images/b", npy(array), ".npy")(root)


def _pickle_alone(root: Path) -> None:
    instead("images/b", pickle.dumps(Code(root.parent)), ".npy")(root)


def _leads_out(root: Path, name: str) -> None:
    (root / name).rename(root.parent / "other.png")
    (root / name).symlink_to(root.parent / "other.png")


def _linked(root: Path, name: str, target: str) -> None:
    (root / name).unlink()
    (root / name).symlink_to(target)


def _folder_leads_out(root: Path) -> None:
    (root / "images").rename(root.parent / "images")
    (root / "images").symlink_to(root.parent / "images")


def _without(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _emptied(root: Path, name: str) -> None:
    shutil.rmtree(root / name)
    (root / name).mkdir()


def _folder_called(root: Path, name: str) -> None:
    (root / name).unlink()
    (root / name).mkdir()


def _fifo(root: Path, name: str) -> None:
    (root / name).unlink()
    os.mkfifo(root / name)


def _hidden(root: Path) -> None:
    for path in (root / "images").iterdir():
        path.rename(path.with_name(f".{path.name}"))


def _deeper(root: Path) -> None:
    (root / "images").rename(root / "inner")
    (root / "images").mkdir()
    (root / "inner").rename(root / "images" / "inner")


def _other_ending(root: Path, ending: str) -> None:
    for path in (root / "images").iterdir():
        path.rename(path.with_suffix(ending))


def _renamed(root: Path, name: str | bytes, damaged: bool = True) -> None:
    """Gives a pair another name, and damages its image."""
    for folder in ("images", "masks"):
        old = os.fsencode(root / folder / "b.png")
        new = os.fsencode(root / folder) + b"/" + os.fsencode(name) + b".png"
        os.rename(old, new)
        if damaged and folder == "images":
            # Not every file system has names that are no text.
            with contextlib.suppress(OSError), open(new, "wb") as file:
                file.write(b"no image")


def _locked(root: Path) -> None:
    (root / "images" / "b.png").chmod(0)
    if os.access(root / "images" / "b.png", os.R_OK):  # root may read everything
        halved(root / "images" / "b.png")


def _photos_as_masks(root: Path) -> None:
    for k, path in enumerate(sorted((root / "masks").iterdir())):
        noise = np.random.default_rng(k).integers(0, 256, (*SIZE, 3), np.uint8)
        Image.fromarray(noise).save(path)


def _one_stem(root: Path) -> None:
    shutil.copy(root / "images" / "b.png", root / "images" / "b.tif")


def _two_masks(root: Path) -> None:
    (root / "masks" / "b.npy").write_bytes(npy(disc()))


def _lossy_masks(root: Path) -> None:
    for letter in "abcd":
        instead(f"masks/{letter}", saved(disc(), ".jpg"), ".jpg")(root)


def _nan(value: float) -> bytes:
    array = picture().astype(np.float32)
    array[3, 4] = value
    return npy(array)


RGB, GREY = (np.repeat(picture()[..., None], 3, -1), picture())
WIDE = np.zeros((16, 20), np.uint8)
LARGE = np.zeros((3000, 3000), np.uint8)
B = r"images/b\."

# What is wrong: (what changes a sound data set, what the sentence must have).
FILES: dict[str, tuple[Change, str]] = {
    "empty": (instead("images/b", b""), B),
    "empty jpg": (instead("images/b", b"", ".jpg"), B),
    "empty tif": (instead("images/b", b"", ".tif"), B),
    "empty npy": (instead("images/b", b"", ".npy"), B),
    "empty mask": (instead("masks/b", b""), r"masks/b\.png"),
    "cut short": (lambda d: halved(d / "images/b.png"), B),
    "cut short jpg": (instead("images/b", saved(RGB, ".jpg")[:300], ".jpg"), B),
    "cut short tif": (instead("images/b", tiff_of(GREY)[:-99], ".tif"), B),
    "cut short npy": (instead("images/b", npy(GREY)[:-99], ".npy"), B),
    "cut short bmp": (instead("images/b", saved(GREY, ".bmp")[:-99], ".bmp"), B),
    "cut short gif": (instead("images/b", saved(GREY, ".gif")[:60], ".gif"), B),
    "cut short mask": (lambda d: halved(d / "masks/b.png"), r"masks/b\.png"),
    "only the signature": (instead("images/b", b"\x89PNG\r\n\x1a\n"), B),
    "text": (instead("images/b", b"this is not a picture\n" * 9), B),
    "random bytes": (instead("images/b", np.random.default_rng(0).bytes(999)), B),
    "random bytes as tif": (instead("images/b", b"II*\0\xff" * 99, ".tif"), B),
    "a web page": (instead("images/b", b"<!DOCTYPE html><html>404</html>"), B),
    "a Git LFS pointer": (
        instead("images/b", b"version https://git-lfs.github.com/spec/v1\noid sha256:"),
        B,
    ),
    "a tif called png": (instead("images/b", tiff_of(GREY)), B),
    "a pdf called png": (instead("images/b", b"%PDF-1.4\n1 0 obj\n"), B),
    "a script for Ghostscript": (
        instead("images/b", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        B,
    ),
    "a pipe for a mask": (lambda d: _fifo(d, "masks/b.png"), r"b\.png"),
    "unreadable": (_locked, B),
    "absurd sides": (instead("images/b", png_of(2**31 - 1, 2**31 - 1)), B),
    "a bomb": (instead("images/b", png_of(20000, 20000, bytes(10**6))), B),
    "a tif bomb": (
        instead("images/b", tiff_of(LARGE, compression="zlib")[:999], ".tif"),
        B,
    ),
    "pages": (instead("images/b", tiff_of(np.stack([GREY] * 3)), ".tif"), B),
    "no rows": (instead("images/b", npy(np.zeros((0, 16))), ".npy"), B),
    "no axes": (instead("images/b", npy(np.array(3)), ".npy"), B),
    "one axis": (instead("images/b", npy(np.zeros(9)), ".npy"), B),
    "five axes": (instead("images/b", npy(np.zeros((2,) * 5)), ".npy"), B),
    "absurd shape": (instead("images/b", npy_of("(99999999, 99999999)"), ".npy"), B),
    "negative shape": (instead("images/b", npy_of("(-4, 4)"), ".npy"), B),
    "nan": (instead("images/b", _nan(math.nan), ".npy"), "NaN"),
    "inf": (instead("images/b", _nan(math.inf), ".npy"), "infinite"),
    "complex": (instead("images/b", npy(GREY * 1j), ".npy"), "complex"),
    "texts": (instead("images/b", npy(np.full(SIZE, "x")), ".npy"), B),
    "dates": (instead("images/b", npy(np.zeros(SIZE, "M8[s]")), ".npy"), B),
    "records": (instead("images/b", npy(np.zeros(SIZE, "u1,f4")), ".npy"), B),
    "objects": (_pickled, "Python objects"),
    "a pickle": (_pickle_alone, B),
    "npz called npy": (instead("images/b", b"PK\3\4" + bytes(99), ".npy"), B),
    "another kind of number": (
        instead("images/b", npy(GREY.astype(np.float32)), ".npy"),
        "uint8|float32",
    ),
    "16 bits beside 8": (
        instead("images/b", saved(GREY.astype(np.uint16) * 9)),
        "uint8|uint16",
    ),
    "three channels beside one": (instead("images/b", saved(RGB)), "channel"),
    "two channels of npy": (
        instead("images/b", npy(np.stack([GREY, GREY], -1)), ".npy"),
        "channel",
    ),
    "smaller than its mask": (
        instead("images/b", saved(GREY[:8])),
        r"b\.png.*8 x 16.*16 x 16",
    ),
    "transposed mask": (
        lambda d: (
            instead("images/b", saved(WIDE))(d),
            instead("masks/b", saved(WIDE.T))(d),
        ),
        r"b\.png.*16 x 20.*20 x 16",
    ),
    "link out of the root": (
        lambda d: _leads_out(d, "images/b.png"),
        r"b\.png.*out of",
    ),
    "mask linked out of the root": (
        lambda d: _leads_out(d, "masks/b.png"),
        r"b\.png.*out of",
    ),
    "folder linked out of the root": (_folder_leads_out, "images.*out of"),
    "link to nothing": (lambda d: _linked(d, "images/b.png", "nothing"), r"b\.png"),
    "link to itself": (lambda d: _linked(d, "images/b.png", "b.png"), r"b\.png"),
    "link to endless zeros": (
        lambda d: _linked(d, "masks/b.png", "/dev/zero"),
        r"b\.png",
    ),
    "no mask": (lambda d: _without(d, "masks/b.png"), r"images/b\.png"),
    "no image": (
        lambda d: _without(d, *(f"images/{k}.png" for k in "bcd")),
        "train.*1 example",
    ),
    "two masks": (_two_masks, r"masks/b\."),
    "two images": (_one_stem, r"images/b\."),
    "no images at all": (lambda d: _emptied(d, "images"), "images"),
    "no masks at all": (lambda d: _emptied(d, "masks"), r"images/a\.png|masks"),
    "no folder of images": (lambda d: _without(d, "images"), "images"),
    "no folder of masks": (lambda d: _without(d, "masks"), "masks"),
    "no root": (lambda d: _without(d, "."), "data"),
    "an empty root": (lambda d: _without(d, "images", "masks"), "images|masks"),
    "hidden files only": (_hidden, "images"),
    "a folder too deep": (_deeper, "images"),
    "an unknown format": (lambda d: _other_ending(d, ".heic"), "images"),
    "a name with spaces": (lambda d: _renamed(d, " b  c "), r"images/ b  c \.png"),
    "a name with a line break": (lambda d: _renamed(d, "b\nc"), r"b\\nc\.png"),
    "a name that colours": (lambda d: _renamed(d, "b\033[31m"), r"b\\x1b\[31m"),
    "a name that is no text": (lambda d: _renamed(d, b"b\xff"), r"b.*\.png"),
    "a name with accents": (lambda d: _renamed(d, "b\u0308\u00fc\u6f22"), "\u6f22"),
    "a very long name": (lambda d: _renamed(d, "b" * 251), "bbbb"),
}

# Odd, but nothing that a data set could not be looked at with.
ODD: dict[str, tuple[Change, str]] = {
    "a damaged image": (
        lambda d: halved(d / "images/b.png"),
        r"b\.png\s+cannot\s+be\s+read",
    ),
    "a folder called png": (lambda d: _folder_called(d, "images/b.png"), r"b\.png"),
    "a pipe": (lambda d: _fifo(d, "images/b.png"), r"b\.png"),
    "an image without end": (
        lambda d: _linked(d, "images/b.png", "/dev/zero"),
        r"b\.png",
    ),
    "a name of signs": (
        lambda d: _renamed(d, "-b [1]*", damaged=False),
        "examples: 3 for training",
    ),
    "a name that is no text": (
        lambda d: _renamed(d, b"b\xff", damaged=False),
        "examples: 3 for training",
    ),
    "a name with a line break": (
        lambda d: _renamed(d, "b\nc", damaged=False),
        "examples: 3 for training",
    ),
}

# As FILES, with options of data.folder.
MASKS: dict[str, tuple[Change, dict[str, object], str]] = {
    "unknown value": (
        instead("masks/b", saved(disc() // 255 * 7)),
        {"mask": "index", "label_names": "('a','b')"},
        r"masks/.\.png.*value (7|255)",
    ),
    "greys": (instead("masks/b", saved(GREY)), {"mask": "auto"}, r"masks/|mask"),
    "negative": (
        instead("masks/b", npy(-disc().astype(np.int32)), ".npy"),
        {"mask": "instances"},
        r"masks/b\.npy.*-255",
    ),
    "halves": (
        instead("masks/b", npy(disc() / 510), ".npy"),
        {},
        r"masks/b\.npy.*value 0\.5",
    ),
    "nan": (instead("masks/b", _nan(math.nan), ".npy"), {}, r"masks/b\.npy"),
    "jpg": (_lossy_masks, {}, r"masks/.\.jpg"),
    "colours": (_photos_as_masks, {}, "colour"),
    "a colour for black and white": (
        instead("masks/b", saved(np.dstack([disc(), disc() * 0, disc() * 0]))),
        {"mask": "binary"},
        r"masks/b\.png.*colour",
    ),
    "a colour that is not in the table": (
        instead("masks/b", saved(np.dstack([disc(), disc() * 0, disc() * 0]))),
        {"mask": "colors", "colors": "((0,0,0),(255,255,255))"},
        r"masks/b\.png.*\(255, 0, 0\)",
    ),
    "two channels": (
        instead("masks/b", npy(np.stack([disc(), disc()], -1)), ".npy"),
        {},
        r"masks/b\.npy.*2 channels",
    ),
    "texts": (instead("masks/b", npy(np.full(SIZE, "x")), ".npy"), {}, r"masks/b\.npy"),
    "another size": (instead("masks/b", saved(WIDE)), {}, r"b\.png.*16 x 20"),
    "an unknown reading": (lambda d: None, {"mask": "colours"}, "colours.*colors"),
    "a table of texts": (lambda d: None, {"colors": "('red','green')"}, "colors|red"),
    "a colour of two numbers": (lambda d: None, {"colors": "((0,0),(1,1))"}, "colors"),
    "a colour above 255": (
        lambda d: None,
        {"colors": "((0,0,0),(256,0,0))"},
        "colors.*256|256.*color",
    ),
    "names for another number": (
        lambda d: None,
        {"label_names": "('a','b','c')", "mask": "binary"},
        "label_names",
    ),
    "a name twice": (lambda d: None, {"label_names": "('a','a')"}, "label_names|'a'"),
    "names that are numbers": (lambda d: None, {"label_names": "(1,2)"}, "label_names"),
    "one name as text": (lambda d: None, {"label_names": "cell"}, "label_names"),
    "an image folder above the root": (lambda d: None, {"images": "../x"}, r"\.\."),
    "an absolute image folder": (lambda d: None, {"images": "/usr"}, "/usr"),
    "a broken glob": (lambda d: None, {"images": "[[a-/*.png"}, r"\[\[a-"),
    "a folder of masks that is not there": (lambda d: None, {"masks": "m"}, "m"),
    "channels that cannot be": (lambda d: None, {"channels": 7}, "channels"),
    "negative channels": (lambda d: None, {"channels": -3}, "channels"),
    "labels without folders": (
        lambda d: None,
        {"label_masks": "(('vessel','masks/vessel'),)"},
        "vessel",
    ),
    "labels of one column": (lambda d: None, {"label_masks": "('a','b')"}, "label_mas"),
    "overlapping labels for classes": (
        lambda d: None,
        {"mask": "planes"},
        "task=labels|task",
    ),
    "objects without a folder": (lambda d: None, {"mask": "objects"}, "masks"),
}


def _command(
    folder: Path, change: Change, options: Mapping[str, object] | None = None
) -> list[str]:
    pairs(folder / "data")
    change(folder / "data")
    keys = {f"data__folder__{key}": value for key, value in (options or {}).items()}
    split = {"data__train": "all[:2]", "data__evaluation": "all[2:]"}
    return train_on(folder, "folder", **split, **keys)


def _look(folder: Path, change: Change) -> list[str]:
    pairs(folder / "data")
    change(folder / "data")
    return ["unet-jax", "inspect", str(folder / "data")]


CASES = [
    *(
        Case("image files", name, partial(_command, change=change), says, harmed)
        for name, (change, says) in FILES.items()
    ),
    *(
        Case("masks", name, partial(_command, change=change, options=options), says)
        for name, (change, options, says) in MASKS.items()
    ),
    *(
        Case("odd files", name, partial(_look, change=change), says, works=True)
        for name, (change, says) in ODD.items()
    ),
]
