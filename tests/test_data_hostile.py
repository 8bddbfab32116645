"""Files made to crash, hang or fill the memory: one sentence each, and quickly."""

import functools
import gzip
import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image

from unet_jax.data import formats, images, stacks, tiff
from unet_jax.types import InputError

ZEROS = bytes(2**20)


@functools.cache
def deflated(megabytes: int, wbits: int = 15) -> bytes:
    """That many zeros, compressed."""
    pack = zlib.compressobj(9, zlib.DEFLATED, wbits)
    return b"".join(pack.compress(ZEROS) for _ in range(megabytes)) + pack.flush()


# ---- TIFF

SHORT, LONG, ASCII = 3, 4, 2


def directory(tags: dict[int, tuple[int, int, int]], following: int = 0) -> bytes:
    """One page's table: {code: (type, count, value or offset)}."""
    body = b"".join(
        struct.pack("<HHI", code, *tag[:2])
        + (struct.pack("<HH", tag[2], 0) if tag[:2] == (3, 1) else pack4(tag[2]))
        for code, tag in sorted(tags.items())
    )
    return struct.pack("<H", len(tags)) + body + pack4(following)


def pack4(number: int) -> bytes:
    return struct.pack("<I", number)


def page(
    height: int = 2, width: int = 2, compression: int = 1, data: int = 8, size: int = 4
) -> dict[int, tuple[int, int, int]]:
    return {
        256: (LONG, 1, width),
        257: (LONG, 1, height),
        258: (SHORT, 1, 8),
        259: (SHORT, 1, compression),
        262: (SHORT, 1, 1),
        273: (LONG, 1, data),
        277: (SHORT, 1, 1),
        278: (LONG, 1, height),
        279: (LONG, 1, size),
    }


def tiff_file(tags: dict, data: bytes = b"\1\2\3\4", following: int = 0) -> bytes:
    """A file of one page whose pixels are at byte 8."""
    return b"II*\0" + pack4(8 + len(data)) + data + directory(tags, following)


def described(text: str, **size: int) -> bytes:
    raw = text.encode() + b"\0"
    tags = page(data=8 + len(raw), **size) | {270: (ASCII, len(raw), 8)}
    return tiff_file(tags, raw + b"\1\2\3\4")


def ome(pixels: str, head: str = "", body: str = "") -> bytes:
    return described(
        f'<?xml version="1.0"?>{head}<OME xmlns="http://www.openmicroscopy.org/Schemas/'
        f'OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT"'
        f' Type="uint8" SizeX="2" SizeY="2" {pixels}>{body}</Pixels></Image></OME>'
    )


def chain(places: list[int], tags: dict | None = None) -> bytes:
    """Tables one after the other, each leading to the next of ``places``."""
    size = len(directory(tags or {}))
    whole = b"II*\0" + pack4(8)
    return whole + b"".join(directory(tags or {}, 8 + size * at) for at in places)


LAUGHS = "<!DOCTYPE l [" + '<!ENTITY a "ha">'
LAUGHS += "".join(
    f'<!ENTITY {b} "{f"&{a};" * 30}">'
    for a, b in zip("abcdefg", "bcdefgh", strict=True)
)
LAUGHS += "]>"

TIFFS: dict[str, tuple[Callable[[], bytes], str]] = {
    "shape": (lambda: tiff_file(page(2**30, 2**30)), "GB fit this machine"),
    "more than the file": (lambda: tiff_file(page(5000, 4000)), "bytes of pixels in a"),
    "ratio": (lambda: tiff_file(page(30000, 20000, 8)), "bytes of pixels in a"),
    "empty strip": (lambda: tiff_file(page(30000, 20000, size=0)), "bytes of pixels"),
    "no rows": (lambda: tiff_file(page(0, 2)), "cannot be read"),
    "tile": (
        lambda: tiff_file(page() | {322: (LONG, 1, 2**20), 323: (LONG, 1, 2**20)}),
        "GB fit this machine",
    ),
    "inflates": (
        lambda: tiff_file(page(compression=8, size=300_000), deflated(300)),
        "inflates to more than",
    ),
    "leads to itself": (lambda: chain([0]), "its page 1 leads back"),
    "circle": (lambda: chain([*range(1, 151), 7]), "its page 151 leads back"),
    "pages": (lambda: chain(list(range(1, 2**16 + 9))), "more than 65536 pages"),
    "next page": (lambda: tiff_file(page(), following=10**9), "its page 1 is missing"),
    "first page": (lambda: b"II*\0" + pack4(2**31) + ZEROS[:50], "page 0 is missing"),
    "tags": (lambda: b"II*\0" + pack4(8) + b"\xff\xff" + ZEROS, "page 0 is missing"),
    "tag": (lambda: tiff_file(page() | {270: (ASCII, 2**31, 8)}), "a description of"),
    "tags again": (
        lambda: chain(list(range(1, 99)), {270: (ASCII, 2**20, 8)}) + ZEROS,
        "its tags are larger than the file",
    ),
    "pages below": (
        lambda: tiff_file(page() | {330: (LONG, 1, 12)}),
        "tags are larger|65536 pages",
    ),
    "pages below twice": (
        # the two bytes 12 0 0 0 12 0 0 0 before the table are both places
        lambda: tiff_file(
            page(data=16) | {330: (LONG, 2, 8)}, pack4(20) * 2 + b"\1\2\3\4"
        ),
        "tags are larger|65536 pages",
    ),
    "planes": (lambda: ome('SizeZ="1" SizeC="1" SizeT="999999999"'), "65536 pages"),
    "plane count": (
        lambda: ome(
            'SizeZ="1" SizeC="1" SizeT="1"',
            body='<TiffData NumPlanes="0" PlaneCount="999999999"/>',
        ),
        "65536 pages",
    ),
    "no pages": (lambda: b"II*\0" + bytes(99), "it has no pages"),
    "missing planes": (
        lambda: ome('SizeZ="1" SizeC="1" SizeT="3"', body='<TiffData IFD="0"/>'),
        "2 of its 3 pages are missing",
    ),
    "shaped": (lambda: described('{"shape": [9999999999, 2, 2]}'), "GB fit|cannot be"),
    "nested": (lambda: described('{"shape": ' + "[" * 99999 + "}"), "cannot be"),
}


@pytest.mark.parametrize("what", TIFFS)
def test_tiff(tmp_path, what):
    make, sentence = TIFFS[what]
    path = tmp_path / "a.tif"
    path.write_bytes(make())
    for read in (images.read_image, images.read_mask, stacks.read_volume):
        with pytest.raises(InputError, match=rf"a\.tif .*({sentence}).*: .*\."):
            read(path)


def test_tiff_whose_description_is_not_believed(tmp_path):
    path = tmp_path / "a.tif"
    for whole in (
        tiff_file(page()),
        described("an image"),
        ome('SizeZ="1" SizeC="1" SizeT="1"', LAUGHS, "<a>&h;</a>"),
        described("ImageJ=1.0\nimages=999999999\nslices=999999999\n"),
        described('{"shape": [' + "9" * 4000 + "]}"),
        ome('SizeZ="1" SizeC="1" SizeT="1"', body='<TiffData IFD="0"/>'),
    ):
        path.write_bytes(whole)
        np.testing.assert_array_equal(images.read_mask(path), [[1, 2], [3, 4]])


def test_ome_leads_to_no_other_file(tmp_path):
    """Its description names another file, in another folder, for the second plane."""
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "secret.ome.tif", np.full((2, 2), 9, np.uint8))
    planes = "".join(
        f'<TiffData FirstT="{i}" IFD="0"><UUID FileName="{name}">urn:uuid:{i}</UUID>'
        "</TiffData>"
        for i, name in enumerate(["a.ome.tif", "../secret.ome.tif"])
    )
    path = tmp_path / "in" / "a.ome.tif"
    path.write_bytes(ome('SizeZ="1" SizeC="1" SizeT="2"', body=planes))
    np.testing.assert_array_equal(images.read_mask(path), [[1, 2], [3, 4]])


# ---- NIfTI


def nifti(path: Path, data: bytes = bytes(24), extension: int = 0, **fields) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((2, 3, 4))
    header["vox_offset"], header["magic"] = 352 + 16 * bool(extension), b"n+1"
    for key, value in fields.items():
        header[key] = value
    flag = b"\1\0\0\0" + struct.pack("<ii8x", extension, 6) if extension else bytes(4)
    whole = header.binaryblock + flag + data
    path.write_bytes(gzip.compress(whole) if path.suffix == ".gz" else whole)


DIM = [3, 2, 3, 4, 1, 1, 1, 1]
NIFTIS: list[tuple[dict, str]] = [
    ({"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}, "GB fit this machine"),
    ({"dim": [3, 300, 300, 300, 1, 1, 1, 1]}, "bytes of voxels in a file of|Expected"),
    ({"dim": [3, -2, 3, 4, 1, 1, 1, 1]}, "says that it holds -2"),
    ({"dim": [3, 0, 3, 4, 1, 1, 1, 1]}, "0 bytes of voxels"),
    ({"dim": [99, *DIM[1:]]}, "cannot be read"),
    ({"vox_offset": 1e12}, "its voxels begin at byte"),
    ({"vox_offset": -400}, "its voxels begin at byte"),
    ({"vox_offset": np.nan}, "its voxels begin at byte nan"),
    ({"extension": 2**31 - 16}, "header extension of 2147483632"),
    ({"extension": -16}, "header extension of -16"),
    ({"extension": 1}, "header extension of 1"),
    ({"extension": 16, "vox_offset": 0}, "header extension of 16"),
    ({"datatype": 32, "bitpix": 64, "data": bytes(24 * 8)}, "complex64 values"),
    ({"datatype": 128, "bitpix": 24, "data": bytes(24 * 3)}, "holds .* values"),
    ({"datatype": 7777}, "cannot be read"),
    ({"data": bytes(5)}, "cannot be read"),
    ({"scl_slope": 1.0, "scl_inter": np.nan}, "cannot be read|NaN"),
    ({"magic": b"xyz"}, "not a NIfTI file"),
]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("fields", "sentence"), NIFTIS)
def test_nifti(tmp_path, fields, sentence, suffix):
    path = tmp_path / f"a{suffix}"
    nifti(path, **fields)
    for read in (stacks.read_volume, stacks.read_mask):
        with pytest.raises(InputError, match=rf"a{suffix} .*({sentence})"):
            read(path)


def test_nifti_without_a_slope(tmp_path):
    nifti(tmp_path / "a.nii", bytes(range(24)), scl_slope=np.nan, scl_inter=np.nan)
    got = stacks.read_mask(tmp_path / "a.nii")
    np.testing.assert_array_equal(got, np.arange(24).reshape((2, 3, 4), order="F"))


# ---- npy


def npy(header: str | bytes, version: int = 1, length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    width = struct.pack("<H" if version == 1 else "<I", length or len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + width + text + bytes(64)


def array_of(shape: str = "(4, 4)", descr: str = "'|u1'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n"


NPYS = [
    (npy(array_of("(99999999, 99999999)")), "GB fit this machine"),
    (npy(array_of("(2000, 2000)")), r"it has \d+ bytes of 40000"),
    (npy(array_of("(-4, 4)")), "cannot be read|says that it holds -4"),
    (npy(array_of("(" + "9" * 4000 + ", 4)")), "GB fit this machine"),
    (npy(array_of("(0, 4)")), r"shape \(0, 4\)"),
    (npy(array_of("()")), r"shape \(\)"),
    (npy(array_of("(4,)")), r"shape \(4,\)"),
    (npy(array_of(descr="'|O'")), "holds Python objects"),
    (npy(array_of(descr="[('a', '|O')]")), "holds Python objects"),
    (npy(array_of(descr="[('a', '|u1')]")), "holds .* values"),
    (npy(array_of("(2, 2)", "'<c8'")), "holds complex64 values"),
    (npy(array_of("(2, 2)", "'<U2'")), "holds <U2 values"),
    (npy(array_of("(2, 2)", "'<M8[s]'")), "holds datetime64"),
    (npy("(" * 9000), "cannot be read"),
    (npy("-" * 9000 + "1"), "cannot be read"),
    (npy(array_of(), 2, 2**32 - 1), "it has a header of 4294967295 bytes"),
    (npy(array_of(), 9), "cannot be read"),
]


@pytest.mark.parametrize(("whole", "sentence"), NPYS)
def test_npy(tmp_path, whole, sentence):
    path = tmp_path / "a.npy"
    path.write_bytes(whole)
    for read in (images.read_image, images.read_mask):
        with pytest.raises(InputError, match=rf"a\.npy .*({sentence})"):
            read(path)
    with pytest.raises(InputError, match=r"a\.npy "):
        stacks.read_volume(path, page=0)


def test_npy_versions_and_orders(tmp_path, rng):
    array = rng.integers(0, 255, (3, 4), np.uint8)
    for version in ((1, 0), (2, 0), (3, 0)):
        with (tmp_path / "a.npy").open("wb") as file:
            np.lib.format.write_array(file, np.asfortranarray(array), version)
        np.testing.assert_array_equal(images.read_mask(tmp_path / "a.npy"), array)
    np.savez(tmp_path / "a.npz", array)
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    for read in (images.read_image, images.image_size, stacks.volume_size):
        with pytest.raises(InputError, match=r"a\.npy cannot be read \(the magic str"):
            read(tmp_path / "a.npy")


# ---- pictures


def chunk(name: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + check


def png(*chunks: bytes, width: int = 2, height: int = 2) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0\1\2\0\3\4"))
    start = b"\x89PNG\r\n\x1a\n" + head
    return start + b"".join(chunks) + body + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 16, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 70, 0, 0, 54) + info + bytes(range(16))


def gif(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ones((2, 2), np.uint8)).save(file, "GIF")
    whole = bytearray(file.getvalue())
    whole[6:10] = struct.pack("<HH", width, height)
    return bytes(whole)


PICTURES = {
    "text.png": lambda: png(chunk(b"zTXt", b"a\0\0" + deflated(20))),
    "profile.png": lambda: png(chunk(b"iCCP", b"a\0\0" + deflated(20))),
    "sides.png": lambda: png(width=2**31 - 1, height=2**31 - 1),
    "sides2.png": lambda: png(width=15000, height=15000),
    "short.png": lambda: png(width=5000, height=5000),
    "sides.bmp": lambda: bmp(2**31 - 1, 2**31 - 1),
    "upside.bmp": lambda: bmp(2**31 - 1, -(2**31)),
    "sides.gif": lambda: gif(65535, 65535),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(PICTURES[name]())
    try:
        got = images.read_image(path)
    except InputError as error:
        assert name in str(error)
    else:
        # Pillow leaves out texts and profiles that are too long
        assert name in ("text.png", "profile.png")
        np.testing.assert_array_equal(got[..., 0], [[1, 2], [3, 4]])


def test_pictures_that_are_right(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    np.testing.assert_array_equal(
        images.read_mask(tmp_path / "a.png"), [[1, 2], [3, 4]]
    )
    (tmp_path / "a.bmp").write_bytes(bmp(2, 2))
    (tmp_path / "b.bmp").write_bytes(bmp(2, -2))  # rows from the top
    first, second = (images.read_image(tmp_path / f"{n}.bmp") for n in "ab")
    np.testing.assert_array_equal(first, second[::-1])


def test_frames_that_no_one_reads(tmp_path):
    file = io.BytesIO()
    frames = [Image.fromarray(np.full((2, 2), i, np.uint8)) for i in (1, 2)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    whole = file.getvalue()
    path = tmp_path / "a.gif"
    # the second frame begins with its control block and the file ends with ";"
    second = whole.rindex(b"!\xf9")
    path.write_bytes(whole[:second] + whole[second:-1] * 100_000 + b";")
    assert images.read_image(path).shape == (2, 2, 3)


def test_what_is_no_file(tmp_path):
    for suffix in (*images.SUFFIXES, *stacks.NIFTI):
        path = tmp_path / f"a{suffix}"
        os.mkfifo(path)  # nobody writes to it
        read = stacks.read_volume if suffix in stacks.NIFTI else images.read_image
        with pytest.raises(InputError, match=r"cannot be read \(not a file\)"):
            read(path)


# ---- large arrays


def test_large_arrays_are_mapped(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(formats, "MAP_FROM", 1000)
    monkeypatch.setattr(tiff, "MAP_FROM", 1000)
    volume = rng.integers(0, 2**16, (3, 20, 30)).astype(np.uint16)
    np.save(tmp_path / "a.npy", volume)
    tifffile.imwrite(tmp_path / "a.tif", volume, photometric="minisblack")
    for name in ("a.npy", "a.tif"):
        whole = (tmp_path / name).read_bytes()
        got, _ = stacks.read_volume(tmp_path / name)
        assert is_mapped(got) and got.flags.writeable and type(got) is np.ndarray
        np.testing.assert_array_equal(got[..., 0], volume)
        got[:] = 0  # ours, and not the file's
        del got
        assert (tmp_path / name).read_bytes() == whole
        np.testing.assert_array_equal(
            stacks.read_volume(tmp_path / name, page=1)[0][..., 0], volume[1]
        )
    options = {"photometric": "minisblack", "compression": "zlib"}
    tifffile.imwrite(tmp_path / "b.tif", volume, **options)
    tifffile.imwrite(tmp_path / "c.tif", volume, byteorder=">", imagej=True)
    for name in ("b.tif", "c.tif"):
        got, _ = stacks.read_volume(tmp_path / name)
        assert not is_mapped(got) and got.dtype.isnative
        np.testing.assert_array_equal(got[..., 0], volume)


def is_mapped(array: np.ndarray) -> bool:
    base = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False


# ---- all of them, in a process of its own

CHILD = """
import resource, sys, warnings
from pathlib import Path
import nibabel, PIL.Image, tifffile
from unet_jax.data import images, stacks
from unet_jax.types import InputError

warnings.simplefilter("error")
paths = sorted(Path(sys.argv[1]).iterdir())
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
before, refused = peak(), 0
for path in paths:
    volume = path.name.endswith((".nii", ".nii.gz"))
    for read in [stacks.read_volume] if volume else [images.read_image]:
        try:
            read(path)
        except InputError:
            refused += 1
print(refused, peak() - before)
"""


def test_memory_is_bounded(tmp_path):
    """All of these together take less than what one of them would inflate to."""
    for i, (make, _) in enumerate(TIFFS.values()):
        (tmp_path / f"{i}.tif").write_bytes(make())
    for i, (fields, _) in enumerate(NIFTIS):
        nifti(tmp_path / f"{i}.nii", **fields)
    # 300 MB after the voxels, before them, and where the voxels should be
    tail = deflated(300, wbits=31)
    for i, (offset, shape) in enumerate([(352, 2), (3e8, 2), (352, 1000)]):
        path = tmp_path / f"bomb{i}.nii.gz"
        nifti(path, vox_offset=offset, dim=[3, shape, 3, 4, 1, 1, 1, 1])
        path.write_bytes(path.read_bytes() + tail)
    for i, (whole, _) in enumerate(NPYS):
        (tmp_path / f"{i}.npy").write_bytes(whole)
    for name, make in PICTURES.items():
        (tmp_path / name).write_bytes(make())
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    refused, megabytes = done.stdout.split()
    assert int(refused) >= len(TIFFS) + len(NIFTIS) + len(NPYS), done.stdout
    assert float(megabytes) < 250, done.stdout
