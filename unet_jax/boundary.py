"""How far apart two boundaries are: Hausdorff distance and surface Dice of masks.

Overlap scores (`unet_jax.metrics`) hardly see an outline that is one pixel off; these
two see nothing else. They work on boolean masks of any rank, on the host.

The boundary of a mask is the mask minus its erosion: its pixels with a neighbour across
an edge (a face, in 3-D) that is not in the mask. What lies beyond the image is not in
it. Every pixel of a boundary counts the same, and a distance goes from one pixel's
centre to another's.

An empty mask has no boundary. Of two empty masks the Hausdorff distance is 0 and the
surface Dice 1. Of an empty and another they are the diagonal of the image, which is
further than any two of its pixels are apart and keeps means finite without leaving the
failure out of them, and 0.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from unet_jax.types import InputError, NumpyArray


def hausdorff(
    label: Any,
    prediction: Any,
    *,
    percentile: float = 95.0,
    spacing: Sequence[float] | None = None,
) -> float:
    """The Hausdorff distance between the boundaries of two masks, or a percentile.

    The percentile of the distances from one boundary's pixels to the nearest of the
    other, interpolated linearly, is taken each way; the larger one counts.

    Args:
        label: ``bool[*S]``.
        prediction: ``bool[*S]``; which of the two is which does not matter.
        percentile: Above 0, to 100, which is the Hausdorff distance itself.
        spacing: Size of a pixel along each axis; None: 1.

    Returns:
        The distance in the unit of ``spacing``. Of two empty masks 0; of an empty and
        another the diagonal of the image.

    Raises:
        InputError: Masks that are not boolean or differ in size, or an option outside
            its range.

    Reference: Huttenlocher et al. 1993, doi 10.1109/34.232073.
    """
    if not 0 < percentile <= 100:
        raise InputError(
            f"percentile = {percentile} must be above 0 and at most 100: use 95, or 100"
            " for the largest distance."
        )
    label, prediction, spacing = _checked(label, prediction, spacing)
    if not (label.any() and prediction.any()):
        same = label.any() == prediction.any()
        return 0.0 if same else float(np.linalg.norm(np.multiply(label.shape, spacing)))
    there, back = _distances(label, prediction, spacing)
    return float(max(np.percentile(there, percentile), np.percentile(back, percentile)))


def surface_dice(
    label: Any,
    prediction: Any,
    *,
    tolerance: float,
    spacing: Sequence[float] | None = None,
) -> float:
    """The part of both boundaries that lies within a tolerance of the other one.

    The reference weighs by area of the surface; here every boundary pixel counts as
    one.

    Args:
        label: ``bool[*S]``.
        prediction: ``bool[*S]``; which of the two is which does not matter.
        tolerance: The distance that is still right, in the unit of ``spacing``.
        spacing: Size of a pixel along each axis; None: 1.

    Returns:
        Between 0 and 1. Of two empty masks 1; of an empty and another 0.

    Raises:
        InputError: Masks that are not boolean or differ in size, or an option outside
            its range.

    Reference: Nikolov et al. 2018, arXiv 1809.04430.
    """
    if not tolerance >= 0:
        raise InputError(
            f"tolerance = {tolerance} must be 0 or more: use the distance, such as 1.0,"
            " at which two outlines are still the same to you."
        )
    label, prediction, spacing = _checked(label, prediction, spacing)
    if not (label.any() and prediction.any()):
        return float(label.any() == prediction.any())
    there, back = _distances(label, prediction, spacing)
    near = np.count_nonzero(there <= tolerance) + np.count_nonzero(back <= tolerance)
    return near / (there.size + back.size)


def _checked(
    label: Any, prediction: Any, spacing: Sequence[float] | None
) -> tuple[NumpyArray, NumpyArray, tuple[float, ...]]:
    label, prediction = np.asarray(label), np.asarray(prediction)
    for name, mask in (("label", label), ("prediction", prediction)):
        if mask.dtype != bool or not mask.ndim:
            raise InputError(
                f"the {name} is {mask.dtype}{list(mask.shape)} and not a boolean mask:"
                f" compare it with a class, as in {name} == 1."
            )
    if label.shape != prediction.shape:
        raise InputError(
            f"the label is {label.shape} and the prediction {prediction.shape}: bring"
            " them to one size."
        )
    rank = label.ndim
    sizes = (1.0,) * rank if spacing is None else tuple(map(float, spacing))
    if len(sizes) != rank or not all(0 < size < np.inf for size in sizes):
        raise InputError(
            f"spacing = {spacing} must have a number above 0 for each of the {rank}"
            f" axes: use {(1.0,) * rank} for pixels."
        )
    return label, prediction, sizes


def _distances(
    label: NumpyArray, prediction: NumpyArray, spacing: tuple[float, ...]
) -> tuple[NumpyArray, NumpyArray]:
    """From each boundary pixel of a mask to the nearest of the other, both ways.

    Neither mask is empty.
    """
    from scipy import ndimage

    # Outside the box around both masks nothing is measured: volumes are mostly that.
    places = np.nonzero(label | prediction)
    box = tuple(slice(place.min(), place.max() + 1) for place in places)
    # Any, because what scipy infers for them is not what they return.
    erode: Any = ndimage.binary_erosion
    distance: Any = ndimage.distance_transform_edt
    first, second = (mask & ~erode(mask) for mask in (label[box], prediction[box]))
    there = distance(~second, sampling=spacing)[first]
    back = distance(~first, sampling=spacing)[second]
    return there, back
