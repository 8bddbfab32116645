"""TIFF files: their pages, axes, palette and alpha, read without trusting the header.

A TIFF is a chain of pages, each a table of tags that say where the pixels are, and
programs hide more in their tags: axes, other files, other pages. tifffile follows all
of it, and where a file contradicts itself logs that and goes on. So the chain is walked
here first, in bounded time and memory, and what tifffile makes of the file is compared
with what the file can hold before it is decoded.
"""

import math
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from unet_jax.data import trust
from unet_jax.data.formats import MAP_FROM, file_size, load_pillow_pages, silence
from unet_jax.types import InputError, NumpyArray, Shape

# A page takes some kilobytes of memory before its pixels are read. Longer recordings
# are cut into several files by the programs that write them.
MOST_PAGES = 2**16
# An OME description of this length names some hundred thousand planes.
MOST_TEXT = 2**25
# What a byte of the file can become at most, by compression: none, LZW, deflate (two
# numbers), packbits. Of other compressions a blank page can be as small.
GROWS = {1: 1, 5: 2048, 8: 2048, 32946: 2048, 32773: 128}
GROWS_OTHER = 2**16
# Segments that would inflate to no more than this need not be tried beforehand.
SMALL = 2**28
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4}
TYPE_BYTES |= {12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
SUBIFDS, DESCRIPTION = 330, 270


class Stack(NamedTuple):
    """The first series of a TIFF file.

    ``array``: values as stored, in native byte order.
    ``axes``: one letter for each axis: Y, X, S samples, C channels, Z or others pages.
    ``palette``: ``u8[2**bits, 3]`` where ``array`` holds indices into it.
    ``alpha``: whether the last sample is alpha.
    """

    array: NumpyArray
    axes: str
    palette: NumpyArray | None = None
    alpha: bool = False

    def without_alpha(self) -> NumpyArray:
        """``array`` with one sample less where the last one is alpha."""
        if not self.alpha or "S" not in self.axes:
            return self.array
        return np.delete(self.array, -1, self.axes.index("S"))


def load(path: Path, page: int | None = None) -> Stack:
    """The first series of a TIFF file.

    Args:
        path: the file.
        page: asks for one index of the first axis only, where pages can be read one by
            one; otherwise everything comes back.

    Raises:
        InputError: pages that are missing, more than fits the memory, or more than the
            file can hold. Damage that tifffile meets is raised as it comes: see
            `formats.readable`.
    """
    name = str(path)
    with _open(path) as tiff:
        series = _first_series(tiff, name)
        keyframe, axes = series.keyframe, series.axes
        alpha = len(keyframe.extrasamples) == 1 and keyframe.extrasamples[0] in (1, 2)
        if _mapped(tiff, series):
            offset, dtype = int(series.dataoffset), series.dtype
            array = np.memmap(path, dtype, "c", offset, series.shape)
            array = array.view(np.ndarray)
            return Stack(array, axes, _palette(keyframe, array.dtype), alpha)
        source: Any = series
        single = axes[0] not in "YXSC" and len(series.pages) == series.shape[0]
        if page is not None and single:
            source, axes = series.pages[page], axes[1:]
            if _kind(source) != _kind(keyframe):
                raise _damaged(name, f"its page {page} is not like the first")
        try:
            _check_segments(tiff, series if source is series else [source], name)
            array = source.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            # LZW, JPEG and the like, for which Pillow brings its own decoders.
            array, axes = load_pillow_pages(path, name), "QYX" + "S" * ("S" in axes)
        palette = _palette(keyframe, array.dtype)
    if palette is not None and array.dtype == bool:
        array = array.astype(np.uint8)
    return Stack(array, axes, palette, alpha)


def header(path: Path) -> tuple[Shape, str]:
    """(shape, axes) of a TIFF file's first series, without its pixels."""
    with _open(path) as tiff:
        series = _first_series(tiff, str(path))
        return tuple(series.shape), series.axes


def one_image(
    shape: Shape, axes: str, name: str, channels: int = 0
) -> tuple[Shape, tuple[int, ...]]:
    """Where the rows, columns and channels of a single image are.

    Args:
        shape, axes: as `header` gives them.
        name: the file, for the message.
        channels: as many pages as this are channels; -1: any number of pages is.

    Returns:
        ``((H, W), order)``: transposed by ``order``, the first axes are rows and
        columns, and the others together the channels.

    Raises:
        InputError: more than one page.
    """
    length = dict(zip(axes, shape, strict=True))
    pages = math.prod(
        n for axis, n in zip(axes, shape, strict=True) if axis not in "YXSC"
    )
    samples = length.get("S", 1) * length.get("C", 1)
    if pages != 1 and channels != -1 and (channels, samples) != (pages, 1):
        raise InputError(
            f"{name} is a stack of {pages} pages: set `channels` to {pages} if the "
            "pages are channels, read stacks with the source `volumes`, or save the "
            "pages as single images."
        )
    place = {"Y": 0, "X": 1, "C": 3, "S": 4}
    order = sorted(range(len(axes)), key=lambda i: place.get(axes[i], 2))
    return (length["Y"], length["X"]), tuple(order)


def _open(path: Path) -> Any:
    """The file in tifffile's hands, after its pages were walked.

    A file stands for itself: OME, Micro-Manager and NDTiff metadata may name other
    files, anywhere, which are not opened.
    """
    import tifffile

    silence("tifffile")
    name, size = str(path), file_size(path)
    with path.open("rb") as file:
        _check_pages(file, size, name)
    return tifffile.TiffFile(path, _multifile=False, is_mmstack=False, is_ndtiff=False)


def _check_pages(file: BinaryIO, size: int, name: str) -> None:
    """Walks the chain of pages, and the pages below pages, by the tables alone.

    Raises:
        InputError: a page that is missing or comes twice, more pages or longer texts
            than a file that was meant to be read has, or tags that together are larger
            than the file, which point at the same bytes again and again.
    """
    form = _Form.of(file.read(16), name)
    offset, seen, taken, visits = form.first, set[int](), 0, 0
    if not offset:
        raise _damaged(name, "it has no pages")
    while offset:
        if offset in seen:
            raise _damaged(name, f"its page {len(seen)} leads back to an earlier one")
        seen.add(offset)
        below = [offset]
        following = None
        while below:
            visits += 1
            if visits + len(below) > MOST_PAGES:
                raise InputError(
                    f"{name} has more than {MOST_PAGES} pages: part it into several "
                    "files."
                )
            try:
                tags, after = form.page(file, below.pop(), size)
            except (struct.error, OverflowError) as error:
                where = f"its page {len(seen) - 1} is missing"
                raise _damaged(name, where) from error
            following = after if following is None else following
            taken += form.tag.size * len(tags)
            for code, kind, count, value in tags:
                taken += TYPE_BYTES.get(kind, 1) * count
                if code == DESCRIPTION and count > MOST_TEXT:
                    raise _damaged(name, f"a description of {count} characters")
                if code == SUBIFDS:
                    below += form.offsets(file, kind, count, value, size)
            if taken > 2 * size + 2**20:
                raise _damaged(name, "its tags are larger than the file")
        offset = following or 0


class _Form(NamedTuple):
    """How the numbers of a TIFF's tables are written."""

    first: int
    number: struct.Struct
    tag: struct.Struct
    offset: struct.Struct

    @classmethod
    def of(cls, head: bytes, name: str) -> "_Form":
        order = {b"II": "<", b"MM": ">", b"EP": "<"}.get(head[:2])
        if order is None or len(head) < 8:
            raise _damaged(name, "not a TIFF file")
        big = struct.unpack(order + "H", head[2:4])[0] == 43
        formats = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
        number, tag, offset = (struct.Struct(order + text) for text in formats)
        at = 8 if big else 4
        if len(head) < at + offset.size:
            raise _damaged(name, "not a TIFF file")
        return cls(offset.unpack_from(head, at)[0], number, tag, offset)

    def page(
        self, file: BinaryIO, offset: int, size: int
    ) -> tuple[list[tuple[int, int, int, bytes]], int]:
        """((code, type, count, value) of each tag, offset of the next page or 0)."""
        file.seek(min(offset, size))
        (count,) = self.number.unpack(file.read(self.number.size))
        if count > 4096:  # more than tifffile reads
            raise struct.error
        table = file.read(count * self.tag.size)
        (following,) = self.offset.unpack(file.read(self.offset.size))
        return list(self.tag.iter_unpack(table)), following

    def offsets(
        self, file: BinaryIO, kind: int, count: int, value: bytes, size: int
    ) -> Iterator[int]:
        """The places that a tag of offsets names and that are in the file."""
        width = 8 if kind in (16, 17, 18) else 4
        count = min(count, MOST_PAGES + 1, size // width)
        if count * width <= len(value):
            data = value
        else:
            file.seek(min(self.offset.unpack(value)[0], size))
            data = file.read(count * width)
        letter = self.number.format[0] + ("Q" if width == 8 else "I")
        for (offset,) in struct.iter_unpack(letter, data[: len(data) // width * width]):
            if 8 <= offset < size:
                yield offset


def _first_series(tiff: Any, name: str) -> Any:
    """The first series of an open file, whose size was found plausible."""
    if tiff.is_ome:
        _check_ome(tiff.pages[0].description, name)
    series = tiff.series[0]
    # Only a single pixel may have an axis twice, as tifffile writes one.
    twice = any(series.axes.count(axis) > 1 for axis in "YXCS") and series.size > 1
    if twice or not {"Y", "X"} <= set(series.axes):
        raise _damaged(name, f"its axes are {series.axes}")
    page, itemsize = series.keyframe, series.dtype.itemsize
    trust.check_bytes(series.shape, itemsize, name)
    trust.check_bytes((len(series.pages), *page.shape), itemsize, name)
    trust.check_bytes(page.chunks, itemsize, name)
    if 0 in series.shape:
        raise _damaged(name, "it holds no pixels")
    if series.kind == "ome" and (missing := sum(p is None for p in series.pages)):
        raise _damaged(name, f"{missing} of its {len(series.pages)} pages are missing")
    size = tiff.filehandle.size
    bits = int(np.mean(page.bitspersample))
    need = math.prod(series.shape) * bits // 8
    grows = GROWS.get(page.compression, GROWS_OTHER)
    if page.photometric == 6 or 0 in page.databytecounts:
        # Colour at half the resolution, or empty parts left out: their length is 0.
        grows = max(grows, 2048)
    if need > grows * size:
        raise _damaged(name, f"{need} bytes of pixels in a file of {size}")
    return series


def _check_ome(text: str, name: str) -> None:
    """Refuses numbers in an OME description that tifffile would make lists of."""
    from xml.etree import ElementTree

    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return  # and tifffile does without it
    for element in root.iter():
        counts = [
            int(value)
            for key, value in element.attrib.items()
            if key in ("SizeZ", "SizeC", "SizeT", "NumPlanes", "PlaneCount")
        ]
        if element.tag[:-1].endswith("Along") and "Start" in element.attrib:
            first, last = (float(element.attrib[key]) for key in ("Start", "End"))
            counts.append(int((last - first) / float(element.attrib.get("Step", 1))))
        if max([math.prod(counts), *counts]) > MOST_PAGES:
            raise InputError(
                f"{name} says that it holds more than {MOST_PAGES} pages: part it into "
                "several files, or leave it out if it is damaged."
            )


def _check_segments(tiff: Any, pages: Iterable[Any], name: str) -> None:
    """Refuses compressed parts that inflate to more than a page.

    tifffile inflates a part as far as it goes and cuts off what is too long afterwards.
    """
    import lzma
    import zlib

    keyframe, file = tiff.series[0].keyframe, tiff.filehandle
    kind = keyframe.compression
    if kind not in (8, 32946, 34925):
        return
    chunk = math.prod(keyframe.chunks) * keyframe.dtype.itemsize
    most = 2 * max(chunk, keyframe.nbytes) + 2**20
    for page in pages:
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
            count = min(count, file.size)
            # Deflate makes 1032 bytes of one at most.
            if kind != 34925 and count * 1032 <= SMALL:
                continue
            file.seek(offset)
            make = lzma.LZMADecompressor if kind == 34925 else zlib.decompressobj
            if len(make().decompress(file.read(count), most)) >= most:
                raise _damaged(name, f"a part inflates to more than {most} bytes")


def _mapped(tiff: Any, series: Any) -> bool:
    """Whether the pixels lie in the file as they do in memory, and are many."""
    native = tiff.byteorder == {"little": "<", "big": ">"}[sys.byteorder]
    return (
        series.nbytes >= MAP_FROM
        and series.dataoffset is not None
        and series.keyframe.is_memmappable
        and (native or series.dtype.itemsize == 1)
        and series.dataoffset + series.nbytes <= tiff.filehandle.size
    )


def _kind(page: Any) -> tuple[Any, ...]:
    return page.shape, page.dtype, page.compression, page.chunks


def _palette(page: Any, dtype: np.dtype[Any]) -> NumpyArray | None:
    """The colour of every number that a pixel of the type can have, or None."""
    if page.photometric != 3 or page.colormap is None:
        return None
    # The entries have 16 bits, the high byte is the colour.
    colours = (np.asarray(page.colormap).T >> 8).astype(np.uint8)
    if dtype.kind not in "bu" or dtype.itemsize > 2 or colours.shape[1:] != (3,):
        return None
    palette = np.zeros((2 ** (8 * dtype.itemsize), 3), np.uint8)
    palette[: len(colours)] = colours[: len(palette)]
    return palette


def _damaged(name: str, why: str) -> InputError:
    return InputError(
        f"{name} cannot be read ({why}): it may be damaged or cut short, so copy or "
        "save it anew, or leave it out."
    )
