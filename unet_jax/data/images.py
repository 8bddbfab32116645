"""Images and masks in files, read exactly as they are stored, and labels written.

A mask is numbers and not a picture: where both are read from the same kind of file, a
palette image gets its colours and a palette mask keeps its index.
"""

import io
from pathlib import Path

import numpy as np

from unet_jax.data import formats, tiff
from unet_jax.types import InputError, NumpyArray, Shape

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy", ".bmp", ".gif")
LOSSY = (".jpg", ".jpeg")


def read_image(path: str | Path, *, channels: int = 0) -> NumpyArray:
    """Reads one 2-D image.

    Args:
        path: a png, jpg, tif, npy, bmp or gif file. Alpha is dropped, a palette becomes
            RGB, CMYK becomes RGB, a 1-bit image becomes 0 and 255, and the EXIF
            orientation of a photograph is applied. A npy array is ``[H, W]`` or
            ``[H, W, C]``.
        channels: 0 for those of the file, else see `to_channels`. Where a file has
            this many it is read so: N pages of a TIFF are N channels, as are ``[N, H,
            W]`` in npy, and alpha counts as one.

    Returns:
        ``[H, W, C]``: u8 or u16 as stored; any other number type as f32.

    Raises:
        InputError: missing, damaged or cut short; more than one page; more pixels than
            Pillow decodes safely; NaN or infinite pixels.
    """
    path = Path(path)
    return _image(_load(path, channels), str(path), channels)


def decode_image(data: bytes, name: str, *, channels: int = 0) -> NumpyArray:
    """`read_image` of a file's bytes; ``name`` is what messages call it."""
    with formats.readable(name):
        pixels = formats.load_pillow(io.BytesIO(data), name)
    return _image(pixels, name, channels)


def read_mask(path: str | Path) -> NumpyArray:
    """Reads one mask file as numbers, not as colours to look at.

    Args:
        path: a file as for `read_image`.

    Returns:
        ``[H, W]`` whole numbers as stored (u8, u16, i32 ...): the index of a palette
        file, 0 and 1 of a 1-bit file, the grey value of one whose three channels are
        equal everywhere; or ``[H, W, 3]`` for colours. Alpha is dropped.

    Raises:
        InputError: as `read_image`, or numbers that are not whole, or 2 or more than 3
            channels.
    """
    path = Path(path)
    return _mask(_load(path), str(path))


def decode_mask(data: bytes, name: str) -> NumpyArray:
    """`read_mask` of a file's bytes; ``name`` is what messages call it."""
    with formats.readable(name):
        pixels = formats.load_pillow(io.BytesIO(data), name)
    return _mask(pixels, name)


def read_planes(path: str | Path) -> NumpyArray:
    """Reads a mask file whose channels are labels.

    Args:
        path: a file as for `read_image`; the pages of a TIFF are channels too.

    Returns:
        ``[H, W, K]`` whole numbers as stored, alpha among them.

    Raises:
        InputError: as `read_mask`.
    """
    path = Path(path)
    pixels = _load(path, -1)
    return _whole(pixels.array, str(path)) // pixels.scale


def image_size(path: str | Path, *, channels: int = 0) -> Shape:
    """(H, W) of what the readers return, from the header if possible.

    Args:
        path: the file.
        channels: as for `read_image`; -1 as `read_planes` reads it.

    Raises:
        InputError: missing or damaged, or more than one page.
    """
    path = Path(path)
    name, suffix = str(path), path.suffix.lower()
    with formats.readable(name):
        formats.file_size(path)
        if suffix == ".npy":
            shape = formats.npy_header(path)[0]
            return shape[slice(*_npy_rows(shape, channels, name))]
        if suffix in (".tif", ".tiff"):
            return tiff.one_image(*tiff.header(path), name, channels)[0]
        with path.open("rb") as file:
            return formats.pillow_size(file)


def to_channels(
    image: NumpyArray, channels: int, *, name: str = "The image"
) -> NumpyArray:
    """Converts between grey and RGB and drops alpha.

    Args:
        image: ``[*S, C]``, any dtype. C of 2 and 4 counts as grey and RGB with alpha
            when another number of channels is asked for.
        channels: 0 or C leaves the image as it is. RGB to grey takes the weights
            0.299, 0.587 and 0.114 (ITU-R BT.601), rounded for whole numbers; grey to
            RGB repeats.
        name: what the message calls it.

    Returns:
        ``[*S, channels]`` of the same dtype.

    Raises:
        InputError: no such conversion.
    """
    have = image.shape[-1]
    if channels in (0, have):
        return image
    if channels not in (1, 3) or have > 4:
        raise InputError(
            f"{name} has {have} channels, which cannot become {channels}: set "
            f"`channels` to {have}, or to 0 to take them from the files."
        )
    if have in (2, 4):
        image = image[..., : have - 1]
    if image.shape[-1] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=-1)
    grey = image.astype(np.float32) @ np.asarray([0.299, 0.587, 0.114], np.float32)
    if image.dtype.kind in "iu":
        grey = np.rint(grey)
    return grey.astype(image.dtype)[..., None]


def write_label(path: str | Path, label: NumpyArray) -> None:
    """Writes class ids, one whole number a pixel, without colours.

    Args:
        path: .png for a 2-D label, .tif or .npy for any rank (a 3-D tif has one page
            for each index of the first axis).
        label: ``[H, W]`` or ``[D, H, W]`` whole numbers from 0 to 65535; written as u8
            when all are below 256, else as u16.

    Raises:
        InputError: the file cannot be written, or its ending is another one.
    """
    path = Path(path)
    label = as_ids(np.asarray(label), str(path))
    suffix = path.suffix.lower()
    with formats.writable(str(path)):
        if suffix == ".npy":
            np.save(path, label)
        elif suffix in (".tif", ".tiff") and label.ndim in (2, 3):
            import tifffile

            tifffile.imwrite(path, label, photometric="minisblack", compression="zlib")
        elif suffix == ".png" and label.ndim == 2:
            from PIL import Image

            Image.fromarray(label).save(path)
        else:
            raise InputError(
                f"{path} cannot hold a {label.ndim}-D label: write .png for 2-D, .tif "
                "or .npy for any."
            )


def stored(array: NumpyArray, name: str) -> NumpyArray:
    """An image array in one of the three dtypes of a batch.

    Returns:
        u8 and u16 as they are, bool as u8 0 and 255, every other number as f32.

    Raises:
        InputError: NaN, infinite or complex pixels.
    """
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind not in "iuf":
        raise InputError(f"{name} holds {array.dtype} values: save it as real numbers.")
    with np.errstate(over="ignore", invalid="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        count = int(array.size - np.isfinite(array).sum())
        raise InputError(
            f"{name} has NaN or infinite pixels ({count} of {array.size} values): "
            "replace them in the file or leave it out."
        )
    return array


def as_mask(array: NumpyArray, name: str) -> NumpyArray:
    """A decoded mask as whole numbers in native byte order.

    Args:
        array: ``[*S, C]`` of 1 or 3 channels.
        name: the mask file, for messages.

    Returns:
        ``[*S]``, also where three channels are equal everywhere, else ``[*S, 3]``.

    Raises:
        InputError: a value that is not a whole number, or another number of channels.
    """
    if array.shape[-1] not in (1, 3):
        raise InputError(
            f"The mask {name} has {array.shape[-1]} channels: save one of class ids, "
            "or three of colours."
        )
    array = _whole(array, name)
    grey = array[..., 0]
    if array.shape[-1] == 3 and not all((grey == array[..., c]).all() for c in (1, 2)):
        return array
    return np.ascontiguousarray(grey)


def as_ids(label: NumpyArray, name: str) -> NumpyArray:
    """Class ids in the smallest type a file holds: u8, or u16 from 256 on.

    Raises:
        InputError: ids that are negative or above 65535.
    """
    low, high = label.min(initial=0), label.max(initial=0)
    if low < 0 or high >= 2**16:
        raise InputError(
            f"{name} would hold labels from {low} to {high}: a file has room for 0 to "
            "65535."
        )
    return label.astype(np.uint8 if high < 256 else np.uint16)


def _load(path: Path, channels: int = 0) -> formats.Pixels:
    """A decoded file; ``channels`` as for `tiff.one_image`."""
    name, suffix = str(path), path.suffix.lower()
    with formats.readable(name):
        formats.file_size(path)
        if suffix == ".npy":
            array = formats.load_npy(path)
            if _npy_rows(array.shape, channels, name)[0]:
                array = np.moveaxis(array, 0, -1)
            return formats.Pixels(array if array.ndim == 3 else array[..., None])
        if suffix in (".tif", ".tiff"):
            stack = tiff.load(path)
            size, order = tiff.one_image(stack.array.shape, stack.axes, name, channels)
            array = stack.array.transpose(order).reshape(*size, -1)
            alpha = stack.alpha and array.shape[-1] > 1
            return formats.Pixels(array, stack.palette, alpha=alpha)
        with path.open("rb") as file:
            return formats.load_pillow(file, name)


def _npy_rows(shape: Shape, channels: int, name: str) -> tuple[int, int]:
    """Which axes of a npy array are rows and columns: the first two or the last."""
    if len(shape) not in (2, 3) or 0 in shape:
        raise InputError(
            f"{name} holds an array of the shape {shape}: an image is height x width "
            "or height x width x channels."
        )
    first = len(shape) == 3 and shape[0] == channels != shape[-1]
    return (1, 3) if first else (0, 2)


def _whole(array: NumpyArray, name: str) -> NumpyArray:
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype.kind in "iu":
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind != "f":
        raise InputError(f"The mask {name} holds {array.dtype} values: save class ids.")
    with np.errstate(invalid="ignore"):
        bad = ~np.isfinite(array) | (array != np.rint(array))
    bad |= np.abs(array) > 2**31 - 1
    if bad.any():
        raise InputError(
            f"The mask {name} has the value {array[bad].flat[0]:g}: save class ids as "
            "whole numbers."
        )
    return array.astype(np.int32)


def _image(pixels: formats.Pixels, name: str, channels: int) -> NumpyArray:
    array = pixels.array
    if pixels.palette is not None:
        array = pixels.palette[array[..., 0]]
    elif array.shape[-1] != channels:
        array = pixels.without_alpha()
    return to_channels(stored(array, name), channels, name=name)


def _mask(pixels: formats.Pixels, name: str) -> NumpyArray:
    return as_mask(pixels.without_alpha(), name) // pixels.scale
