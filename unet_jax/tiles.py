"""Tiles: a large image through a net in windows of one size, put together again."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from unet_jax.geometry import Axis
from unet_jax.types import NumpyArray


class Cuts(NamedTuple):
    """How windows of one size cover one axis of the padded image.

    Attributes:
        begins: Where each window begins, in the padded image and in its output.
        window: Pixels that the net reads.
        shares: ``f32[n]`` a window: what it contributes to the n output pixels from its
            begin on. The shares of an output pixel add up to 1.
    """

    begins: tuple[int, ...]
    window: int
    shares: tuple[NumpyArray, ...]


def cut(axis: Axis, size: int, *, tile: int, overlap: float) -> Cuts:
    """Windows over one axis, all beginning at multiples of the strides' product.

    Then max-pooling sees the same pairs as in the whole image. A same net sees zeros
    beyond a window, so its windows overlap and are blended by a triangle; the output of
    a valid net is that of the whole image, so each pixel is taken from one window.

    Args:
        axis: The net along this axis (`unet_jax.models.axes`).
        size: Pixels of the image, without padding.
        tile: Output pixels of a window, rounded up to what the net can do; 0, or at
            least ``size``: one window.
        overlap: The part of a window that overlaps the next, in [0, 1); same nets.
    """
    step, edge = axis.step, axis.margin
    before, after = axis.pads(size)
    whole = window = before + size + after
    if 0 < tile < size:
        tile = max(tile, step)
        before, after = axis.pads(tile)
        window = min(before + tile + after, whole)
    out, rest = window - 2 * edge, whole - window
    valid = axis.valid
    stride = (out if valid else int(out * (1 - overlap))) // step * step
    count = -(-rest // max(stride, step)) + 1
    # Spread evenly; the differences stay multiples of step and at most the stride.
    begins = [k * (rest // step) // max(count - 1, 1) * step for k in range(count)]
    if valid or count == 1:
        ends = [*begins[1:], rest + out]
        shares = [
            (np.arange(out) < end - begin).astype(np.float32)
            for begin, end in zip(begins, ends, strict=True)
        ]
        return Cuts(tuple(begins), window, tuple(shares))
    ramp = np.minimum(np.arange(1, out + 1), np.arange(out, 0, -1)).astype(np.float64)
    total = np.zeros(rest + out)
    for begin in begins:
        total[begin : begin + out] += ramp
    shares = [(ramp / total[b : b + out]).astype(np.float32) for b in begins]
    return Cuts(tuple(begins), window, tuple(shares))


def run(
    net: Callable[[NumpyArray], Any],
    padded: NumpyArray,
    cuts: Sequence[Cuts],
    *,
    channels: int,
    batch_size: int,
) -> NumpyArray:
    """The output for the whole padded image, put together from windows.

    Args:
        net: ``[batch_size, *window, C]`` -> ``f32[batch_size, *out, channels]``.
        padded: ``[*S, C]``, mirrored by `unet_jax.models.pads`.
        cuts: Of each spatial axis.
        channels: Of the output.
        batch_size: Windows run together; all calls have the same shape.

    Returns:
        ``f32[*S', channels]``, where S' is at least the unpadded size.
    """
    length = [c.begins[-1] + len(c.shares[-1]) for c in cuts]
    total = np.zeros((*length, channels), np.float32)
    window = [c.window for c in cuts]
    batch = np.zeros((batch_size, *window, padded.shape[-1]), padded.dtype)
    places = list(itertools.product(*(range(len(c.begins)) for c in cuts)))
    for first in range(0, len(places), batch_size):
        group = places[first : first + batch_size]
        # The last batch keeps rows of the one before: one shape, one compilation.
        for row, place in enumerate(group):
            begins = [c.begins[k] for c, k in zip(cuts, place, strict=True)]
            batch[row] = padded[_box(begins, window)]
        for row, place in zip(np.asarray(net(batch)), group, strict=False):
            begins = [c.begins[k] for c, k in zip(cuts, place, strict=True)]
            shares = [c.shares[k] for c, k in zip(cuts, place, strict=True)]
            share = functools.reduce(np.multiply.outer, shares)[..., None]
            total[_box(begins, [len(s) for s in shares])] += row * share
    return total


def _box(begins: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(b, b + n) for b, n in zip(begins, size, strict=True))
