"""One look at every mask file as it is stored: its size, its values, what is odd."""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from unet_jax.data import formats, images, stacks
from unet_jax.inspection.layout import suffix_of
from unet_jax.inspection.listing import Pair
from unet_jax.inspection.values import Histogram
from unet_jax.types import InputError, NumpyArray, Shape

# Of a mask with more values than this, the commonest are kept: it is a picture.
MOST_VALUES = 4096
# Masks in which connected pieces are counted, and values of each.
PIECES_OF, PIECES_EACH = 40, 8
MOST_PIXELS = 2**24  # beyond, this would take longer than it is worth
# Of masks of one object each, so many an image; their source reads them all.
OBJECTS = 4
PICTURE = 16  # values from which on a mask may be a copy of its image


@dataclasses.dataclass(frozen=True)
class MaskLook:
    """What one pair of files has to say, without the pixels.

    ``name``: of the image, below the root.
    ``masks``: how many mask files.
    ``size``, ``image_size``: spatial shapes; () if not read.
    ``error``: the sentence of what could not be read, or "".
    ``values``: pixels of each value of all its mask files.
    """

    name: str
    masks: int
    size: Shape = ()
    image_size: Shape = ()
    error: str = ""
    values: Counter[int] = dataclasses.field(default_factory=Counter)
    coloured: bool = False
    palette: bool = False
    lossy: bool = False
    planes: int = 0
    white: int = 255
    consecutive: bool | None = None
    pieces: float = 0.0
    thin: tuple[int, int] = (0, 0)
    copy: bool = False
    alpha: bool = False
    spacing: tuple[float, ...] = ()


def look(
    pairs: Sequence[Pair],
    *,
    volumes: bool,
    objects: bool = False,
    done: Callable[[], None] = lambda: None,
) -> list[MaskLook]:
    """Looks at the masks of each pair, one pair at a time in each of four threads.

    Args:
        pairs: what to look at.
        volumes: whether the files are stacks or volumes.
        objects: whether a mask file is one object; of each image a few are looked at.
        done: called after each pair.
    """
    few = OBJECTS if objects else sys.maxsize
    some = (
        {int(i) for i in np.linspace(0, len(pairs) - 1, PIECES_OF)} if pairs else set()
    )

    def one(number: int) -> MaskLook:
        try:
            found = _look(pairs[number], volumes, number in some, few)
        except InputError as error:
            pair = pairs[number]
            found = MaskLook(pair.name, len(pair.masks), error=str(error))
        done()
        return found

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, range(len(pairs))))


def pooled(looks: Sequence[MaskLook]) -> Histogram:
    """The values of all masks together; a grey mask among coloured ones counts too."""
    pixels, files = Counter[int](), Counter[int]()
    coloured = any(found.coloured for found in looks)
    for found in looks:
        values = found.values
        if coloured and not found.coloured:
            values = {v * 0x010101: n for v, n in values.items() if 0 <= v < 256}
        pixels.update(values)
        files.update(values.keys())
    read = [found for found in looks if found.values]
    numbered = [found.consecutive for found in read if found.consecutive is not None]
    pieces = [found.pieces for found in read if found.pieces]
    near, all_255 = (sum(found.thin[i] for found in read) for i in (0, 1))
    return Histogram(
        pixels,
        files,
        len(read),
        coloured,
        any(found.lossy for found in read),
        any(found.palette for found in read),
        max((found.white for found in read), default=255),
        sum(numbered) / len(numbered) if numbered else 0.0,
        float(np.mean(pieces)) if pieces else 0.0,
        near / all_255 if all_255 else 0.0,
    )


def _look(pair: Pair, volumes: bool, pieces: bool, few: int) -> MaskLook:
    values: Counter[int] = Counter()
    sizes, details = set[Shape](), {}
    spacing: tuple[float, ...] = ()
    if volumes:
        image_size, geometry = stacks.volume_size(pair.image)
        spacing = geometry.spacing if geometry is not None else ()
    else:
        image_size = images.image_size(pair.image)
    spread = np.linspace(0, len(pair.masks) - 1, min(len(pair.masks), few))
    for path in (pair.masks[i] for i in spread.astype(int)):
        mask, planes = _read(path, volumes)
        rank = 3 if volumes else 2
        sizes.add(mask.shape[:rank])
        coloured = mask.ndim > rank and not planes
        if coloured:
            mask = mask[..., 0] << 16 | mask[..., 1] << 8 | mask[..., 2]
        counts = _counts(mask)
        details["planes"] = planes
        details["coloured"] = coloured or details.get("coloured", False)
        if mask.dtype.kind == "u" and not coloured:
            details["white"] = min(int(np.iinfo(mask.dtype).max), 65535)
        values.update(dict(counts.most_common(MOST_VALUES)))
        if len(pair.masks) == 1 and not coloured and not planes:
            details |= _details(mask, counts, pieces)
            details["copy"] = _is_copy(pair, mask, counts, volumes)
        if len(counts) == 1 and not volumes:
            details["alpha"] = details.get("alpha", False) or _in_alpha(path)
    if len(sizes) > 1:
        raise InputError(
            f"The masks of {pair.image} have {len(sizes)} different sizes: give all of"
            " them the size of the image."
        )
    suffixes = {suffix_of(path.name) for path in pair.masks}
    return MaskLook(
        pair.name,
        len(pair.masks),
        next(iter(sizes), ()),
        image_size,
        values=values,
        palette=not volumes and _has_palette(pair.masks[0]),
        lossy=bool(suffixes & set(images.LOSSY)),
        spacing=spacing,
        **details,
    )


def _read(path: Path, volumes: bool) -> tuple[NumpyArray, int]:
    """(mask, planes): a file of as many labels as channels, where it is no colour."""
    if volumes:
        return _wide(stacks.read_mask(path)), 0
    if suffix_of(path.name) == ".npy":
        array = images.read_image(path)
        if array.shape[-1] not in (1, 3):
            return array.astype(np.int64), array.shape[-1]
    return _wide(images.read_mask(path)), 0


def _wide(mask: NumpyArray) -> NumpyArray:
    """Colours need room to be packed; numbers stay as they are."""
    return mask.astype(np.int32) if mask.shape[-1:] == (3,) and mask.ndim > 2 else mask


def _counts(mask: NumpyArray) -> Counter[int]:
    if mask.dtype.kind == "u" and mask.dtype.itemsize <= 2:
        counts = np.bincount(mask.ravel())
        values = np.flatnonzero(counts)
        counts = counts[values]
    else:
        values, counts = np.unique(mask, return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def _details(mask: NumpyArray, counts: Counter[int], pieces: bool) -> dict[str, object]:
    """How a mask of numbers counts: in a row, in pieces, with a thin border of 255."""
    details: dict[str, object] = {}
    beside = sorted(v for v in counts if v != 0)
    if not beside:
        return details
    details["consecutive"] = beside == list(range(1, len(beside) + 1))
    if mask.size > MOST_PIXELS:
        return details
    if pieces and len(beside) > 1:
        from scipy import ndimage

        spread = np.linspace(0, len(beside) - 1, PIECES_EACH).astype(int)
        some = [beside[i] for i in sorted(set(spread.tolist()))]
        around = np.ones((3,) * mask.ndim)
        labelled: list[Any] = [ndimage.label(mask == v, around) for v in some]
        details["pieces"] = float(np.mean([count for _, count in labelled]))
    if 255 in counts and 1 < len(counts) < MOST_VALUES:
        from scipy import ndimage

        void = mask == 255
        inner = ndimage.binary_erosion(void, iterations=2, border_value=1)
        details["thin"] = (int(void.sum() - inner.sum()), int(void.sum()))
    return details


def _is_copy(pair: Pair, mask: NumpyArray, counts: Counter[int], volumes: bool) -> bool:
    """Whether a mask of many values is its image once more."""
    if len(counts) < PICTURE:
        return False
    if volumes:
        image, _ = stacks.read_volume(pair.image)
    else:
        image = images.read_image(pair.image)
    same = image.shape[:-1] == mask.shape and (image == mask[..., None]).all()
    return bool(same)


def _in_alpha(path: Path) -> bool:
    """Whether a mask of one colour is drawn in its alpha channel."""
    if suffix_of(path.name) not in (".png", ".tif", ".tiff", ".gif"):
        return False
    from PIL import Image

    try:
        with Image.open(path, formats=(*formats.PILLOW, "TIFF")) as picture:
            if "A" not in picture.getbands():
                return False
            low, high = picture.getchannel("A").getextrema()
    except Exception:  # a decoder may raise anything, and the file was read before
        return False
    return low != high


def _has_palette(path: Path) -> bool:
    """Whether a picture stores indices beside their colours."""
    if suffix_of(path.name) not in (".png", ".gif", ".bmp"):
        return False
    from PIL import Image

    try:
        with Image.open(path, formats=formats.PILLOW) as picture:
            return picture.mode == "P"
    except Exception:  # as above
        return False
