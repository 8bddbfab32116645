"""Batches of examples: random crops for training, whole images for evaluation.

What decides a crop is one function, whether it is cut here (`train_reader`) or on a
device that keeps the examples (`crop_reader`, `unet_jax.resident`).
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np

from unet_jax.data.ahead import endless, joined, run
from unet_jax.data.cutting import Arrays, cut
from unet_jax.data.plan import aims, plan
from unet_jax.data.source import Source
from unet_jax.types import (
    Batch,
    Example,
    InputError,
    NumpyArray,
    Pads,
    Shape,
    size_text,
)


def train_reader(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    crop: Shape,
    margin: int | Shape = 0,
    rows: slice | NumpyArray = slice(None),
    foreground: float = 0.0,
) -> Callable[[int], Batch]:
    """Training batches by their numbers; batch s is a pure function of (seed, s).

    Every image is first extended by its mirror image by ``margin`` pixels a side, then,
    where it is still smaller than ``crop``, on both sides up to it. The weight of a
    mirrored pixel is 0. A crop begins at ``floor(offset * (size - crop + 1))``.

    Args:
        source: examples as the task wants them (``source.Labelled``).
        seed: of the run.
        batch_size: rows of the whole batch, of all processes together.
        crop: spatial size in pixels that the net takes in.
        margin: pixels, one number or one for each axis: half of what a net with valid
            padding takes off, else 0.
        rows: this process's rows of each batch, or their numbers.
        foreground: part of the crops, 0 to 1, that are laid around a pixel of the
            foreground: of a class drawn evenly among those that the example has, at a
            place within the crop drawn evenly. Where something is rare, most crops
            would be without it. An example without foreground is cropped anywhere.
            nnU-Net takes 0.33 (Isensee et al. 2021, doi 10.1038/s41592-020-01008-z).

    Returns:
        From a number, 0 or more, to a batch of NumPy arrays: image ``[B, *crop, C]``,
        label ``[B, *crop]`` or ``[B, *crop, K]``, weight ``f32`` like label, index
        ``i32[B]``. Safe to call from several threads at once. What reading an example
        raises comes out as it is.

    Raises:
        InputError: no example at all, a crop of another rank than the images, one
            larger than every image, or a part that is none.
    """
    crops = _decided(
        source,
        seed=seed,
        batch_size=batch_size,
        crop=crop,
        margin=margin,
        rows=rows,
        foreground=foreground,
    )

    def read(step: int) -> Batch:
        index, examples = [], []
        for i, begin, example in crops(step):
            index.append(i)
            examples.append(cut(cast(Example, example), begin, crop))
        return _stack(examples, np.asarray(index))

    return read


def crop_reader(
    source: Source,
    sizes: NumpyArray,
    *,
    seed: int,
    batch_size: int,
    crop: Shape,
    margin: int | Shape = 0,
    foreground: float = 0.0,
) -> Callable[[int], Arrays]:
    """Which crops `train_reader` would cut, for examples that somebody else keeps.

    Args:
        source: as for `train_reader`; only examples at whose foreground a crop is aimed
            are read.
        sizes: ``[N, rank]``, the spatial size of every example.
        seed, batch_size, crop, margin, foreground: as for `train_reader`.

    Returns:
        From a number, 0 or more, to ``{"index": i32[B], "begin": i32[B, rank]}``: the
        example, and its pixel at which the crop begins, which lies outside of it
        (below 0) where the crop begins in its mirror image.

    Raises:
        InputError: as for `train_reader`.
    """
    crops = _decided(
        source,
        seed=seed,
        batch_size=batch_size,
        crop=crop,
        margin=margin,
        foreground=foreground,
        sizes=[tuple(size) for size in sizes.tolist()],
    )

    def read(step: int) -> Arrays:
        decided = [(i, begin) for i, begin, _ in crops(step)]
        return {
            "index": np.array([i for i, _ in decided], np.int32),
            "begin": np.array([begin for _, begin in decided], np.int32),
        }

    return read


def _decided(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    crop: Shape,
    margin: int | Shape = 0,
    rows: slice | NumpyArray = slice(None),
    foreground: float = 0.0,
    sizes: Sequence[Shape] | None = None,
) -> Callable[[int], Iterator[tuple[int, Shape, Example | None]]]:
    """What decides the crops of a step, wherever they are cut.

    Args:
        source, seed, batch_size, crop, margin, rows, foreground: as for `train_reader`.
        sizes: of every example, where it need not be read; None reads them all.

    Returns:
        From a step to its rows, one after another: the example's number, the pixel of
        it at which the crop begins, and the example, if it had to be read.
    """
    margins = (margin,) * len(crop) if isinstance(margin, int) else tuple(margin)
    _check_crop(source, crop, margins)
    if not 0 <= foreground <= 1:
        raise InputError(
            f"train.foreground = {foreground} must be from 0 to 1: it is the part of "
            "the crops that hold foreground for certain."
        )
    aimed_at = _Foreground()

    def crops(step: int) -> Iterator[tuple[int, Shape, Example | None]]:
        index, offset = plan(
            seed,
            step,
            examples=len(source),
            batch_size=batch_size,
            rank=len(crop),
        )
        aim = aims(seed, step, batch_size=batch_size)
        aimed = aim[rows, 0] < foreground
        draws = zip(
            index[rows].tolist(), offset[rows], aim[rows, 1:], aimed, strict=True
        )
        for i, at, where, wanted in draws:
            example, target = None, None
            if wanted or sizes is None:
                example = source[i]
            if wanted:
                target = aimed_at.pixel(i, cast(Arrays, example), where)
            if sizes is not None:
                size = sizes[i]
            else:
                size = cast(Example, example)["image"].shape[:-1]
            yield i, _begin(size, crop, margins, at.tolist(), target), example

    return crops


def train_batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    crop: Shape,
    margin: int | Shape = 0,
    start: int = 0,
    rows: slice | NumpyArray = slice(None),
    foreground: float = 0.0,
    together: int = 1,
    threads: int = 2,
) -> Iterator[Batch]:
    """Endless training batches: those of `train_reader`, one after another.

    Args:
        source, seed, batch_size, crop, margin, rows, foreground: as for `train_reader`.
        start: the first batch's number. Resuming at step k is ``start=k``.
        together: of more than 1, so many batches come as one whose arrays have an axis
            of batches first.
        threads: how many read batches ahead; 0 reads in the caller's thread.

    Raises:
        InputError: as for `train_reader`; what reading an example raises comes out of
            the iterator as it is.
    """
    read = train_reader(
        source,
        seed=seed,
        batch_size=batch_size,
        crop=crop,
        margin=margin,
        rows=rows,
        foreground=foreground,
    )
    return endless(read, start=start, together=together, threads=threads)


def side_by_side(
    readers: Sequence[Callable[[int], Batch]], *, start: int = 0, threads: int = 2
) -> Iterator[Batch]:
    """Endless training batches of several runs at once, read by one pipeline.

    Args:
        readers: `train_reader` of each run, all of one batch size and crop.
        start: the first batch's number.
        threads: how many read batches ahead; 0 reads in the caller's thread.

    Returns:
        Batches whose arrays have an axis of runs first: image ``[R, B, *crop, C]``.
    """

    def read(step: int) -> Batch:
        return joined([reader(step) for reader in readers])

    return run(read, sys.maxsize, start, threads)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    pads: Callable[[Shape], Pads],
    rows: slice | NumpyArray = slice(None),
    threads: int = 2,
) -> Iterator[Batch]:
    """Batches that hold every example exactly once, whole.

    Examples whose padded size is the same share batches, by rising index; sizes follow
    one another by their first example. The last batch of a size is filled up with rows
    of zeros, of index -1 and weight 0, so that every batch has ``batch_size`` rows.

    Args:
        source: examples as the task wants them (``source.Labelled``).
        batch_size: rows of the whole batch, of all processes together.
        pads: spatial size -> how many pixels to mirror at each end of each axis. The
            weight is 0 there.
        rows: this process's rows of each batch, or their numbers.
        threads: how many read batches ahead; 0 reads in the caller's thread.

    Returns:
        Batches of NumPy arrays: image ``[B, *S, C]``, label ``[B, *S]`` or
        ``[B, *S, K]``, weight ``f32`` like label, index ``i32[B]``.

    Raises:
        InputError: what reading an example raises, out of the iterator as it is.
    """
    shapes: dict[Shape, list[int]] = {}
    for i in range(len(source)):
        size = tuple(source.size(i))
        padded = tuple(n + sum(pad) for n, pad in zip(size, pads(size), strict=True))
        shapes.setdefault(padded, []).append(i)
    batches = [
        members[begin : begin + batch_size]
        for members in shapes.values()
        for begin in range(0, len(members), batch_size)
    ]

    def read(number: int) -> Batch:
        index = np.full(batch_size, -1)
        index[: len(batches[number])] = batches[number]
        examples = []
        for i in index[rows].tolist():
            # A filling row needs the shape of its batch, which the first row has.
            example = source[batches[number][0] if i < 0 else i]
            size = example["image"].shape[:-1]
            ends = pads(size)
            padded = tuple(n + sum(pad) for n, pad in zip(size, ends, strict=True))
            arrays = cut(example, [-before for before, _ in ends], padded)
            if i < 0:
                arrays = {key: np.zeros_like(array) for key, array in arrays.items()}
            examples.append(arrays)
        return _stack(examples, index[rows])

    return run(read, len(batches), 0, threads)


def _check_crop(source: Source, crop: Shape, margins: Shape) -> None:
    if len(source) == 0:
        raise InputError("The training data has no examples: check its split and root.")
    largest = (0,) * len(crop)
    for i in range(len(source)):
        size = tuple(source.size(i))
        if len(size) != len(crop):
            raise InputError(
                f"The crop {size_text(crop)} has {len(crop)} axes, but "
                f"{source.name(i)} has {len(size)} ({size_text(size)}): give one "
                "number for each axis."
            )
        largest = tuple(map(max, largest, size))
        if all(n + 2 * m >= c for n, m, c in zip(largest, margins, crop, strict=True)):
            return
    mirrored = f" and a mirrored margin of {size_text(margins)}" if any(margins) else ""
    raise InputError(
        f"The crop {size_text(crop)} is larger than every training image (at most "
        f"{size_text(largest)}{mirrored}): choose a smaller crop."
    )


class _Foreground:
    """Where examples have foreground that counts.

    With the task ``classes`` id 0 is the background, with ``labels`` what has none.
    """

    # To look through a volume takes a second and more, so of one this large some
    # places of each class are remembered.
    LARGE, SOME = 2**22, 4096

    def __init__(self) -> None:
        self._known: dict[int, list[NumpyArray]] = {}

    def pixel(self, i: int, example: Arrays, where: NumpyArray) -> Sequence[int] | None:
        """A pixel of example i, by two numbers in [0, 1); None if there is none."""
        shape = example["image"].shape[:-1]
        places = self._known.get(i)
        if places is None:
            present = _present(example)
            if not present:
                return None
            if math.prod(shape) <= self.LARGE:
                present = [present[math.floor(float(where[0]) * len(present))]]
            places = [_pixels(example, k) for k in present]
            if math.prod(shape) > self.LARGE:
                places = [_thinned(one, self.SOME) for one in places]
                self._known[i] = places
        pixels = places[math.floor(float(where[0]) * len(places))]
        pixel = pixels[math.floor(float(where[1]) * len(pixels))]
        return [int(n) for n in np.unravel_index(pixel, shape)]


def _present(example: Arrays) -> list[int]:
    """The classes or labels of which something counts, but the background."""
    label, counts = example["label"], example["weight"] > 0
    if label.ndim == example["image"].ndim:
        some = ((label > 0) & counts).any(axis=tuple(range(label.ndim - 1)))
        return np.flatnonzero(some).tolist()
    # Ids are few and small, and np.unique would sort all pixels.
    return [k for k in np.flatnonzero(np.bincount(label[counts])).tolist() if k]


def _pixels(example: Arrays, k: int) -> NumpyArray:
    """The numbers of the pixels of a class or label that count: ``i64[count]``."""
    label, counts = example["label"], example["weight"] > 0
    if label.ndim == example["image"].ndim:
        return np.flatnonzero((label[..., k] > 0) & counts[..., k])
    return np.flatnonzero((label == k) & counts)


def _thinned(pixels: NumpyArray, most: int) -> NumpyArray:
    """At most so many of them, evenly spread."""
    if len(pixels) <= most:
        return pixels
    return pixels[np.linspace(0, len(pixels) - 1, most).astype(np.int64)]


def _begin(
    size: Shape,
    crop: Shape,
    margins: Shape,
    offset: Sequence[float],
    target: Sequence[int] | None = None,
) -> Shape:
    """The pixel at which a crop begins: anywhere, or such that it holds a pixel.

    Args:
        size: of the example.
        crop, margins: a number for each axis.
        offset: in [0, 1), where among those that there are.
        target: a pixel that the part of the crop that has labels should hold.

    Returns:
        A number for each axis, below 0 in the mirror image.
    """
    begins = []
    for axis, (n, c, m, at) in enumerate(zip(size, crop, margins, offset, strict=True)):
        short = max(c - n - 2 * m, 0)
        before, last = m + short // 2, n + 2 * m + short - c
        if target is None:
            begins.append(math.floor(at * (last + 1)) - before)
            continue
        # A net with valid padding labels what is at least a margin from the edges.
        ahead = m + math.floor(at * (c - 2 * m))
        begins.append(min(max(target[axis] + before - ahead, 0), last) - before)
    return tuple(begins)


def _stack(examples: Sequence[Arrays], index: NumpyArray) -> Batch:
    return {
        "image": np.stack([example["image"] for example in examples]),
        "label": np.stack([example["label"] for example in examples]),
        "weight": np.stack([example["weight"] for example in examples]),
        "index": index.astype(np.int32),
    }
