"""How sure a figure is: the bootstrap over images.

The images of a data set are drawn again with replacement, many times, and the figure is
computed anew from the rows of those that were drawn; the spread of what comes out is
how much the figure owes to which images happened to be there. What it does not see is
how much another seed of the training would change: that takes several runs.

Neighbouring slices of a stack resemble each other, so that intervals over slices are
too narrow; over images of different samples they are right.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from unet_jax.types import InputError, NumpyArray

Summarise = Callable[[NumpyArray], dict[str, float]]
"""rows ``[N, ...]``, one an image -> figures"""


class Interval(NamedTuple):
    """A figure of all images, and the ends of its interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """How much higher the second of two figures is, on the same images.

    Attributes:
        value: Second minus first.
        low: Lower end of its interval.
        high: Upper end.
        p: Two-sided: how often a difference of this sign would be the other sign, or
            none, were the images drawn again; at least 2 / (samples + 1).
    """

    value: float
    low: float
    high: float
    p: float


def intervals(
    rows: NumpyArray,
    summarise: Summarise,
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """The percentile interval of every figure.

    Args:
        rows: ``[N, ...]``, one for each image, of which ``summarise`` makes figures.
        summarise: Such as `unet_jax.metrics.summarise` of confusion tables.
        samples: How often the images are drawn.
        level: Part of the samples that lies within.
        seed: Of the draws.

    Returns:
        For each figure its interval. Samples in which a figure is NaN are left out; NaN
        where nothing is left.

    Raises:
        InputError: Fewer than two images, or an option outside its range.

    Reference: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    drawn = _draws(len(rows), samples, level, seed)
    whole = summarise(rows)
    figures = [summarise(rows[index]) for index in drawn]
    found = {}
    for key, value in whole.items():
        low, high = _ends([figure[key] for figure in figures], level)
        found[key] = Interval(value, low, high)
    return found


def differences(
    first: NumpyArray,
    second: NumpyArray,
    summarise: Summarise,
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """What a second net is ahead of a first one on the same images, with intervals.

    Both are given the same images in every sample, so that what is difficult is so for
    both: the interval is often far narrower than those of the two figures.

    Args:
        first: ``[N, ...]``, as for `intervals`.
        second: ``[N, ...]``, of the same images in the same order.
        summarise: As for `intervals`.
        samples: As for `intervals`.
        level: As for `intervals`.
        seed: As for `intervals`.

    Raises:
        InputError: As for `intervals`, or other numbers of images.
    """
    if len(first) != len(second):
        raise InputError(
            f"{len(first)} and {len(second)} images cannot be compared in pairs:"
            " measure both nets on one split."
        )
    drawn = _draws(len(first), samples, level, seed)
    a, b = summarise(first), summarise(second)
    pairs = [(summarise(first[index]), summarise(second[index])) for index in drawn]
    found = {}
    for key in a:
        gains = np.asarray([y[key] - x[key] for x, y in pairs])
        gains = gains[~np.isnan(gains)]
        low, high = _ends(gains, level)
        tail = min((gains <= 0).sum(), (gains >= 0).sum())
        p = min(2.0 * (tail + 1) / (gains.size + 1), 1.0) if gains.size else np.nan
        found[key] = Difference(b[key] - a[key], low, high, float(p))
    return found


def _draws(count: int, samples: int, level: float, seed: int) -> NumpyArray:
    """``i64[samples, count]``: images of each sample."""
    if count < 2:
        raise InputError(
            f"{count} image(s) cannot be drawn anew: an interval needs 2 or more."
        )
    if samples < 1 or not 0 < level < 1:
        raise InputError(
            f"samples = {samples} and level = {level} must be 1 or more, and between 0"
            " and 1: use 1000 and 0.95."
        )
    return np.random.default_rng(seed).integers(0, count, (samples, count))


def _ends(values: list[float] | NumpyArray, level: float) -> tuple[float, float]:
    array = np.asarray(values, np.float64)
    array = array[~np.isnan(array)]
    if not array.size:
        return float("nan"), float("nan")
    low, high = np.quantile(array, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high
