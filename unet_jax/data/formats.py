"""File formats of pixels: what decoders hand over, made unambiguous and kept in bounds.

What differs between decoders and changes the pixels in silence is settled here:
palettes stay indices beside their colours, 16-bit colour PNGs keep 16 bits, 2- and
4-bit grey says by how much it was stretched, alpha is marked, a photograph is turned
upright. What a header announces is compared with the memory before it is decoded, and
every failure of a decoder becomes one sentence. `tiff` has the TIFF files.
"""

import contextlib
import logging
import re
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from unet_jax.data import trust
from unet_jax.types import InputError, NumpyArray, Shape

# From this many bytes on, arrays that lie in a file as in memory are mapped, so that a
# crop reads what it touches. Not smaller ones: a file that is cut short in place while
# it is mapped kills the process, where reading it would end in a sentence.
MAP_FROM = 2**26
# What Pillow may try: others, EPS among them, start programs or read further files.
PILLOW = ("PNG", "JPEG", "BMP", "GIF", "WEBP")


class Pixels(NamedTuple):
    """A decoded file before it is read as an image or as a mask.

    ``array``: ``[H, W, C]``, any real dtype, native byte order.
    ``palette``: ``u8[256, 3]`` (65536 for u16) where ``array`` holds indices into it.
    ``scale``: what the decoder multiplied the stored numbers by (2- and 4-bit grey).
    ``alpha``: whether the last channel is alpha.
    """

    array: NumpyArray
    palette: NumpyArray | None = None
    scale: int = 1
    alpha: bool = False

    def without_alpha(self) -> NumpyArray:
        """``array`` with one channel less where the last one is alpha."""
        return self.array[..., :-1] if self.alpha else self.array


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


def file_size(path: Path) -> int:
    """The bytes of a file that can be read to its end.

    Raises:
        InputError: a folder, or a pipe or device, on which a reader would wait.
    """
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise InputError(f"{path} cannot be read (not a file): leave it out.")
    return info.st_size


def npy_header(path: Path) -> tuple[Shape, np.dtype[Any], bool, int]:
    """(shape, dtype, whether in Fortran order, offset of the numbers) of a npy file.

    Raises:
        InputError: not a npy file, or one of objects, or shorter than it says.
    """
    size, name = file_size(path), str(path)
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        width = 2 if version == (1, 0) else 4
        start = file.tell()
        length = int.from_bytes(file.read(width), "little")
        if version[0] not in (1, 2, 3) or length > min(10_000, size):
            raise InputError(
                f"{name} cannot be read (it has a header of {length} bytes): save it "
                "with numpy.save, or leave it out."
            )
        file.seek(start)
        read = np.lib.format
        of = read.read_array_header_2_0 if width == 4 else read.read_array_header_1_0
        shape, fortran, dtype = of(file)
        offset = file.tell()
    if dtype.hasobject:
        raise InputError(
            f"{name} cannot be read (it holds Python objects, which would be run): "
            "save it as an array of numbers."
        )
    trust.check_bytes(shape, dtype.itemsize, name)
    need = offset + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if need > size:
        raise InputError(
            f"{name} cannot be read (it has {size} bytes of {need}): it was cut short, "
            "so copy or save it anew, or leave it out."
        )
    return shape, dtype, fortran, offset


def load_npy(path: Path, page: int | None = None) -> NumpyArray:
    """The array of a npy file, or one index of its first axis; a large one is mapped.

    Raises:
        InputError: as `npy_header`.
    """
    shape, dtype, fortran, offset = npy_header(path)
    large = int(np.prod(shape, dtype=object)) * dtype.itemsize >= MAP_FROM
    if not large and page is None:
        return np.load(path, allow_pickle=False)
    if 0 in shape or not shape:
        return np.zeros(shape, dtype)
    order = "F" if fortran else "C"
    # "c": what is written to the array stays out of the file.
    array = np.memmap(path, dtype, "c", offset, shape, order).view(np.ndarray)
    return array if page is None else np.array(array[page])


def pillow_size(file: Any) -> Shape:
    """(H, W) of an open png, jpg, bmp or gif file, upright, without its pixels."""
    with _pillow().open(file, formats=PILLOW) as image:
        width, height = image.size
        return (width, height) if _orientation(image) > 4 else (height, width)


def load_pillow(file: Any, name: str) -> Pixels:
    """The first frame of an open png, jpg, bmp or gif file called ``name``."""
    from PIL import ImageOps

    Image = _pillow()
    try:
        image = Image.open(file, formats=PILLOW)
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    with image:
        _check_pillow(image, name)
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
        alpha = image.mode in ("LA", "La", "RGBA", "RGBa")
        # Pillow stretches 2- and 4-bit grey to 0 .. 255.
        return Pixels(array, scale={"L;2": 85, "L;4": 17}.get(raw, 1), alpha=alpha)


def load_pillow_pages(path: Path, name: str) -> NumpyArray:
    """All pages of a TIFF file by Pillow, ``[pages, H, W]`` or ``[pages, H, W, S]``."""
    from PIL import ImageSequence

    Image = _pillow()
    with Image.open(path, formats=("TIFF",)) as image:
        tags: Any = getattr(image, "tag_v2", {})
        white_is_zero = tags.get(262) == 0
        pages = []
        for page in ImageSequence.Iterator(image):
            _check_pillow(page, name, pages=image.n_frames)
            array = np.asarray(page)
            # Pillow shows such a page as it looks; tifffile and we, as it is stored.
            pages.append(~array if white_is_zero and array.dtype != ">u2" else array)
    return np.stack(pages)


def _sixteen_bits(image: Any, file: Any, raw: str) -> Pixels:
    """A 16-bit PNG with more than one channel, of which Pillow keeps the high bytes.

    Decoding it once as big-endian and once as little-endian numbers gives both bytes.
    """
    if raw == "LA;16B":
        # Four bytes a pixel, which Pillow can hand over as they are.
        image.tile = [image.tile[0]._replace(args="RGBA")]
        both = np.asarray(image).astype(np.uint16)
        return Pixels(both[..., ::2] << 8 | both[..., 1::2], alpha=True)
    high = np.asarray(image).astype(np.uint16)
    file.seek(0)
    with _pillow().open(file, formats=("PNG",)) as again:
        again.tile = [again.tile[0]._replace(args=raw.replace("16B", "16L"))]
        low = np.asarray(again).astype(np.uint16)
    return Pixels(high << 8 | low, alpha=high.shape[-1] == 4)


def _pillow() -> ModuleType:
    """PIL.Image, whose warnings and logs about files are not shown.

    A file that Pillow warns of is either read or refused with a sentence. Suppressing
    them where an image is opened would not do: that is not safe among threads.
    """
    from PIL import Image

    quiet = re.compile(r"PIL\.")
    if not any(f[0] == "ignore" and f[3] == quiet for f in warnings.filters):
        warnings.filterwarnings("ignore", module=quiet.pattern)
    silence("PIL")
    return Image


def silence(library: str) -> None:
    """Keeps a decoder's log about damaged files to itself, unless a level was set.

    Such lines name neither file nor remedy; what matters is raised.
    """
    logger = logging.getLogger(library)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)


def _check_pillow(image: Any, name: str, pages: int = 1) -> None:
    """Refuses more pixels than Pillow thinks safe, or than fit the memory."""
    limit = _pillow().MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise _too_large(name)
    # 16-bit colour is decoded twice.
    trust.check_bytes((pages, image.height, image.width, 4), 2, name)


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
