"""Objects given by outlines or by runs of pixels, as COCO writes them, filled in.

Coordinates count pixels from the upper left corner of the image, x to the right and y
down: the pixel in row r and column c covers c .. c+1 and r .. r+1, and belongs to a
polygon if its centre (c + 0.5, r + 0.5) lies within. Polygons that share an edge share
no pixel and leave none out. (Pillow draws whole pixels only, and the outline as well.)

Runs are lengths of pixels without and with the object by turns, beginning without, down
the columns from the left, which COCO calls RLE.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unet_jax.types import InputError, NumpyArray, Shape, size_text

# No outline crosses the rows of an image so often; one made to fill the memory might.
MOST_CROSSINGS = 10_000_000
# 5 bits a character: lengths beyond 50 bits are no number of pixels.
MOST_CHARACTERS = 10


class Patch(NamedTuple):
    """The part of an image that holds an object, ``image[rows, columns]``.

    ``inside``: ``bool`` of that part's size, which pixels are the object's.
    """

    rows: slice
    columns: slice
    inside: NumpyArray


def read_polygon(part: Any, where: str) -> NumpyArray:
    """One closed outline.

    Args:
        part: ``[x0, y0, x1, y1, ...]`` as JSON has it.
        where: the file and entry, for messages.

    Returns:
        ``f64[N, 2]``, N of 3 or more.

    Raises:
        InputError: anything else, an odd count, or numbers that are not finite.
    """
    try:
        numbers = np.asarray(part)
    except (ValueError, OverflowError):  # lists of several lengths
        numbers = np.empty(0, object)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iuf":
        raise InputError(
            f"{where} has a polygon that is no list of numbers: write x0, y0, x1, y1 "
            "and so on."
        )
    if len(numbers) < 6 or len(numbers) % 2:
        raise InputError(
            f"{where} has a polygon of {len(numbers)} numbers: three points or more "
            "need an even count of 6 or more."
        )
    if not np.isfinite(numbers).all():
        raise InputError(
            f"{where} has a polygon with NaN or infinite coordinates: mend or remove "
            "it."
        )
    return numbers.astype(np.float64).reshape(-1, 2)


def check_polygon(polygon: NumpyArray, shape: Shape, where: str) -> None:
    """Refuses an outline that was not drawn on an image of this size.

    Args:
        polygon: ``f64[N, 2]``, x and y of each corner.
        shape: (H, W) of the image.
        where: the file and entry, for messages.

    Raises:
        InputError: a corner further out of the image than the image is long.
    """
    long = np.asarray(shape[::-1], np.float64)
    bad = ((polygon < -long) | (polygon > 2 * long)).any(-1)
    if bad.any():
        x, y = polygon[bad][0]
        raise InputError(
            f"{where} has the corner x={x:g}, y={y:g}, far outside of its image of "
            f"{size_text(shape)} pixels (rows first): mend or remove it."
        )


def fill(polygon: NumpyArray, shape: Shape, where: str = "The polygon") -> Patch:
    """The pixels whose centre lies inside an outline, by the even-odd rule.

    Args:
        polygon: ``f64[N, 2]``, finite; what is outside of the image is cut off.
        shape: (H, W) of the image.
        where: the file and entry, for messages.

    Raises:
        InputError: an outline that crosses the rows more than `MOST_CROSSINGS` times.
    """
    height, width = shape
    upper, lower = polygon, np.roll(polygon, -1, 0)
    # From above to below, so that both neighbours of an edge compute it alike.
    turned = upper[:, 1] > lower[:, 1]
    upper, lower = (
        np.where(turned[:, None], lower, upper),
        np.where(turned[:, None], upper, lower),
    )
    first, end = (
        np.ceil(y - 0.5).clip(0, height).astype(np.int64)
        for y in (upper[:, 1], lower[:, 1])
    )
    count = end - first
    total = int(count.sum())
    if total > MOST_CROSSINGS:
        raise InputError(
            f"{where} has an outline that crosses {total} rows of pixels, too many to "
            "fill: remove it."
        )
    edge = np.repeat(np.arange(len(count)), count)
    row = np.arange(total) - np.repeat(np.cumsum(count) - count - first, count)
    x, y = upper[edge].T
    x = x + (row + 0.5 - y) * ((lower[edge, 0] - x) / (lower[edge, 1] - y))
    column = np.ceil(x - 0.5).clip(0, width).astype(np.int64)
    if not total:
        return _nothing()
    top, left = int(row.min()), int(column.min())
    size = (int(row.max()) - top + 1, int(column.max()) - left)
    # One change of side for each crossing; numbers may wrap, for only odd ones count.
    changes = np.zeros((size[0], size[1] + 1), np.uint8)
    np.add.at(changes, (row - top, column - left), 1)
    inside = np.cumsum(changes[:, :-1], axis=1, dtype=np.uint8) % 2 == 1
    return Patch(slice(top, top + size[0]), slice(left, left + size[1]), inside)


def read_runs(rle: Any, where: str) -> tuple[NumpyArray, Shape]:
    """The runs of an object.

    Args:
        rle: ``{"size": [H, W], "counts": ...}`` as JSON has it, the counts a list, or
            the text that COCO packs them into.
        where: the file and entry, for messages.

    Returns:
        ``(counts i64[N], (H, W))``; the counts add up to H W.

    Raises:
        InputError: anything else.
    """
    size, counts = (rle.get(key) for key in ("size", "counts"))
    if not (
        isinstance(size, list)
        and len(size) == 2
        and all(type(n) is int and 0 < n < 2**31 for n in size)
    ):
        raise InputError(
            f"{where} has the RLE size {size!r:.60}: give the image's height and width."
        )
    if isinstance(counts, str):
        counts = unpack(counts, where)
    if not isinstance(counts, list) or not all(
        type(n) is int and abs(n) < 2**62 for n in counts
    ):
        raise InputError(
            f"{where} has RLE counts that are neither whole numbers nor their packed "
            "text: export the annotations anew."
        )
    if sum(counts) != size[0] * size[1] or min(counts) < 0:
        raise InputError(
            f"{where} has RLE counts that add up to {sum(counts)}, with "
            f"{min(counts, default=0)} the least of them, but should be 0 or more and "
            f"add up to {size[0]} x {size[1]}: export the annotations anew."
        )
    return np.asarray(counts, np.int64), (size[0], size[1])


def unpack(text: str, where: str = "The RLE") -> list[int]:
    """The counts in COCO's packed text.

    A number is 5 bits a character, low bits first, of which the sixth bit says that
    more follow and the highest is the sign. From the fourth on, numbers are what a run
    is longer than the one before the last.

    Raises:
        InputError: a character that is none of the 64, or an end within a number.
    """
    counts: list[int] = []
    value = place = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or place == MOST_CHARACTERS:
            break
        value |= (bits & 31) << 5 * place
        place += 1
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << 5 * place
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = place = 0
    else:
        if not place:
            return counts
    raise InputError(
        f"{where} has packed RLE counts that cannot be read: export the annotations "
        "anew."
    )


def from_runs(counts: NumpyArray, shape: Shape) -> Patch:
    """The pixels of runs.

    Args:
        counts: ``i64[N]``, 0 or more, adding up to H W.
        shape: (H, W) of the image.
    """
    height = shape[0]
    ends = np.cumsum(counts)
    start, end = ends[:-1:2], ends[1::2]
    start, end = start[end > start], end[end > start]
    if not len(start):
        return _nothing()
    left, right = int(start[0]) // height, -(-int(end[-1]) // height)
    changes = np.zeros((right - left) * height + 1, np.int8)
    # One after the other: a run may begin where the one before it ends.
    changes[start - left * height] += 1
    changes[end - left * height] -= 1
    inside = np.cumsum(changes[:-1], dtype=np.int8).reshape(-1, height).T == 1
    return Patch(slice(0, height), slice(left, right), inside)


def union(patches: Sequence[Patch]) -> Patch:
    """The pixels of any of one or more patches."""
    if len(patches) == 1:
        return patches[0]
    full = [patch for patch in patches if patch.inside.size]
    if not full:
        return _nothing()
    (top, bottom), (left, right) = (
        (min(s.start for s in sides), max(s.stop for s in sides))
        for sides in zip(*((patch.rows, patch.columns) for patch in full), strict=True)
    )
    inside = np.zeros((bottom - top, right - left), bool)
    for rows, columns, part in full:
        inside[
            rows.start - top : rows.stop - top,
            columns.start - left : columns.stop - left,
        ] |= part
    return Patch(slice(top, bottom), slice(left, right), inside)


def _nothing() -> Patch:
    return Patch(slice(0, 0), slice(0, 0), np.zeros((0, 0), bool))
