"""How well a membrane map parts an image into cells: the measures of ISBI 2012.

V_Rand and V_Info after border thinning, and the two measures the challenge has given
up, pixel error and foreground-restricted Rand error, as the challenge's own program
computes them: `RandError`, `VariationOfInformation` and `PixelError` of Fiji's
Trainable Segmentation at commit 41c7083. What it does, at each of eleven thresholds:

- The truth is the 4-connected components of the cells. Its membrane is not thinned; the
  pixels of it are left out of everything.
- The proposal is what is above the threshold, parted anew by a watershed that thins the
  membrane to dams one pixel wide (`thinned`). A dam pixel that lies in a cell of the
  truth is a region of its own.
- V_Rand compares pairs of pixels, each pixel with itself included (N^2 pairs, not
  N (N - 1)); V_Info compares entropies. A slice's score is the F-score of what splits
  and what mergers leave of it.
- Slices are averaged, then the best threshold is taken. Both errors are of the F-score
  of all slices' counts together instead, and the Rand error has no thinning: the
  proposal is its 4-connected components, its membrane pixels single.

The thresholds are 0.1 added up in float64, so that the last one is just below 1: a
pixel of probability 1 is a cell at all of them. A slice of a single cell scores 0 in
V_Info whatever the proposal, for it has no entropy to share. A slice without any cell
scores 0 in V_Rand and V_Info; to the Rand error it adds nothing, where there a division
by zero makes the whole stack's error 1. Split and merge scores are not reported there;
here they are means over slices at the threshold that is best for the F-score.

Reference: Arganda-Carreras et al. 2015, doi 10.3389/fnana.2015.00142.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unet_jax.objects import overlaps
from unet_jax.types import InputError, NumpyArray, size_text

THRESHOLDS = tuple(itertools.accumulate([0.1] * 10, initial=0.0))
"""0, 0.1, 0.2, 0.30000000000000004 ... 0.9999999999999999: the challenge's own."""

COLUMNS = (
    *("v_rand", "v_rand_split", "v_rand_merge"),
    *("v_info", "v_info_split", "v_info_merge"),
    *("pixels_both", "pixels_false", "pixels_missed"),
    *("pairs_both", "pairs_false", "pairs_missed"),
)
"""What the columns of `isbi2012_counts` are."""


class Scores(NamedTuple):
    """How little is split, how little is merged, and the harmonic mean of both."""

    split: float
    merge: float
    f: float


def components(inside: Any) -> NumpyArray:
    """The connected parts of a mask.

    Args:
        inside: ``bool[H, W]``, or of another rank.

    Returns:
        ``i32`` of that size: 0 outside, parts from 1 on; pixels that share an edge (a
        face, in 3-D) are connected.

    Raises:
        InputError: It is not boolean.
    """
    from scipy import ndimage

    label: Any = ndimage.label
    return label(_mask(inside))[0].astype(np.int32)


def thinned(inside: Any) -> NumpyArray:
    """The regions of a mask, grown until only dams of one pixel part them.

    The watershed of Soille and Vincent on a map of two levels, in the order of Fiji's
    `WatershedTransform2D`. Every 4-connected part of the mask floods what is outside
    it, all at the same speed. The pixels that the flood reaches are settled one after
    another: those next to the mask by columns, those farther away in the order of their
    forerunners. A pixel looks at its settled neighbours across an edge. If they belong
    to one region, dams apart, it joins it; if they belong to several, or all are dams,
    it is a dam. So if two regions are an odd number of pixels apart the dam is in the
    middle, and if the number is even, where two fronts meet without a pixel between
    them, it is on the side that is settled later: to the right, or below.

    Args:
        inside: ``bool[H, W]``, the cells.

    Returns:
        ``i32[H, W]``, 0 on dams. A mask without any pixel is one region, for the flood
        then starts everywhere.

    Raises:
        InputError: It is not a boolean map of two axes.

    Reference: Soille and Vincent 1990, doi 10.1117/12.24211.
    """
    inside = _mask(inside)
    if inside.ndim != 2:
        raise InputError(
            f"the mask has {inside.ndim} axes: thin the slices of a volume one by one."
        )
    if not inside.any():
        return np.ones(inside.shape, np.int32)
    # A frame, so that every pixel has four neighbours; columns are read as rows.
    seeds = np.pad(inside.T, 1)
    steps = np.asarray([-seeds.shape[1], -1, seeds.shape[1], 1])
    region = components(seeds).ravel()
    waiting = np.pad(~inside.T, 1).ravel()
    # When a pixel is settled; before all others if it is inside, never yet at first.
    never = np.iinfo(np.int32).max
    turn = np.where(seeds.ravel(), np.int32(-1), np.int32(never))
    front = np.flatnonzero(waiting)
    front = front[seeds.ravel()[front[:, None] + steps].any(axis=1)]
    begin = 0
    while front.size:
        waiting[front] = False
        turn[front] = np.arange(begin, begin + front.size)
        around = front[:, None] + steps
        settled = turn[around] < turn[front][:, None]
        region[front] = _flooded(np.where(settled, region[around], 0))
        # Neighbours in the same front wait for one another: what they say is repeated
        # until nobody changes. Who is first is right at once, so that it ends.
        late = (settled & (turn[around] >= begin)).any(axis=1)
        pixels, near, known = front[late], around[late], settled[late]
        while True:
            said = _flooded(np.where(known, region[near], 0))
            if np.array_equal(said, region[pixels]):
                break
            region[pixels] = said
        begin += front.size
        # Whom two pixels call comes where the first one calls it; of several writes to
        # one place the last one stays.
        called = around[waiting[around]]
        place = np.arange(called.size)
        turn[called[::-1]] = place[::-1]
        front = called[turn[called] == place]
    return region.reshape(seeds.shape)[1:-1, 1:-1].T.copy()


def pair_counts(label_regions: Any, proposal_regions: Any) -> tuple[int, int, int]:
    """How many pairs of pixels are in one region in both, and in only one of them.

    Args:
        label_regions: Integers ``[*S]``; pixels of 0 do not count.
        proposal_regions: Integers ``[*S]``; a pixel of 0 is a region of its own.

    Returns:
        Ordered pairs, each pixel with itself among them: in one region in both; in the
        proposal alone (merged); in the label alone (split).

    Raises:
        InputError: They are no label images, or differ in size.
    """
    return _pair_counts(_Table.of(label_regions, proposal_regions))


def rand_scores(label_regions: Any, proposal_regions: Any) -> Scores:
    """V_Rand of one slice.

    ``split`` is the part of the label's pairs that are together in the proposal too,
    ``merge`` the part of the proposal's that are together in the label.

    Args:
        label_regions: Integers ``[*S]``; pixels of 0 do not count.
        proposal_regions: Integers ``[*S]``; a pixel of 0 is a region of its own.

    Returns:
        Scores between 0 and 1, 1 is perfect; all 0 if the label has no region.

    Raises:
        InputError: As for `pair_counts`.

    Reference: Arganda-Carreras et al. 2015, doi 10.3389/fnana.2015.00142.
    """
    return _rand_scores(_Table.of(label_regions, proposal_regions))


def information_scores(label_regions: Any, proposal_regions: Any) -> Scores:
    """V_Info of one slice.

    The information that both partitions share: ``split`` is the part of it in the
    proposal's entropy, which splits raise, ``merge`` the part in the label's.

    Args:
        label_regions: Integers ``[*S]``; pixels of 0 do not count.
        proposal_regions: Integers ``[*S]``; a pixel of 0 is a region of its own.

    Returns:
        Scores between 0 and 1, 1 is perfect; all 0 if the label has no region. If the
        proposal is one region, without a dam, split and F-score are 0 and merge is 1,
        or else, if the label is one, merge and F-score are 0 and split is 1.

    Raises:
        InputError: As for `pair_counts`.

    Reference: Arganda-Carreras et al. 2015, doi 10.3389/fnana.2015.00142.
    """
    return _information_scores(_Table.of(label_regions, proposal_regions))


def isbi2012_counts(probability: Any, label: Any) -> NumpyArray:
    """What `isbi2012` needs to know of one slice.

    Args:
        probability: Floats ``[H, W]`` between 0 and 1: of a cell, not of a membrane.
        label: ``bool[H, W]`` or zeros and ones: 1 is a cell, 0 is membrane.

    Returns:
        ``f64[11, 12]``, of `THRESHOLDS` and `COLUMNS`: the scores of this slice, and
        how many pixels, and pairs of pixels, are cells in both, in the proposal alone
        and in the label alone.

    Raises:
        InputError: Maps of another size, rank or range.
    """
    probability, label = np.asarray(probability), np.asarray(label)
    if label.ndim != 2 or label.shape != probability.shape:
        raise InputError(
            f"the probability is {size_text(probability.shape)} and the label"
            f" {size_text(label.shape)}: give one slice of each, of one size."
        )
    if not ((label == 0) | (label == 1)).all():
        raise InputError(
            "the label holds other values than 0 and 1: compare it, as in label > 0,"
            " so that cells are 1."
        )
    # In float64, for the thresholds are: 0.3 in float32 is above 0.1 + 0.1 + 0.1.
    probability = probability.astype(np.float64)
    if not ((probability >= 0) & (probability <= 1)).all():
        raise InputError(
            "the probability holds values outside 0 to 1: give a cell's probability,"
            " not logits or grey values."
        )
    label = label == 1
    truth = components(label)
    rows = []
    for threshold in THRESHOLDS:
        inside = probability > threshold
        table = _Table.of(truth, thinned(inside))
        rand, info = _rand_scores(table), _information_scores(table)
        pixels = [np.count_nonzero(x) for x in (label & inside, inside, label)]
        pixels = [pixels[0], pixels[1] - pixels[0], pixels[2] - pixels[0]]
        pairs = pair_counts(truth, components(inside))
        scores = [rand.f, rand.split, rand.merge, info.f, info.split, info.merge]
        rows.append([*scores, *pixels, *pairs])
    return np.asarray(rows, np.float64)


def isbi2012(counts: NumpyArray) -> dict[str, float]:
    """The measures of the challenge from the counts of its slices.

    Args:
        counts: ``f64[N, 11, 12]``, one of `isbi2012_counts` for each slice.

    Returns:
        ``v_rand`` and ``v_info``: the mean over slices at the best threshold. With
        ``_split`` and ``_merge`` behind them, those scores at the same threshold.
        ``pixel_error`` and ``rand_error``: 1 - the best F-score of all slices together.
        With ``_threshold`` behind any of the four, the first threshold that is best,
        to three digits.

    Raises:
        InputError: No slice, or counts of another size.
    """
    counts = np.asarray(counts, np.float64)
    expected = (len(THRESHOLDS), len(COLUMNS))
    if counts.ndim != 3 or counts.shape[1:] != expected or not len(counts):
        raise InputError(
            f"the counts are {size_text(counts.shape)} and not N x"
            f" {size_text(expected)}: stack partition.isbi2012_counts of one slice or"
            " more."
        )
    scores: dict[str, float] = {}
    means = counts[..., :6].mean(axis=0)
    for key, column in (("v_rand", 0), ("v_info", 3)):
        best = int(means[:, column].argmax())
        for offset, name in enumerate(("", "_split", "_merge")):
            scores[key + name] = float(means[best, column + offset])
        scores[key + "_threshold"] = round(THRESHOLDS[best], 3)
    sums = counts[..., 6:].sum(axis=0)
    # Nothing found where nothing is: right for pixels, but there are no pairs to judge.
    for key, column, nothing in (("pixel_error", 0, 1.0), ("rand_error", 3, 0.0)):
        f = _f_score(sums[:, column : column + 3].T, nothing)
        best = int(f.argmax())
        scores[key] = float(1 - f[best])
        scores[key + "_threshold"] = round(THRESHOLDS[best], 3)
    return scores


class _Table(NamedTuple):
    """Pixels of the label's regions, shared with whom; dams are single pixels."""

    label: NumpyArray  # i64, the pixels of each region of the label
    proposal: NumpyArray  # i64, of each region of the proposal, within the label's
    both: NumpyArray  # i64, of each pair of regions that meets
    dams: int

    @classmethod
    def of(cls, label_regions: Any, proposal_regions: Any) -> "_Table":
        table = overlaps(label_regions, proposal_regions)
        table = table[table[:, 0] > 0]
        first, second, pixels = table.T
        labels = _sums(first, pixels)
        inside = second > 0
        return cls(
            label=labels,
            proposal=_sums(second[inside], pixels[inside]),
            both=pixels[inside],
            dams=int(pixels[~inside].sum()),
        )


def _sums(keys: NumpyArray, pixels: NumpyArray) -> NumpyArray:
    place = np.unique(keys, return_inverse=True)[1]
    # As floats, exact below 2^53 pixels.
    return np.bincount(place, weights=pixels).astype(np.int64)


def _pair_counts(table: _Table) -> tuple[int, int, int]:
    # Exact in 64 bits up to 3e9 pixels.
    both = int((table.both**2).sum()) + table.dams
    proposal = int((table.proposal**2).sum()) + table.dams
    return both, proposal - both, int((table.label**2).sum()) - both


def _rand_scores(table: _Table) -> Scores:
    both, merged, split = counts = _pair_counts(table)
    if not both:
        return Scores(0.0, 0.0, 0.0)
    f = float(_f_score(np.asarray(counts, np.float64), 0.0))
    return Scores(both / (both + split), both / (both + merged), f)


def _information_scores(table: _Table) -> Scores:
    if not table.label.size:
        return Scores(0.0, 0.0, 0.0)
    label = _entropy(table.label, 0)
    proposal = _entropy(table.proposal, table.dams)
    if not (label and proposal):
        return Scores(1.0, 0.0, 0.0) if proposal else Scores(0.0, 1.0, 0.0)
    # Rounding must not make it negative where the partitions are independent.
    shared = max(label + proposal - _entropy(table.both, table.dams), 0.0)
    f = 2 * shared / (label + proposal)
    return Scores(shared / proposal, shared / label, f)


def _entropy(pixels: NumpyArray, single: int) -> float:
    """Of a partition, in nats, exactly 0 for one region."""
    total = int(pixels.sum()) + single
    if pixels.size + single <= 1:
        return 0.0
    return float(np.log(total) - (pixels * np.log(pixels)).sum() / total)


def _f_score(counts: NumpyArray | Sequence[NumpyArray], nothing: float) -> NumpyArray:
    """The harmonic mean of precision and recall from both, false and missed."""
    both, false, missed = counts
    size = 2 * both + false + missed
    return np.where(size > 0, 2 * both / np.maximum(size, 1), nothing)


def _flooded(seen: NumpyArray) -> NumpyArray:
    """``i32[N]`` from the regions around N pixels: the only one above 0, or 0."""
    high = seen.max(axis=1)
    low = np.where(seen > 0, seen, np.iinfo(np.int32).max).min(axis=1)
    return np.where(low == high, high, np.int32(0))


def _mask(inside: Any) -> NumpyArray:
    inside = np.asarray(inside)
    if inside.dtype != bool:
        raise InputError(
            f"the mask is {inside.dtype} and not boolean: compare it, as in inside > 0."
        )
    return inside
