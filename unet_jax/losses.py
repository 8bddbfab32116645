"""Losses from logits: ``(logits, label, weight, *, options) -> f32[B]``.

Conventions that all of them keep:

- ``logits`` f32 or bf16 ``[B, *S, K]``, never probabilities. The work is in float32, or
  in float64 for logits of float64.
- ``label`` integers, ``[B, *S]`` in ``0..K-1`` (task ``classes``) or ``[B, *S, K]`` of
  zeros and ones (task ``labels``). Under weight 0 it may hold anything, such as 255 or
  -1: value and gradient stay finite. Any other label out of range makes the loss NaN,
  because a wrong number that looks right is worse.
- ``weight`` f32 like ``label``, not negative. Cross entropies and focal loss multiply
  by its value; Dice and Tversky ask only whether it is above 0.
- Each row of the result is the loss of one example. A row without any weight (one that
  fills up a last batch) is 0, so that the sum of the rows divided by the number of rows
  that have weight is the loss of the batch, whatever the options.

There are no gathers and no shapes that depend on data: every loss works under ``jit``,
``vmap`` and any sharding, in 2-D and 3-D. What pools over the batch pools over the
whole batch that the function sees, which under ``jit`` is the global one.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import chex
import jax
import jax.numpy as jnp
import optax

from unet_jax.types import Array, InputError, LossFn, Task, choose

Normalise = Literal["pixels", "weights"]
Over = Literal["image", "batch"]


def cross_entropy(
    logits: Array,
    label: Array,
    weight: Array,
    *,
    class_weights: Sequence[float] = (),
    normalise: Normalise = "pixels",
) -> Array:
    """Softmax cross entropy, ``-log softmax(logits)[label]``, a mean over pixels.

    Args:
        logits: ``[B, *S, K]``, K at least 2.
        label: integer ``[B, *S]``, class ids.
        weight: f32 ``[B, *S]``.
        class_weights: K factors, one for each true class, or ``()`` for none.
        normalise: ``pixels`` divides each example's weighted sum by its number of
            pixels with ``weight > 0``, so that weights scale the gradient. ``weights``
            divides by the sum of ``weight * class_weights`` over the whole batch: the
            mean that ``torch.nn.CrossEntropyLoss(weight, ignore_index)`` takes.

    Returns:
        f32 ``[B]``; under ``weights`` the same value for every row with weight.

    Reference:
        Ronneberger et al., U-Net, 2015, eq. 1-2 (the energy E with its weights w(x)).
    """
    logits, target, weight = _prepare(logits, label, weight, task="classes")
    loss = jax.nn.logsumexp(logits, axis=-1) - _pick(logits, target)
    factor = _class_factor(target, class_weights, task="classes")
    return _pixel_mean(loss, weight, factor, normalise=normalise)


def binary_cross_entropy(
    logits: Array,
    label: Array,
    weight: Array,
    *,
    class_weights: Sequence[float] = (),
    normalise: Normalise = "pixels",
) -> Array:
    """Sigmoid cross entropy of K independent labels, a mean over pixels and labels.

    Args:
        logits: ``[B, *S, K]``, K at least 1.
        label: ``[B, *S, K]`` of zeros and ones.
        weight: f32 ``[B, *S, K]``.
        class_weights: K factors for the positive pixels of each label (the negatives
            keep 1), or ``()``. This is ``pos_weight`` of torch's BCEWithLogitsLoss.
        normalise: ``pixels`` or ``weights``, as for ``cross_entropy``. With weights of
            one and images of one size, ``pixels`` is torch's mean.

    Returns:
        f32 ``[B]``; under ``weights`` the same value for every row with weight.
    """
    logits, target, weight = _prepare(logits, label, weight, task="labels")
    loss = optax.sigmoid_binary_cross_entropy(logits, target)
    factor = _class_factor(target, class_weights, task="labels")
    return _pixel_mean(loss, weight, factor, normalise=normalise)


def focal(
    logits: Array,
    label: Array,
    weight: Array,
    *,
    task: Task,
    gamma: float = 2.0,
    alpha: Sequence[float] = (),
    class_weights: Sequence[float] = (),
    normalise: Normalise = "pixels",
) -> Array:
    """Focal loss ``-alpha_t (1 - p_t)^gamma log p_t``; cross entropy at ``gamma=0``.

    ``p_t`` is the probability of what is true: of the true class, or of each label's
    presence or absence. ``(1 - p_t)^gamma`` is computed from ``log(1 - p_t)``, so that
    value and gradient are finite for confident pixels and any gamma of 0 or more.

    Args:
        logits: ``[B, *S, K]``.
        label: integer ``[B, *S]`` (classes) or ``[B, *S, K]`` (labels).
        weight: f32 like ``label``.
        task: ``classes`` (softmax) or ``labels`` (sigmoid).
        gamma: how much easy pixels are damped, 0 or more.
        alpha: K values or ``()``. ``classes``: the factor of each true class.
            ``labels``: ``alpha`` for positives and ``1 - alpha`` for negatives, as in
            the paper. It belongs to the loss, so ``normalise`` does not divide by it.
        class_weights: as for ``cross_entropy`` or ``binary_cross_entropy``.
        normalise: as for ``cross_entropy``.

    Returns:
        f32 ``[B]``.

    Reference:
        Lin et al., Focal Loss for Dense Object Detection, 2017, section 3, eq. 5.
    """
    logits, target, weight = _prepare(logits, label, weight, task=task)
    if task == "classes":
        loss = jax.nn.logsumexp(logits, axis=-1) - _pick(logits, target)
        others = jax.nn.logsumexp(logits, axis=-1, where=target == 0)
        log_miss = others - jax.nn.logsumexp(logits, axis=-1)
    else:
        loss = optax.sigmoid_binary_cross_entropy(logits, target)
        log_miss = jax.nn.log_sigmoid((1 - 2 * target) * logits)
    loss = jnp.exp(gamma * log_miss) * loss
    if len(alpha) and task == "classes":
        loss = loss * _class_factor(target, alpha, task=task)
    elif len(alpha):
        share = _per_class(alpha, target)
        loss = loss * (target * share + (1 - target) * (1 - share))
    factor = _class_factor(target, class_weights, task=task)
    return _pixel_mean(loss, weight, factor, normalise=normalise)


def soft_dice(
    logits: Array,
    label: Array,
    weight: Array,
    *,
    task: Task,
    smooth: float = 1.0,
    over: Over = "image",
    background: bool = True,
    micro: bool = False,
    squared: bool = False,
) -> Array:
    """One minus the soft Dice coefficient, averaged over classes.

    For each class, with sums over the pixels of ``weight > 0``::

        dice = (2 sum(p y) + smooth) / (sum(p) + sum(y) + smooth)

    Args:
        logits: ``[B, *S, K]``.
        label: integer ``[B, *S]`` (classes) or ``[B, *S, K]`` (labels).
        weight: f32 like ``label``; only ``weight > 0`` is used, not its value.
        task: ``classes`` (softmax) or ``labels`` (sigmoid).
        smooth: added above and below, in pixels. With 0, a class that is absent from
            label and prediction has Dice 1.
        over: ``image`` gives each example its own loss. ``batch`` adds the sums of all
            examples before the division, which steadies classes that are rare.
        background: whether class 0 counts; ``classes`` only.
        micro: add the sums of all classes before the division, for one Dice of them
            together instead of the mean of theirs.
        squared: ``sum(p^2) + sum(y^2)`` as the denominator.

    Returns:
        f32 ``[B]``; under ``batch`` the same value for every row with weight.

    Reference:
        Milletari et al., V-Net, 2016, section 3 (``squared=True``); Drozdzal et al.,
        The Importance of Skip Connections, 2016, section 3 (the form without squares,
        pooled over the batch).
    """
    both, predicted, true = _overlap(
        logits,
        label,
        weight,
        task=task,
        over=over,
        background=background,
        micro=micro,
        squared=squared,
    )
    dice = _ratio(2 * both + smooth, predicted + true + smooth)
    return _one_minus_mean(dice, weight)


def tversky(
    logits: Array,
    label: Array,
    weight: Array,
    *,
    task: Task,
    alpha: float = 0.3,
    beta: float = 0.7,
    smooth: float = 1.0,
    over: Over = "image",
    background: bool = True,
    micro: bool = False,
) -> Array:
    """One minus the Tversky index, which prices misses and false alarms apart.

    For each class, with sums over the pixels of ``weight > 0``::

        index = (TP + smooth) / (TP + alpha FP + beta FN + smooth)

    where ``TP = sum(p y)``, ``FP = sum(p (1 - y))``, ``FN = sum((1 - p) y)``. With
    ``alpha = beta = 0.5`` it is ``soft_dice`` of twice the ``smooth``; with 1 and 1 it
    is the soft IoU.

    Args:
        logits: ``[B, *S, K]``.
        label: integer ``[B, *S]`` (classes) or ``[B, *S, K]`` (labels).
        weight: f32 like ``label``; only ``weight > 0`` is used, not its value.
        task: ``classes`` (softmax) or ``labels`` (sigmoid).
        alpha: price of false positives.
        beta: price of false negatives; more than ``alpha`` favours recall.
        smooth: as for ``soft_dice``.
        over: as for ``soft_dice``.
        background: as for ``soft_dice``.
        micro: as for ``soft_dice``.

    Returns:
        f32 ``[B]``; under ``batch`` the same value for every row with weight.

    Reference:
        Salehi et al., Tversky Loss Function for Image Segmentation Using 3D Fully
        Convolutional Deep Networks, 2017, section 2.2 (0.3 and 0.7: section 4).
    """
    both, predicted, true = _overlap(
        logits,
        label,
        weight,
        task=task,
        over=over,
        background=background,
        micro=micro,
    )
    errors = alpha * (predicted - both) + beta * (true - both)
    index = _ratio(both + smooth, both + errors + smooth)
    return _one_minus_mean(index, weight)


_TERMS: dict[str, Callable[..., Array]] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "dice": soft_dice,
    "tversky": tversky,
    "focal": focal,
}
_ONE_TASK: dict[str, tuple[Task, str]] = {
    "cross_entropy": ("classes", "binary_cross_entropy"),
    "binary_cross_entropy": ("labels", "cross_entropy"),
}


def build(
    *,
    task: Task,
    cross_entropy: float = 0.0,
    binary_cross_entropy: float = 0.0,
    dice: float = 0.0,
    tversky: float = 0.0,
    focal: float = 0.0,
    class_weights: Sequence[float] = (),
    normalise: Normalise = "pixels",
    smooth: float = 1.0,
    over: Over = "image",
    background: bool = True,
    micro: bool = False,
    squared: bool = False,
    gamma: float = 2.0,
    focal_alpha: Sequence[float] = (),
    alpha: float = 0.3,
    beta: float = 0.7,
) -> LossFn:
    """The weighted sum of losses that a configuration asks for.

    Args:
        task: ``classes`` or ``labels``; every term follows it.
        cross_entropy: factor of the term, 0 for none; ``classes`` only.
        binary_cross_entropy: factor of the term; ``labels`` only.
        dice: factor of ``soft_dice``.
        tversky: factor of the term.
        focal: factor of the term.
        class_weights: of the two cross entropies and focal loss.
        normalise: of the two cross entropies and focal loss.
        smooth: of Dice and Tversky.
        over: of Dice and Tversky.
        background: of Dice and Tversky.
        micro: of Dice and Tversky.
        squared: of Dice.
        gamma: of focal loss.
        focal_alpha: ``alpha`` of focal loss.
        alpha: of Tversky.
        beta: of Tversky.

    Returns:
        ``(logits [B, *S, K], label, weight) -> f32[B]``.

    Raises:
        InputError: no term has a positive factor, a factor is negative, a term does
            not fit the task, or an option is not one of its choices.
    """
    choose(get_args(Task), task, "task =")
    choose(get_args(Normalise), normalise, "loss.normalise =")
    choose(get_args(Over), over, "loss.over =")
    factors = {
        "cross_entropy": cross_entropy,
        "binary_cross_entropy": binary_cross_entropy,
        "dice": dice,
        "tversky": tversky,
        "focal": focal,
    }
    _check_factors(factors, task=task)
    for key, value in (
        ("smooth", smooth),
        ("gamma", gamma),
        ("alpha", alpha),
        ("beta", beta),
        ("class_weights", class_weights),
        ("focal_alpha", focal_alpha),
    ):
        _check_option(key, value)
    pixel = {"class_weights": tuple(class_weights), "normalise": normalise}
    region = {
        "task": task,
        "smooth": smooth,
        "over": over,
        "background": background,
        "micro": micro,
    }
    options: dict[str, dict[str, Any]] = {
        "cross_entropy": pixel,
        "binary_cross_entropy": pixel,
        "dice": {**region, "squared": squared},
        "tversky": {**region, "alpha": alpha, "beta": beta},
        "focal": {**pixel, "task": task, "gamma": gamma, "alpha": tuple(focal_alpha)},
    }

    def loss(logits: Array, label: Array, weight: Array) -> Array:
        total = jnp.zeros(logits.shape[:1], _work_dtype(logits))
        for name, factor in factors.items():
            if factor > 0:
                term = _TERMS[name](logits, label, weight, **options[name])
                total = total + factor * term
        return total

    return loss


def _check_factors(factors: dict[str, float], *, task: Task) -> None:
    for name, factor in factors.items():
        if not 0 <= factor < float("inf"):
            raise InputError(
                f"loss term {name}={factor} must be a finite factor of 0 or more"
            )
        only, instead = _ONE_TASK.get(name, (task, ""))
        if factor > 0 and only != task:
            raise InputError(
                f"loss term {name}={factor} does not fit task={task!r}: "
                f"use {instead} instead, or task={only!r}"
            )
    if not any(factors.values()):
        instead = "cross_entropy" if task == "classes" else "binary_cross_entropy"
        raise InputError(
            f"no loss term has a factor above 0: set one of dice, tversky, focal "
            f"or {instead}, for example {instead}=1.0"
        )


def _check_option(key: str, value: float | Sequence[float]) -> None:
    """Refuses what would turn a loss round, or make it 0 or NaN everywhere."""
    several = isinstance(value, Sequence)
    each = value if several else (value,)
    if not all(0 <= number < float("inf") for number in each):
        raise InputError(f"loss.{key} = {value} must be finite, and 0 or more")
    if several and each and not any(each):
        raise InputError(
            f"loss.{key} = {tuple(each)} counts no class: give one a number above 0, or"
            " leave it out"
        )


def _work_dtype(logits: Array) -> Any:
    return jnp.float64 if logits.dtype == jnp.float64 else jnp.float32


def _prepare(
    logits: Array, label: Array, weight: Array, *, task: Task
) -> tuple[Array, Array, Array]:
    """(logits, target [B, *S, K] of zeros and ones, weight like label), to work in.

    Where the weight is 0 the label is replaced, because NaN * 0 is NaN. Where it is
    not 0 and the label is out of range the target is NaN.
    """
    classes = logits.shape[-1]
    expected = logits.shape[:-1] if task == "classes" else logits.shape
    chex.assert_shape([label, weight], expected)
    if task == "classes" and classes < 2:
        raise InputError(
            "a softmax over one class is always 1: use two classes, "
            "or task='labels' for a net with one output"
        )
    dtype = _work_dtype(logits)
    label = jnp.where(weight > 0, label.astype(jnp.int32), 0)
    limit = classes if task == "classes" else 2
    known = (label >= 0) & (label < limit)
    if task == "classes":
        target = jax.nn.one_hot(label, classes, dtype=dtype)
        known = known[..., None]
    else:
        target = label.astype(dtype)
    target = jnp.where(known, target, jnp.nan)
    return logits.astype(dtype), target, weight.astype(dtype)


def _pick(values: Array, target: Array) -> Array:
    """The value of the true class, ``[B, *S, K] -> [B, *S]``, without a gather.

    A gather would bring all of a sharded image to one device, and its gradient is a
    scatter. ``where`` keeps an infinite logit of another class out of the sum.
    """
    return jnp.sum(jnp.where(target == 0, 0.0, values * target), axis=-1)


def _per_class(values: Sequence[float], target: Array) -> Array:
    """K option values in a shape that broadcasts against ``target`` ``[B, *S, K]``."""
    if len(values) != target.shape[-1]:
        raise InputError(
            f"the loss has {len(values)} weights {tuple(values)} but the model has "
            f"{target.shape[-1]} outputs: give one for each, or () for none"
        )
    array = jnp.asarray(values, target.dtype)
    return array.reshape((1,) * (target.ndim - 1) + (-1,))


def _class_factor(target: Array, values: Sequence[float], *, task: Task) -> Array:
    """The class weight of each pixel: ``[B, *S]`` (classes) or ``[B, *S, K]``."""
    if not len(values):
        shape = target.shape[:-1] if task == "classes" else target.shape
        return jnp.ones(shape, target.dtype)
    weights = _per_class(values, target)
    if task == "classes":
        return jnp.sum(target * weights, axis=-1)
    return 1 + target * (weights - 1)


def _pixel_mean(
    loss: Array, weight: Array, factor: Array, *, normalise: Normalise
) -> Array:
    inner = tuple(range(1, loss.ndim))
    scale = weight * factor
    total = jnp.sum(scale * loss, axis=inner)
    if normalise == "pixels":
        # Counted as integers: a float32 count stops growing at 2^24 pixels.
        count = jnp.sum(weight > 0, axis=inner, dtype=jnp.int32)
        return total / jnp.maximum(count, 1).astype(total.dtype)
    mean = _ratio(jnp.sum(total), jnp.sum(scale))
    return jnp.where(_has_weight(weight), mean, 0.0)


def _overlap(
    logits: Array,
    label: Array,
    weight: Array,
    *,
    task: Task,
    over: Over,
    background: bool,
    micro: bool,
    squared: bool = False,
) -> tuple[Array, Array, Array]:
    """Sums of p*y, p (or its square) and y over the counted pixels.

    Each ``[B, K]``, with K one less without the background and 1 for ``micro``.
    """
    logits, target, weight = _prepare(logits, label, weight, task=task)
    if task == "classes":
        probability = jax.nn.softmax(logits, axis=-1)
        mask = (weight > 0)[..., None]
    else:
        probability = jax.nn.sigmoid(logits)
        mask = weight > 0
    inner = tuple(range(1, logits.ndim - 1))

    def total(values: Array) -> Array:
        sums = jnp.sum(jnp.where(mask, values, 0.0), axis=inner)
        if over == "batch":
            sums = jnp.broadcast_to(jnp.sum(sums, axis=0, keepdims=True), sums.shape)
        if task == "classes" and not background:
            sums = sums[:, 1:]
        return jnp.sum(sums, axis=1, keepdims=True) if micro else sums

    size = probability**2 if squared else probability
    return total(probability * target), total(size), total(target)


def _ratio(above: Array, below: Array) -> Array:
    """above / below, 1 where below is 0; both branches have finite gradients."""
    empty = below == 0
    return jnp.where(empty, 1.0, above / jnp.where(empty, 1.0, below))


def _one_minus_mean(score: Array, weight: Array) -> Array:
    return jnp.where(_has_weight(weight), 1 - jnp.mean(score, axis=-1), 0.0)


def _has_weight(weight: Array) -> Array:
    return jnp.any(weight > 0, axis=tuple(range(1, weight.ndim)))
