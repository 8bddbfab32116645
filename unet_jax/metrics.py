"""Segmentation metrics from one core: integer counts on device, one division on host.

``confusion`` counts, for each example of a batch; counts add up over batches, devices
and processes without any loss. ``summarise`` divides once, in float64. There is never a
mean of batch means.

A score of nothing, such as the Dice of a class that is neither in the truth nor in the
prediction, is 0/0. It is settled by a stated policy, never by an epsilon:

- ``skip``  the score is NaN and is left out of every mean (a mean of nothing is NaN);
- ``one``   finding nothing where there is nothing is perfect;
- ``zero``  it counts as a failure.

Whatever the policy, an image in which nothing was counted (a row that fills up a batch,
a label that was not annotated) is left out of the means over images.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np

from unet_jax.types import Array, InputError, NumpyArray, Task

Empty = Literal["skip", "one", "zero"]


def decide(logits: Array, *, task: Task, threshold: float = 0.5) -> Array:
    """What a net says: its most likely class, or the labels above the threshold.

    Args:
        logits: ``[..., K]``.
        task: ``classes`` (argmax; of equal logits the lowest class) or ``labels``.
        threshold: in (0, 1); a label is present where ``sigmoid(logit) > threshold``.
            ``classes`` does not use it.

    Returns:
        i32 ``[...]`` of class ids, or i32 ``[..., K]`` of zeros and ones.
    """
    if task == "classes":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    probability = jax.nn.sigmoid(logits.astype(jnp.float32))
    return (probability > threshold).astype(jnp.int32)


def confusion(
    logits: Array, label: Array, weight: Array, *, task: Task, threshold: float = 0.5
) -> Array:
    """How often what was called what, for each example.

    Args:
        logits: ``[B, *S, K]``.
        label: integer ``[B, *S]`` (classes) or ``[B, *S, K]`` (labels). It may hold
            anything where the weight is 0; elsewhere, a label out of range is not
            counted.
        weight: f32 like ``label``; pixels with ``weight > 0`` count, each as one.
        task: ``classes`` or ``labels``.
        threshold: as for ``decide``.

    Returns:
        i32 ``[B, K, K]`` indexed [true, predicted] (classes), or i32 ``[B, K, 2, 2]``,
        one such table for each label. Exact up to 2^31 pixels an example.
    """
    expected = logits.shape[:-1] if task == "classes" else logits.shape
    chex.assert_shape([label, weight], expected)
    predicted = decide(logits, task=task, threshold=threshold)
    label = label.astype(jnp.int32)
    counted = weight > 0
    if task == "labels":
        return _binary_tables(label, predicted, counted)
    classes = logits.shape[-1]
    # -1 has no one-hot row, so a pixel that does not count adds nothing.
    true = jax.nn.one_hot(jnp.where(counted, label, -1), classes, dtype=jnp.float32)
    said = jax.nn.one_hot(predicted, classes, dtype=jnp.float32)
    # A matmul is the fast way to count pairs. Along one row of the first spatial axis
    # the counts stay below 2^24, where float32 is exact; the rows add as integers.
    flat = (*label.shape[:2], -1, classes)
    rows = jnp.einsum(
        "bhnt,bhnp->bhtp",
        true.reshape(flat),
        said.reshape(flat),
        preferred_element_type=jnp.float32,
    )
    return jnp.sum(rows.astype(jnp.int32), axis=1, dtype=jnp.int32)


def summarise(
    confusion: NumpyArray,
    *,
    task: Task,
    label_names: Sequence[str],
    empty: Empty = "skip",
) -> dict[str, float]:
    """Every score of a data set from the confusion tables of its images, in float64.

    Args:
        confusion: integer ``[N, K, K]`` (classes) or ``[N, K, 2, 2]`` (labels), one
            table for each image. Rows that only fill up a batch may be among them.
        task: ``classes`` or ``labels``.
        label_names: the K names, each once. The one called ``background``, if any, has
            scores of its own but no part in the means over names.
        empty: what 0/0 is, in every score and every mean; see the module's docstring.

    Returns:
        A dict of floats. From the table of all images added up (pooled): ``dice/NAME``,
        ``iou/NAME``, ``precision/NAME``, ``recall/NAME``, ``pixel_accuracy/NAME`` (of
        this name against all others), the means over names ``dice`` and ``iou``, and
        ``pixel_accuracy`` (pixels right / pixels counted; for ``labels`` over all
        labels). Means over images of each image's own score: the same with ``image_``
        before them, but for the last.

    Raises:
        InputError: names that do not fit the tables, or an unknown policy.
    """
    tables = _binary(confusion, task=task, label_names=label_names, empty=empty)
    pooled = tables.sum(axis=0)
    scores: dict[str, float] = {}
    for key, score in _SCORES.items():
        for name, value in zip(label_names, score(pooled, empty), strict=True):
            scores[f"{key}/{name}"] = float(value)
    inner = [k for k, name in enumerate(label_names) if name != "background"]
    for key in ("dice", "iou"):
        scores[key] = _mean(_SCORES[key](pooled, empty)[inner])
    counts = np.asarray(confusion, np.int64)
    right = np.trace(counts, axis1=-2, axis2=-1).sum()
    scores["pixel_accuracy"] = float(_divide(right, counts.sum(), "skip"))
    for key in _SCORES:
        images = _of_each_image(_SCORES[key], tables, empty)
        means = np.asarray([_mean(column) for column in images.T])
        for name, value in zip(label_names, means, strict=True):
            scores[f"image_{key}/{name}"] = float(value)
        if key in ("dice", "iou"):
            scores[f"image_{key}"] = _mean(means[inner])
    return scores


def per_image(
    confusion: NumpyArray,
    *,
    task: Task,
    label_names: Sequence[str],
    empty: Empty = "skip",
) -> NumpyArray:
    """The Dice of every image and name, for lists of the best and worst images.

    Args:
        confusion: integer ``[N, K, K]`` (classes) or ``[N, K, 2, 2]`` (labels).
        task: ``classes`` or ``labels``.
        label_names: the K names.
        empty: what 0/0 is; ``skip`` is NaN.

    Returns:
        f64 ``[N, K]``. NaN, under every policy, where nothing was counted.

    Raises:
        InputError: as for ``summarise``.
    """
    tables = _binary(confusion, task=task, label_names=label_names, empty=empty)
    return _of_each_image(_dice, tables, empty)


def _binary_tables(label: Array, predicted: Array, counted: Array) -> Array:
    """i32[B, K, 2, 2] from zeros and ones ``[B, *S, K]``."""
    axes = tuple(range(1, label.ndim - 1))

    def count(true: int, said: int) -> Array:
        pairs = counted & (label == true) & (predicted == said)
        return jnp.sum(pairs, axis=axes, dtype=jnp.int32)

    rows = [jnp.stack([count(true, 0), count(true, 1)], axis=-1) for true in (0, 1)]
    return jnp.stack(rows, axis=-2)


def _binary(
    confusion: NumpyArray, *, task: Task, label_names: Sequence[str], empty: str
) -> NumpyArray:
    """i64[N, K, 4]: true and false positives, false negatives, pixels counted."""
    table = np.asarray(confusion, np.int64)
    classes = len(label_names)
    inner = (classes, classes) if task == "classes" else (classes, 2, 2)
    if table.shape[1:] != inner:
        raise InputError(
            f"a confusion table of shape {table.shape} does not fit the {classes} "
            f"label names {tuple(label_names)}: expected [N, {str(inner)[1:-1]}]"
        )
    if len(set(label_names)) < classes:
        raise InputError(
            f"label names {tuple(label_names)} repeat: give each class its own name"
        )
    if empty not in get_args(Empty):
        raise InputError(f"empty={empty!r} is unknown: use skip, one or zero")
    if task == "labels":
        both, false, missed = table[..., 1, 1], table[..., 0, 1], table[..., 1, 0]
    else:
        both = np.diagonal(table, axis1=1, axis2=2)
        false = table.sum(axis=1) - both
        missed = table.sum(axis=2) - both
    total = table.sum(axis=(-2, -1))
    total = np.broadcast_to(total[:, None] if task == "classes" else total, both.shape)
    return np.stack([both, false, missed, total], axis=-1)


def _divide(above: NumpyArray, below: NumpyArray, empty: Empty) -> NumpyArray:
    nothing = {"skip": np.nan, "one": 1.0, "zero": 0.0}[empty]
    return np.where(below == 0, nothing, above / np.maximum(below, 1))


def _dice(table: NumpyArray, empty: Empty) -> NumpyArray:
    both, false, missed = np.moveaxis(table[..., :3], -1, 0)
    return _divide(2 * both, 2 * both + false + missed, empty)


def _iou(table: NumpyArray, empty: Empty) -> NumpyArray:
    both, false, missed = np.moveaxis(table[..., :3], -1, 0)
    return _divide(both, both + false + missed, empty)


def _precision(table: NumpyArray, empty: Empty) -> NumpyArray:
    return _divide(table[..., 0], table[..., 0] + table[..., 1], empty)


def _recall(table: NumpyArray, empty: Empty) -> NumpyArray:
    return _divide(table[..., 0], table[..., 0] + table[..., 2], empty)


def _accuracy(table: NumpyArray, empty: Empty) -> NumpyArray:
    wrong, counted = table[..., 1] + table[..., 2], table[..., 3]
    return _divide(counted - wrong, counted, empty)


_SCORES: dict[str, Callable[[NumpyArray, Empty], NumpyArray]] = {
    "dice": _dice,
    "iou": _iou,
    "precision": _precision,
    "recall": _recall,
    "pixel_accuracy": _accuracy,
}


FIGURES = frozenset((*_SCORES, *(f"image_{key}" for key in _SCORES)))
"""What `summarise` calls its figures, without the ``/NAME`` of a class."""


def _of_each_image(
    score: Callable[[NumpyArray, Empty], NumpyArray], tables: NumpyArray, empty: Empty
) -> NumpyArray:
    return np.where(tables[..., 3] > 0, score(tables, empty), np.nan)


def _mean(values: NumpyArray) -> float:
    """The mean of what is not NaN; NaN, without a warning, when nothing is left."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")
