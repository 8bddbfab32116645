"""File formats of pixels: what Pillow and tifffile hand over, made unambiguous.

What differs between decoders and changes the pixels in silence is settled here:
palettes stay indices beside their colours, 16-bit colour PNGs keep 16 bits, 2- and
4-bit grey says by how much it was stretched, alpha is dropped, a photograph is turned
upright. Every failure of a decoder becomes one sentence.
"""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unet_jax.types import InputError, NumpyArray, Shape


class Pixels(NamedTuple):
    """A decoded file before it is read as an image or as a mask.

    ``array``: ``[H, W, C]`` without alpha, any real dtype, native byte order.
    ``palette``: ``u8[256, 3]`` where ``array`` holds indices into it.
    ``scale``: what the decoder multiplied the stored numbers by (2- and 4-bit grey).
    """

    array: NumpyArray
    palette: NumpyArray | None = None
    scale: int = 1


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Turns whatever a decoder raises inside the block into one InputError on ``name``.

    A damaged file makes decoders raise almost anything (SyntaxError, struct.error,
    KeyError), also warnings where the user made those errors.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist: check the path.") from error
    except ImportError as error:
        raise InputError(
            f"{name} needs the package {error.name}: install it, or convert the file "
            "to another format."
        ) from error
    except Exception as error:
        raise InputError(
            f"{name} cannot be read ({reason(error)}): it may be damaged or cut "
            "short, so copy or save it anew, or leave it out."
        ) from error


@contextlib.contextmanager
def writable(name: str) -> Iterator[None]:
    """Turns a refusal of the file system inside the block into one InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{name} cannot be written ({reason(error)}): free some space or choose "
            "another folder."
        ) from error


def load_tiff(
    path: Path, page: int | None = None
) -> tuple[NumpyArray, str, NumpyArray | None]:
    """The first series of a TIFF file.

    Args:
        path: the file.
        page: asks for one index of the first axis only, where pages can be read one by
            one; otherwise everything comes back.

    Returns:
        ``(array, axes, palette)``: one letter of ``axes`` for each axis of ``array``
        (Y, X, S samples, C channels, Z or others pages), alpha dropped, values as
        stored; ``palette`` is ``u8[256, 3]`` or None.
    """
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        _check_last_page(tiff, str(path))
        series = tiff.series[0]
        keyframe = series.keyframe
        axes, palette = series.axes, None
        source: Any = series
        if keyframe.photometric == 3 and keyframe.colormap is not None:
            # Palette colour; the entries have 16 bits, the high byte is the colour.
            palette = (np.asarray(keyframe.colormap).T >> 8).astype(np.uint8)
        single = axes[0] not in "YXSC" and len(series.pages) == series.shape[0]
        if page is not None and single:
            source, axes = series.pages[page], axes[1:]
        try:
            array = source.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            # LZW, JPEG and the like, for which Pillow brings its own decoders.
            array, axes = _tiff_by_pillow(path), "QYX" + "S" * ("S" in axes)
        alpha = len(keyframe.extrasamples) == 1 and keyframe.extrasamples[0] in (1, 2)
    if alpha and "S" in axes:
        array = np.delete(array, -1, axes.index("S"))
    return array, axes, palette


def tiff_header(path: Path) -> tuple[Shape, str]:
    """(shape, axes) of a TIFF file's first series, without its pixels."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        _check_last_page(tiff, str(path))
        return tuple(tiff.series[0].shape), tiff.series[0].axes


def pillow_size(file: Any) -> Shape:
    """(H, W) of an open png, jpg, bmp or gif file, upright, without its pixels."""
    from PIL import Image

    with Image.open(file) as image:
        width, height = image.size
        return (width, height) if _orientation(image) > 4 else (height, width)


def one_page(shape: Shape, axes: str, name: str) -> tuple[Shape, tuple[int, ...]]:
    """Where the rows, columns and channels of a single image are.

    Args:
        shape, axes: as `tiff_header` gives them.
        name: the file, for the message.

    Returns:
        ``((H, W), order)``: transposed by ``order``, the last axes are rows, columns
        and channels, and those before have length 1.

    Raises:
        InputError: more than one page.
    """
    length = dict(zip(axes, shape, strict=True))
    pages = int(
        np.prod([n for axis, n in zip(axes, shape, strict=True) if axis not in "YXSC"])
    )
    if pages != 1:
        raise InputError(
            f"{name} is a stack of {pages} pages: read stacks with the source "
            "`volumes`, or save the pages as single images."
        )
    order = sorted(range(len(axes)), key=lambda i: "YXCS".find(axes[i]))
    return (length["Y"], length["X"]), tuple(order)


def load_pillow(file: Any, name: str) -> Pixels:
    """The first frame of an open png, jpg, bmp or gif file called ``name``."""
    from PIL import Image, ImageOps

    try:
        image = Image.open(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name) from error
    with image:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise _too_large(name)
        if image.format == "PNG" and image.tile:
            raw = str(image.tile[0].args)
            if raw.endswith(";16B") and raw != "I;16B":
                return _sixteen_bits(image, file, raw)
        else:
            raw = ""
        if image.mode in ("P", "PA"):
            palette = np.zeros((256, 3), np.uint8)
            colours = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            palette[: len(colours)] = colours
            index = np.asarray(image)
            return Pixels(
                index.reshape(image.height, image.width, -1)[..., :1], palette
            )
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBX"):
            image = image.convert("RGB")
        array = np.asarray(image)
        if array.ndim == 2:
            array = array[..., None]
        if image.mode in ("LA", "La", "RGBA", "RGBa"):
            array = array[..., :-1]
        # Pillow stretches 2- and 4-bit grey to 0 .. 255.
        return Pixels(array, scale={"L;2": 85, "L;4": 17}.get(raw, 1))


def _sixteen_bits(image: Any, file: Any, raw: str) -> Pixels:
    """A 16-bit PNG with more than one channel, of which Pillow keeps the high bytes.

    Decoding it once as big-endian and once as little-endian numbers gives both bytes.
    """
    from PIL import Image

    if raw == "LA;16B":
        # Four bytes a pixel, which Pillow can hand over as they are.
        image.tile = [image.tile[0]._replace(args="RGBA")]
        both = np.asarray(image).astype(np.uint16)
        return Pixels(both[..., :1] << 8 | both[..., 1:2])
    high = np.asarray(image).astype(np.uint16)
    file.seek(0)
    with Image.open(file) as again:
        again.tile = [again.tile[0]._replace(args=raw.replace("16B", "16L"))]
        low = np.asarray(again).astype(np.uint16)
    return Pixels((high << 8 | low)[..., :3])


def _check_last_page(tiff: Any, name: str) -> None:
    """Refuses a file whose last page points to another one that is not there.

    tifffile only logs that and gives out the pages before.
    """
    last, form, file = tiff.pages[-1], tiff.tiff, tiff.filehandle
    file.seek(last.offset)
    (tags,) = struct.unpack(form.tagnoformat, file.read(form.tagnosize))
    file.seek(last.offset + form.tagnosize + tags * form.tagsize)
    (following,) = struct.unpack(form.offsetformat, file.read(form.offsetsize))
    if following != 0:
        raise InputError(
            f"{name} cannot be read (its page {len(tiff.pages)} is missing): it was "
            "cut short, so copy or save it anew, or leave it out."
        )


def _tiff_by_pillow(path: Path) -> NumpyArray:
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        tags: Any = getattr(image, "tag_v2", {})
        white_is_zero = tags.get(262) == 0
        pages = []
        for page in ImageSequence.Iterator(image):
            array = np.asarray(page)
            # Pillow shows such a page as it looks; tifffile and we, as it is stored.
            pages.append(~array if white_is_zero and array.dtype != ">u2" else array)
    return np.stack(pages)


def _orientation(image: Any) -> int:
    return image.getexif().get(0x0112, 1) if image.format in ("JPEG", "MPO") else 1


def _too_large(name: str) -> InputError:
    return InputError(
        f"{name} has more pixels than Pillow decodes safely: cut it into smaller "
        "images, or save it as .npy or uncompressed .tif."
    )


def reason(error: Exception) -> str:
    """What a library said, short enough to stand inside a sentence."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image of a known format"
    text = str(error).strip().split("\n")[0].rstrip(".")
    return text[:160] or type(error).__name__
