"""Parts of examples: the pixels of a window, and their mirror image where it ends."""

import functools
from collections.abc import Sequence
from typing import cast

import numpy as np

from unet_jax.layers import mirror
from unet_jax.types import Example, NumpyArray, Shape

Arrays = dict[str, NumpyArray]
"""an example with its weight"""


def cut(example: Example, begin: Sequence[int], shape: Shape) -> Arrays:
    """A part of an example and of its mirror image around it, where the weight is 0.

    It is the pixels' numbers that are mirrored, one short vector an axis, and not a
    whole volume of which a crop would keep a hundredth.

    Args:
        example: with its weight.
        begin: its pixel at which the part begins, below 0 in the mirror image.
        shape: of the part.
    """
    size = example["image"].shape[:-1]
    picks, inside = [], []
    for n, first, c in zip(size, begin, shape, strict=True):
        before, after = max(-first, 0), max(first + c - n, 0)
        pick = mirror(np.arange(n), ((before, after),), axis=0)
        picks.append(pick[first + before : first + before + c])
        position = np.arange(first, first + c)
        inside.append((position >= 0) & (position < n))
    arrays = {key: _take(array, picks) for key, array in cast(Arrays, example).items()}
    if not all(map(np.all, inside)):
        frame = functools.reduce(np.logical_and.outer, inside)
        weight = arrays["weight"]
        frame = frame.reshape(frame.shape + (1,) * (weight.ndim - frame.ndim))
        arrays["weight"] = np.where(frame, weight, np.float32(0))
    return arrays


def _take(array: NumpyArray, picks: Sequence[NumpyArray]) -> NumpyArray:
    if all(np.all(np.diff(pick) == 1) for pick in picks):
        # Slices copy nothing, and are most of what training asks for.
        return array[tuple(slice(int(pick[0]), int(pick[-1]) + 1) for pick in picks)]
    return array[np.ix_(*picks)]
