"""How far apart two outlines are: Hausdorff distance, surface Dice, relaxed scores.

Overlap scores (`unet_jax.metrics`) hardly see an outline that is one pixel off; the
first two see nothing else, and relaxed precision and recall forgive it, as is usual for
roads, which are a few pixels wide. They work on masks of any rank, on the host.

The boundary of a mask is the mask minus its erosion: its pixels with a neighbour across
an edge (a face, in 3-D) that is not in the mask. What lies beyond the image is not in
it. Every pixel of a boundary counts the same, and a distance goes from one pixel's
centre to another's.

An empty mask has no boundary. Of two empty masks the Hausdorff distance is 0 and the
surface Dice 1. Of an empty and another they are the diagonal of the image, which is
further than any two of its pixels are apart and keeps means finite without leaving the
failure out of them, and 0.

MONAI's `compute_hausdorff_distance(percentile=95)` and `compute_surface_dice` say the
same of two masks that are not empty: the same boundary, percentile and spacing. Of two
empty masks theirs are NaN, which their means leave out; of an empty mask and another
the Hausdorff distance is not finite. Without ``percentile`` theirs is the largest
distance, and with ``use_subvoxels`` boundaries are weighed by their area.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from unet_jax.types import InputError, NumpyArray, size_text

# Nets are sure of most pixels, so that the ends are finer.
RELAXED_THRESHOLDS = (0.0, 1e-4, 1e-3, *(k / 100 for k in range(1, 100)), 0.999, 0.9999)
"""Of a probability, for `relaxed_counts`: 0, 0.0001, 0.001, 0.01, 0.02 ... 0.9999."""


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


def relaxed_counts(
    probability: Any,
    label: Any,
    weight: Any = None,
    *,
    tolerance: float = 3.0,
    thresholds: Sequence[float] = RELAXED_THRESHOLDS,
) -> NumpyArray:
    """How much of a prediction is right, and of the truth found, within some pixels.

    A predicted pixel is right if a true one is near it, and a true one is found if a
    predicted one is near it; near is a Euclidean distance of ``tolerance`` or less.
    (The program of Saito et al. 2016, doi 10.2352/ISSN.2470-1173.2016.10.ROBVIS-392,
    looks from 3 pixels before to 2 after along both axes, and takes for break-even the
    threshold where precision and recall are closest: small differences from its
    figures mean nothing.)

    Args:
        probability: Floats ``[*S]``. A pixel is predicted where it is above a
            threshold.
        label: ``bool[*S]``.
        weight: ``[*S]``; where it is 0 a pixel is neither predicted nor true. None:
            all count.
        tolerance: In pixels.
        thresholds: T numbers in rising order.

    Returns:
        ``i64[T, 4]``: predicted pixels near a true one, predicted pixels, true pixels
        near a predicted one, true pixels. Counts of images add up; relaxed precision
        is the first by the second, relaxed recall the third by the fourth.

    Raises:
        InputError: Maps of another kind or size, or an option outside its range.

    Reference: Mnih and Hinton 2010, doi 10.1007/978-3-642-15567-3_16.
    """
    from scipy import ndimage

    levels = _levels(thresholds)
    if not 0 <= tolerance < np.inf:
        raise InputError(
            f"tolerance = {tolerance} must be 0 or more: use 3.0, as others do for"
            " roads."
        )
    probability, label = _probability_and_mask(probability, label, weight)
    # A true pixel is found at all thresholds below the largest probability near it, so
    # that one filter serves them all.
    reach = int(tolerance)
    places = np.indices((2 * reach + 1,) * label.ndim) - reach
    disk = (places**2).sum(axis=0) <= tolerance**2
    highest: Any = ndimage.maximum_filter
    nearest = highest(probability, footprint=disk, mode="constant", cval=-np.inf)
    near: Any = ndimage.binary_dilation
    right = probability[near(label, structure=disk)]
    sets = (right, probability, nearest[label])
    above = [_number_above(values, levels) for values in sets]
    true = np.full(levels.size, np.count_nonzero(label))
    return np.stack([*above, true], axis=1).astype(np.int64)


def break_even(
    counts: NumpyArray, *, thresholds: Sequence[float] = RELAXED_THRESHOLDS
) -> dict[str, float]:
    """Where relaxed precision and recall of a data set are equal.

    Both are of the counts of all images added up; between two thresholds they are
    interpolated linearly. If they are equal more than once, the highest value counts.

    Args:
        counts: Integers ``[N, T, 4]``, one of `relaxed_counts` for each image.
        thresholds: The T numbers given there.

    Returns:
        ``break_even`` and ``break_even_threshold``. NaN if one of the two is above the
        other at all thresholds where they exist, which is wherever a pixel is
        predicted, or if there is no true pixel.

    Raises:
        InputError: Counts of another size.

    Reference: Mnih and Hinton 2010; Zhang et al. 2017, arXiv 1711.10684.
    """
    counts, levels = np.asarray(counts), _levels(thresholds)
    if counts.ndim != 3 or counts.shape[1:] != (levels.size, 4):
        raise InputError(
            f"the counts are {size_text(counts.shape)} and not N x {levels.size} x 4:"
            " stack one boundary.relaxed_counts of the same thresholds for each image."
        )
    right, predicted, found, true = counts.sum(axis=0).T
    there = (predicted > 0) & (true > 0)
    levels = levels[there]
    precision = right[there] / predicted[there]
    recall = found[there] / true[there]
    lead = precision - recall
    # Points of the curve and of the lines between them: (value, threshold).
    points = [(precision[k], levels[k]) for k in np.flatnonzero(lead == 0)]
    for k in np.flatnonzero(lead[:-1] * lead[1:] < 0):
        part = lead[k] / (lead[k] - lead[k + 1])
        both = np.stack([precision, levels], axis=1)[k : k + 2]
        points.append(tuple((1 - part) * both[0] + part * both[1]))
    value, level = max(points, default=(np.nan, np.nan))
    return {"break_even": float(value), "break_even_threshold": float(level)}


def _levels(thresholds: Sequence[float]) -> NumpyArray:
    levels = np.asarray(thresholds, np.float64)
    if levels.ndim != 1 or not levels.size or not (np.diff(levels) > 0).all():
        raise InputError(
            f"thresholds = {thresholds} must be numbers in rising order: use (0.1, 0.5)"
            " or leave them out."
        )
    return levels


def _probability_and_mask(
    probability: Any, label: Any, weight: Any
) -> tuple[NumpyArray, NumpyArray]:
    """Both as they count: f64, -inf where the weight is 0, and a mask."""
    probability, label = np.asarray(probability), np.asarray(label)
    if label.dtype != bool or not label.ndim:
        raise InputError(
            f"the label is {label.dtype}{list(label.shape)} and not a boolean mask:"
            " compare it with a class, as in label == 1."
        )
    counted = np.ones(label.shape, bool) if weight is None else np.asarray(weight) > 0
    if not label.shape == probability.shape == counted.shape:
        raise InputError(
            f"the label is {label.shape}, the probability {probability.shape} and the"
            f" weight {counted.shape}: bring them to one size."
        )
    # In float64, as the thresholds are: 0.3 in float32 is above 0.3.
    probability = probability.astype(np.float64)
    if not np.isfinite(probability[counted]).all():
        raise InputError(
            "the probability is not finite everywhere: give what is unknown weight 0."
        )
    return np.where(counted, probability, -np.inf), label & counted


def _number_above(values: NumpyArray, levels: NumpyArray) -> NumpyArray:
    """How many of the values are above each level."""
    return values.size - np.searchsorted(np.sort(values.ravel()), levels, side="right")


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
