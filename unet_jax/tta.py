"""Test-time augmentation: the views of an image whose predictions are averaged.

    none          the image as it is
    flips         mirrored along any of its axes: 4 in 2-D, 8 in 3-D
    symmetries    the 8 symmetries of the square in the last two axes; of a volume each
                  also mirrored in depth, 16
    rotations     turned by 0/7, 1/7 ... 6/7 of a full turn in the last two axes

The first three move whole pixels (`View`), so that nothing is interpolated and a view
can be taken of a tile at a time. A rotation reads between pixels (`turn`): the image is
mirrored outwards, turned, predicted, and the probabilities are turned back.

The U-Net paper averages "over 7 rotated versions of the input data" and does not say by
which angles; equal parts of a full turn are our reading.

Reference: Ronneberger et al. 2015, arXiv 1505.04597, section 4 (the rotations); Isensee
et al. 2021, doi 10.1038/s41592-020-01008-z, supplementary note 4 (the flips).
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unet_jax.types import NumpyArray, choose

KINDS = ("none", "flips", "symmetries", "rotations")

ANGLES = tuple(2 * math.pi * k / 7 for k in range(7))
"""Of ``rotations``, in radians, counter-clockwise with the row axis down."""


class View(NamedTuple):
    """An image with its axes in another order, some of them reversed.

    Attributes:
        axes: Which axis of the image each axis of the view is.
        flips: Whether each axis of the view then runs backwards.
    """

    axes: tuple[int, ...]
    flips: tuple[bool, ...]

    def apply(self, x: Any, *, axis: int = 0) -> Any:
        """The view of an array.

        Args:
            x: ``[..., *S, ...]``, NumPy or JAX.
            axis: Where the spatial axes begin.

        Returns:
            The same values in other places; of a NumPy array without a copy.
        """
        after = range(axis + len(self.axes), x.ndim)
        x = x.transpose(*range(axis), *(axis + a for a in self.axes), *after)
        ends = (slice(None, None, -1 if flip else None) for flip in self.flips)
        return x[(slice(None),) * axis + tuple(ends)]

    @property
    def inverse(self) -> "View":
        """The view that undoes this one."""
        places = tuple(self.axes.index(a) for a in range(len(self.axes)))
        return View(places, tuple(self.flips[place] for place in places))


def views(kind: str, rank: int) -> tuple[View, ...]:
    """The views that a kind of test-time augmentation averages, the image itself first.

    Args:
        kind: One of `KINDS`. ``rotations`` are no views: the image alone.
        rank: Spatial axes, 2 or 3.

    Raises:
        InputError: An unknown kind.
    """
    choose(KINDS, kind, "tta =")
    same = tuple(range(rank))
    orders, flips = [same], [(False,) * rank]
    if kind in ("flips", "symmetries"):
        flips = list(itertools.product((False, True), repeat=rank))
    if kind == "symmetries":
        orders.append((*same[:-2], rank - 1, rank - 2))
    return tuple(View(*both) for both in itertools.product(orders, flips))


def frame(size: Sequence[int]) -> tuple[int, ...]:
    """The size of a turned image, for all angles the same: planes as wide as diagonals.

    Args:
        size: Of the image, ``*S``.
    """
    *depth, height, width = size
    side = math.ceil(math.hypot(height - 1, width - 1)) + 1
    return (*depth, side, side)


def turn(image: NumpyArray, angle: float) -> NumpyArray:
    """An image turned in its last two axes, so that none of it is lost.

    Around it is its mirror image, the outermost pixel not repeated.

    Args:
        image: ``[*S, C]``.
        angle: Radians, counter-clockwise with the row axis down (as ``np.rot90``).

    Returns:
        ``[*frame(S), C]`` of the same dtype, interpolated linearly; whole numbers are
        rounded.
    """
    turned = _turned(image, angle, frame(image.shape[:-1]))
    if image.dtype.kind in "iu":
        turned = np.rint(turned)
    return turned.astype(image.dtype, copy=False)


def turn_back(turned: NumpyArray, angle: float, size: Sequence[int]) -> NumpyArray:
    """What was predicted of a turned image, at the pixels of the image.

    Args:
        turned: ``f32[*frame(S), K]``.
        angle: As for `turn`.
        size: Of the image, ``*S``.

    Returns:
        ``f32[*S, K]``, interpolated linearly.
    """
    return _turned(turned, -angle, tuple(size))


def _turned(x: NumpyArray, angle: float, size: Sequence[int]) -> NumpyArray:
    """``[*S, C]`` turned about the centre into a frame of another size, in f32."""
    from scipy import ndimage

    # The place that each pixel is read from: the inverse turn, about both centres.
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.array([[cos, sin], [-sin, cos]])
    middle = (np.array(size[-2:]) - 1) / 2
    offset = (np.array(x.shape[-3:-1]) - 1) / 2 - matrix @ middle
    out = np.empty((*size, x.shape[-1]), np.float32)
    # Any, because what scipy infers for the offset is one number.
    read: Any = ndimage.affine_transform
    options = {"output_shape": size[-2:], "order": 1, "mode": "mirror"}
    for *page, channel in itertools.product(
        *map(range, x.shape[:-3]), range(x.shape[-1])
    ):
        place = (*page, slice(None), slice(None), channel)
        read(x[place], matrix, offset, output=out[place], **options)
    return out
