"""Files as no one would write them, and as anyone might: read, or one sentence."""

import io
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from unet_jax.data import images, masks, stacks
from unet_jax.types import InputError, NumpyArray

FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)
# A damaged header is believed where it says no more than Pillow decodes safely.
MOST = 2**28

# ---- damage


def by_pillow(**options: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        array = np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8)
        image = Image.fromarray(array[..., 0] if options.pop("grey", 0) else array)
        image.save(path, **options)

    return write


def by_tifffile(shape: tuple[int, ...], **options: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        array = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint16)
        tifffile.imwrite(path, array, **options)

    return write


def by_numpy(path: Path) -> None:
    np.save(path, np.random.default_rng(0).random((3, 5, 7)).astype(np.float32))


def by_nibabel(path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 99, (3, 5, 7)).astype(np.int16)
    image = nibabel.Nifti1Image(array, np.eye(4))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, b"a comment"))
    nibabel.save(image, path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "rgb.png": by_pillow(),
    "palette.gif": by_pillow(),
    "photo.jpg": by_pillow(quality=90),
    "grey.bmp": by_pillow(grey=1),
    "lzw.tif": by_pillow(compression="tiff_lzw"),
    "stack.tif": by_tifffile((3, 5, 7), photometric="minisblack"),
    "shaped.tif": by_tifffile((3, 5, 7, 3), photometric="rgb", compression="zlib"),
    "imagej.tif": by_tifffile((3, 2, 5, 7), imagej=True, metadata={"axes": "ZCYX"}),
    "ome.tif": by_tifffile((3, 5, 7), ome=True, metadata={"axes": "ZYX"}),
    "big.tif": by_tifffile((5, 7, 3), bigtiff=True, tile=(16, 16), photometric="rgb"),
    "planar.tif": by_tifffile((3, 5, 7), photometric="rgb", planarconfig="separate"),
    "a.npy": by_numpy,
    "a.nii": by_nibabel,
    "a.nii.gz": by_nibabel,
}

# (what, where as a part of the file, the bytes)
CHANGE = st.tuples(
    st.sampled_from(["replace", "insert", "delete", "cut"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=4)
    | st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\1\0", b"9999"]),
)


def changed(whole: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    """The file after some changes."""
    data = bytearray(whole)
    for what, where, value in changes:
        at = int(where * len(data))
        if what == "replace":
            data[at : at + len(value)] = value
        elif what == "insert":
            data[at:at] = value
        elif what == "delete":
            del data[at : at + len(value)]
        else:
            del data[at:]
    return bytes(data)


def page_1(path: Path) -> NumpyArray:
    return stacks.read_volume(path, page=1)[0]


# reader -> axes of what it returns, without colours; None: a size
FLAT = {
    images.read_image: 3,
    partial(images.read_image, channels=3): 3,
    images.read_mask: 2,
    images.read_planes: 3,
    images.image_size: None,
    partial(images.image_size, channels=-1): None,
}
DEEP = {
    lambda path: stacks.read_volume(path)[0]: 4,
    page_1: 3,
    stacks.read_mask: 3,
    lambda path: stacks.volume_size(path)[0]: None,
}


def read_all(path: Path) -> int:
    """Reads a file in every way; returns how many of them ended in a sentence."""
    refused = 0
    flat, deep = (path.name.endswith(m.SUFFIXES) for m in (images, stacks))
    for read, rank in ((FLAT if flat else {}) | (DEEP if deep else {})).items():
        try:
            got = read(path)
        except InputError as error:
            refused += 1
            text = str(error)
            assert path.name in text and "\n" not in text and len(text) < 900, text
            continue
        if rank is None:
            assert 2 <= len(got) <= 3 and min(got) > 0, got
            continue
        assert isinstance(got, np.ndarray) and got.dtype.kind in "iuf", got
        # colours of a mask are one axis more
        assert got.ndim - rank in (0, 1) and 0 < got.size < MOST, got.shape
    return refused


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_files(tmp_path_factory, name, caplog):
    path = tmp_path_factory.mktemp("fuzz") / name
    WRITERS[name](path)
    whole = path.read_bytes()

    @FEW
    @given(st.lists(CHANGE, min_size=1, max_size=4))
    def check(changes: list[tuple[str, float, bytes]]) -> None:
        path.write_bytes(changed(whole, changes))
        read_all(path)

    with caplog.at_level(logging.DEBUG):
        check()
    assert not [r for r in caplog.records if r.name.startswith(("tifffile", "nibabel"))]


# ---- round trips


def arrays(shapes: st.SearchStrategy[tuple[int, ...]]) -> st.SearchStrategy[NumpyArray]:
    return st.builds(
        lambda shape, dtype, seed: np.random.default_rng(seed).integers(
            0, 2 ** (8 * np.dtype(dtype).itemsize), shape, dtype
        ),
        shapes,
        st.sampled_from([np.uint8, np.uint16]),
        st.integers(0, 2**32),
    )


SIDE = st.integers(1, 9)
# tifffile writes [N, 1, 1] as one page of N rows.
WIDE = st.integers(2, 9)


@FEW
@given(array=arrays(st.tuples(SIDE, SIDE)), suffix=st.sampled_from(["png", "tif"]))
def test_grey_round_trip(tmp_path_factory, array, suffix):
    path = tmp_path_factory.mktemp("trip") / f"a.{suffix}"
    Image.fromarray(array).save(path)
    got = images.read_image(path)
    assert got.dtype == array.dtype and images.image_size(path) == array.shape
    np.testing.assert_array_equal(got[..., 0], array)
    np.testing.assert_array_equal(images.read_mask(path), array)
    np.testing.assert_array_equal(images.read_planes(path)[..., 0], array)


@FEW
@given(
    array=arrays(st.tuples(st.integers(2, 7), WIDE, WIDE)),
    layout=st.sampled_from(["pages", "planar", "samples", "npy", "last"]),
    compression=st.sampled_from([None, "zlib"]),
)
def test_channels_round_trip(tmp_path_factory, array, layout, compression):
    """N channels asked for are read from every layout that has them."""
    count, *size = array.shape
    suffix = ".npy" if layout in ("npy", "last") else ".tif"
    path = tmp_path_factory.mktemp("trip") / f"a{suffix}"
    last = np.ascontiguousarray(array.transpose(1, 2, 0))
    if layout == "npy":
        assume(array.shape[-1] != count)
        np.save(path, array)
    elif layout == "last":
        np.save(path, np.asfortranarray(last))
    else:
        options = {"photometric": "minisblack", "compression": compression}
        if layout != "pages":
            side = "separate" if layout == "planar" else "contig"
            options |= {"planarconfig": side, "extrasamples": (0,) * (count - 1)}
        tifffile.imwrite(path, last if layout == "samples" else array, **options)
    got = images.read_image(path, channels=count)
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, last)
    assert images.image_size(path, channels=count) == tuple(size)
    if layout != "npy":
        np.testing.assert_array_equal(images.read_planes(path), last)
        assert images.image_size(path, channels=-1) == tuple(size)


@FEW
@given(
    array=arrays(st.tuples(st.integers(1, 4), WIDE, WIDE)),
    suffix=st.sampled_from([".tif", ".npy", ".nii", ".nii.gz"]),
)
def test_volume_round_trip(tmp_path_factory, array, suffix):
    path = tmp_path_factory.mktemp("trip") / f"a{suffix}"
    if suffix == ".tif":
        tifffile.imwrite(path, array, photometric="minisblack")
    elif suffix == ".npy":
        np.save(path, array)
    else:
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    image, _ = stacks.read_volume(path)
    np.testing.assert_array_equal(image[..., 0], array)
    assert stacks.volume_size(path)[0] == array.shape
    mask = stacks.read_mask(path)
    assert mask.dtype == array.dtype
    np.testing.assert_array_equal(mask, array)
    page = len(array) - 1
    np.testing.assert_array_equal(stacks.read_mask(path, page=page), array[page])


# ---- masks


LABELS = st.builds(
    lambda shape, classes, seed: np.random.default_rng(seed).integers(
        0, classes, shape
    ),
    st.tuples(SIDE, SIDE),
    st.integers(2, 9),
    st.integers(0, 2**32),
)
COLOURS = st.lists(
    st.tuples(*[st.integers(0, 255)] * 3), min_size=9, max_size=9, unique=True
)


@FEW
@given(
    label=LABELS,
    kind=st.sampled_from(["binary", "index", "palette", "colours", "instances"]),
    white=st.integers(1, 255),
    colours=COLOURS,
)
def test_masks_decode_what_was_coded(tmp_path_factory, label, kind, white, colours):
    path = tmp_path_factory.mktemp("mask") / "m.png"
    classes = int(label.max()) + 1
    options: dict = {}
    if kind == "binary":
        # a file on its own in which everything is foreground is one of them too
        label = np.minimum(label, 1)
        Image.fromarray((label * white).astype(np.uint8)).save(path)
    elif kind in ("index", "palette"):
        image = Image.fromarray(label.astype(np.uint8))
        if kind == "palette":
            image.putpalette(bytes(np.asarray(colours, np.uint8)))
        image.save(path)
        options = {"mask": "index", "label_names": [str(i) for i in range(classes)]}
    elif kind == "instances":
        Image.fromarray((label * 40).astype(np.uint16)).save(path)
        options = {"mask": "instances"}
        label = np.minimum(label, 1)
    else:
        Image.fromarray(np.asarray(colours, np.uint8)[label]).save(path)
        options = {"colors": colours}
    coding = masks.choose([path], images.read_mask, **options)
    got, weight = coding.decode(images.read_mask(path), str(path))
    assert weight is None
    np.testing.assert_array_equal(got, label)


@FEW
@given(label=LABELS, colours=COLOURS)
def test_colours_that_were_found(tmp_path_factory, label, colours):
    """Without a table, the classes are the colours in order."""
    path = tmp_path_factory.mktemp("mask") / "m.png"
    array = np.asarray(colours, np.uint8)[label]
    assume((array != array[..., :1]).any())
    Image.fromarray(array).save(path)
    coding = masks.choose([path], images.read_mask)
    got, _ = coding.decode(images.read_mask(path), str(path))
    np.testing.assert_array_equal(np.asarray(coding.colors)[got], array)


def test_bytes_of_another_format_are_not_tried():
    """Pillow would give an EPS file to Ghostscript."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "EPS")
    with pytest.raises(InputError, match=r"a\.png cannot be read \(not an image of a"):
        images.decode_image(file.getvalue(), "a.png")
