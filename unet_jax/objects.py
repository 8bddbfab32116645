"""How well objects are found: SEG, panoptic quality, and precision at overlaps.

Objects are a label image: one positive number for each, 0 for the background, gaps in
the numbers allowed, any rank. `counts` is one row for each image and `summarise`
divides once, so that rows may be resampled.

A reference object and a predicted one are a match where their intersection over union
(IoU) is above a threshold of at least 0.5, strictly. Objects of a label image do not
overlap, so that above 0.5 nobody has two partners and no assignment need be solved;
below it matches depend on how ties are settled, and are not offered.

Pixels of weight 0 belong to nobody: they are taken out of every object before it is
measured, a reference object that lies in them altogether is not there, and a predicted
one without a match of which more than half lies in them is no mistake (Kirillov et al.
2019, section 4.2). The Cell Tracking Challenge has no such pixels, its own SEG is that
without a weight.

An image with neither objects nor predictions has no score: it is left out of the means
over images and adds nothing to pooled scores. A score of nothing at all is NaN.
"""

from typing import Any, NamedTuple

import numpy as np

from unet_jax.types import InputError, NumpyArray, size_text

THRESHOLDS = tuple(k / 20 for k in range(10, 20))
"""The IoUs 0.5, 0.55 ... 0.95 at which the Data Science Bowl 2018 asks for a match."""

COLUMNS = (
    "seg",  # the SEG of all reference objects, added up
    "references",
    "iou",  # of the matches above 0.5, added up
    *(f"tp@{t:g}" for t in THRESHOLDS),
    *(f"fp@{t:g}" for t in THRESHOLDS),
    *(f"fn@{t:g}" for t in THRESHOLDS),
)
"""What the columns of `counts` are."""


def overlaps(label: Any, prediction: Any, weight: Any = None) -> NumpyArray:
    """How many pixels every object shares with every other, the background included.

    Args:
        label: Integers ``[*S]``, from 0 to below 2^31.
        prediction: Integers ``[*S]``, from 0 to below 2^31.
        weight: ``[*S]``; pixels with ``weight > 0`` count. None: all do.

    Returns:
        ``i64[M, 3]``: the number in the label, the number in the prediction and their
        pixels, for each pair that meets, sorted.

    Raises:
        InputError: Images that hold no such numbers or differ in size.
    """
    label, prediction = _checked("label", label), _checked("prediction", prediction)
    images = [label, prediction]
    if weight is not None:
        images.append(np.asarray(weight))
    if len({image.shape for image in images}) > 1:
        shapes = ", ".join(size_text(image.shape) for image in images)
        raise InputError(
            f"the label, the prediction and the weight are {shapes}: bring them to one"
            " size."
        )
    label, prediction = label.ravel(), prediction.ravel()
    if weight is not None:
        counted = images[2].ravel() > 0
        label, prediction = label[counted], prediction[counted]
    # One number for each pair: 31 bits of either.
    width = int(prediction.max(initial=0)) + 1
    pairs, pixels = np.unique(label * width + prediction, return_counts=True)
    return np.stack([pairs // width, pairs % width, pixels], axis=1)


def matches(
    label: Any, prediction: Any, weight: Any = None, *, threshold: float = 0.5
) -> tuple[NumpyArray, NumpyArray]:
    """The objects that have found each other.

    Args:
        label: Integers ``[*S]``, 0 is background.
        prediction: Integers ``[*S]``, 0 is background.
        weight: ``[*S]``; what has weight 0 belongs to nobody. None: there is none.
        threshold: From 0.5 to below 1; a pair matches if its IoU is above it.

    Returns:
        ``i64[M, 2]``, the number in the label and in the prediction, each at most once;
        ``f64[M]``, their IoU.

    Raises:
        InputError: As for `overlaps`; a threshold outside its range.
    """
    if not 0.5 <= threshold < 1:
        raise InputError(
            f"threshold = {threshold} must be from 0.5 to below 1: under 0.5 an object"
            " may match two others."
        )
    pairs = _pairs(overlaps(label, prediction, weight))
    iou = pairs.iou
    return pairs.ids[iou > threshold], iou[iou > threshold]


def seg(label: Any, prediction: Any, weight: Any = None) -> tuple[float, int]:
    """The SEG of the Cell Tracking Challenge, of one image and as a sum.

    A reference object R scores its IoU with the predicted object that covers more than
    half of it, ``|R and S| > 0.5 |R|``, and 0 if there is none. A predicted object
    that covers no reference object costs nothing.

    Args:
        label: Integers ``[*S]``, 0 is background.
        prediction: Integers ``[*S]``, 0 is background.
        weight: ``[*S]``; what has weight 0 belongs to nobody. None: there is none.

    Returns:
        The scores added up, and the number of reference objects. The challenge's
        figure is the sum over all images of a video by their objects.

    Raises:
        InputError: As for `overlaps`.

    Reference: Maška et al. 2014, doi 10.1093/bioinformatics/btu080; Ulman et al. 2017,
    doi 10.1038/nmeth.4473.
    """
    pairs = _pairs(overlaps(label, prediction, weight))
    return _seg(pairs), pairs.references.size


def counts(label: Any, prediction: Any, weight: Any = None) -> NumpyArray:
    """What `summarise` needs to know of one image.

    Args:
        label: Integers ``[*S]``, 0 is background.
        prediction: Integers ``[*S]``, 0 is background.
        weight: ``[*S]``; what has weight 0 belongs to nobody. None: there is none.

    Returns:
        ``f64[33]``, one number for each of `COLUMNS`. Rows add up.

    Raises:
        InputError: As for `overlaps`.
    """
    pairs = _pairs(overlaps(label, prediction, weight))
    found = pairs.iou[:, None] > np.asarray(THRESHOLDS)
    hits = found.sum(axis=0)
    # Without a match, an object is to blame unless most of it lies in weight 0.
    whole, area = np.unique(np.asarray(prediction), return_counts=True)
    area = area[np.searchsorted(whole, pairs.predictions)]
    to_blame = 2 * pairs.prediction_pixels >= area
    partner = np.searchsorted(pairs.predictions, pairs.ids[:, 1])
    false = to_blame.sum() - (found & to_blame[partner][:, None]).sum(axis=0)
    missed = pairs.references.size - hits
    iou = pairs.iou[pairs.iou > 0.5].sum()
    return np.concatenate(
        [[_seg(pairs), pairs.references.size, iou], hits, false, missed]
    ).astype(np.float64)


def summarise(counts: NumpyArray) -> dict[str, float]:
    """Every score of a data set from the rows of its images.

    Args:
        counts: ``f64[N, 33]``, rows of `counts`.

    Returns:
        A dict of floats between 0 and 1, or NaN. Of all images together (pooled):
        ``pq``, ``sq`` and ``rq``, panoptic quality and its two factors, how well
        matches fit and how many there are; ``seg``; ``f1@0.5`` to ``f1@0.95``, twice
        the matches by all objects of both, and their mean ``f1``. Means over images:
        ``ap@0.5`` to ``ap@0.95``, TP / (TP + FP + FN), their mean ``ap``, which is the
        score of the Data Science Bowl, and ``image_pq``.

    Raises:
        InputError: Rows of another length.

    Reference: Kirillov et al. 2019, arXiv 1801.00868, section 4; Caicedo et al. 2019,
    doi 10.1038/s41592-019-0612-7.
    """
    counts = np.asarray(counts, np.float64)
    if counts.ndim != 2 or counts.shape[1] != len(COLUMNS):
        raise InputError(
            f"the counts are {size_text(counts.shape)} and not N x {len(COLUMNS)}:"
            " stack one row of objects.counts for each image."
        )
    number = len(THRESHOLDS)
    hits, false, missed = np.split(counts[:, 3:], 3, axis=1)
    present = hits[:, 0] + false[:, 0] + missed[:, 0] > 0
    every = counts.sum(axis=0)
    tp, fp, fn = np.split(every[3:], 3)
    sizes = tp + (fp + fn) / 2
    f1 = _divide(tp, sizes)
    pq = _divide(every[2], sizes[0])
    # Without a match there is nothing whose fit could be told; the product is 0.
    sq = _divide(every[2], tp[0]) if tp[0] else pq
    scores = {"pq": pq, "sq": sq, "rq": f1[0], "seg": _divide(every[0], every[1])}
    image_pq = _divide(counts[:, 2], hits[:, 0] + (false[:, 0] + missed[:, 0]) / 2)
    scores["image_pq"] = _mean(image_pq[present])
    precision = _divide(hits, hits + false + missed)[present]
    ap = [_mean(precision[:, k]) for k in range(number)]
    scores |= {"ap": np.mean(ap), "f1": np.mean(f1)}
    scores |= {f"ap@{t:g}": ap[k] for k, t in enumerate(THRESHOLDS)}
    scores |= {f"f1@{t:g}": f1[k] for k, t in enumerate(THRESHOLDS)}
    return {key: float(score) for key, score in scores.items()}


class _Pairs(NamedTuple):
    """The objects of two label images and where they meet, background left out."""

    references: NumpyArray  # i64[R], their numbers
    reference_pixels: NumpyArray  # i64[R]
    predictions: NumpyArray  # i64[P]
    prediction_pixels: NumpyArray  # i64[P]
    ids: NumpyArray  # i64[M, 2]
    shared: NumpyArray  # i64[M], pixels
    covered: NumpyArray  # f64[M], part of the reference object
    iou: NumpyArray  # f64[M]


def _pairs(table: NumpyArray) -> _Pairs:
    references, reference_pixels = _areas(table[:, 0], table[:, 2])
    predictions, prediction_pixels = _areas(table[:, 1], table[:, 2])
    table = table[(table[:, 0] > 0) & (table[:, 1] > 0)]
    shared = table[:, 2]
    first = reference_pixels[np.searchsorted(references, table[:, 0])]
    second = prediction_pixels[np.searchsorted(predictions, table[:, 1])]
    return _Pairs(
        references=references,
        reference_pixels=reference_pixels,
        predictions=predictions,
        prediction_pixels=prediction_pixels,
        ids=table[:, :2],
        shared=shared,
        covered=shared / first,
        # Correctly rounded, as the thresholds are: 1/2 is not above 0.5.
        iou=shared / (first + second - shared),
    )


def _areas(ids: NumpyArray, pixels: NumpyArray) -> tuple[NumpyArray, NumpyArray]:
    """The numbers above 0, sorted, and the pixels of each."""
    numbers, place = np.unique(ids, return_inverse=True)
    areas = np.zeros(numbers.size, np.int64)
    np.add.at(areas, place, pixels)
    return numbers[numbers > 0], areas[numbers > 0]


def _seg(pairs: _Pairs) -> float:
    return float(pairs.iou[pairs.covered > 0.5].sum())


def _checked(name: str, image: Any) -> NumpyArray:
    image = np.asarray(image)
    numbers = np.issubdtype(image.dtype, np.integer)
    if not numbers or (image.size and not 0 <= image.min() <= image.max() < 2**31):
        raise InputError(
            f"the {name} is {image.dtype} or holds numbers below 0 or above 2^31 - 1:"
            " number its objects from 1, for instance with scipy.ndimage.label."
        )
    return image.astype(np.int64)


def _divide(above: Any, below: Any) -> NumpyArray:
    """NaN where both are 0; nothing here is divided by 0 otherwise."""
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0)


def _mean(values: NumpyArray) -> float:
    return float(values.mean()) if values.size else float("nan")
