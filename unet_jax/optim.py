"""Optimizers and learning-rate schedules, from optax."""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from unet_jax.types import InputError, PyTree, choose

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine", "poly", "plateau")


def _path(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(part, "key", part)) for part in path)


def is_frozen(params: PyTree, freeze: Sequence[str]) -> PyTree:
    """Which parameters a path freezes.

    Args:
        params: The parameters.
        freeze: Paths as ``"encoder"`` or ``"encoder/level0"``; each freezes all below.

    Returns:
        The tree of ``params`` with a bool at each leaf.

    Raises:
        InputError: A path that names no parameter.
    """

    def below(name: str, path: str) -> bool:
        return f"{name}/".startswith(path.strip("/") + "/")

    names = [_path(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    for path in freeze:
        if not any(below(name, path) for name in names):
            tops = sorted({"/".join(n.split("/")[:2]) for n in names})
            raise InputError(
                f"optim.freeze = {path!r} names no parameter: use one of {tops}"
                " or a part of it."
            )
    return jax.tree_util.tree_map_with_path(
        lambda p, _: any(below(_path(p), path) for path in freeze), params
    )


def _schedule(
    kind: str,
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int,
    power: float,
    final_fraction: float,
) -> optax.Schedule:
    choose(SCHEDULES, kind, "optim.schedule =")
    if warmup_steps >= total_steps and warmup_steps:
        raise InputError(
            f"optim.warmup_steps = {warmup_steps} leaves nothing of train.steps ="
            f" {total_steps}: add --config.optim.warmup_steps={total_steps // 10}."
        )
    rest = max(total_steps - warmup_steps, 1)
    final = learning_rate * final_fraction
    if kind == "cosine":
        main = optax.cosine_decay_schedule(learning_rate, rest, alpha=final_fraction)
    elif kind == "poly":
        main = optax.polynomial_schedule(learning_rate, final, power, rest)
    else:
        main = optax.constant_schedule(learning_rate)
    if not warmup_steps:
        return main
    # The first update already has a rate: from 1 / warmup_steps of it, not from 0.
    first = learning_rate / warmup_steps
    warmup = optax.linear_schedule(first, learning_rate + first, warmup_steps)
    return optax.join_schedules([warmup, main], [warmup_steps])


def build(
    *,
    name: str = "adamw",
    learning_rate: float = 1e-3,
    total_steps: int,
    schedule: str = "constant",
    warmup_steps: int = 0,
    power: float = 0.9,
    final_fraction: float = 0.0,
    momentum: float = 0.99,
    weight_decay: float = 0.0,
    clip: float = 0.0,
    freeze: Sequence[str] = (),
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """An optimizer with its schedule.

    Args:
        name: ``sgd`` | ``adam`` | ``adamw``.
        learning_rate: The peak.
        total_steps: Updates in all; where ``cosine`` and ``poly`` end.
        schedule: ``constant`` | ``cosine`` | ``poly`` | ``plateau``. ``plateau`` is
            constant here: the loop scales the update (`unet_jax.evaluation.Progress`).
        warmup_steps: Updates of linear rise, from ``1 / warmup_steps`` of the peak.
        power: The exponent of ``poly``.
        final_fraction: Where ``cosine`` and ``poly`` end, as a part of the peak.
        momentum: Of ``sgd``; the paper's is 0.99 (arXiv 1505.04597, section 3).
        weight_decay: Decoupled for ``adamw``, otherwise the L2 term of PyTorch's
            optimizers; on kernels only, never on biases or norms.
        clip: The largest global norm of the gradient, 0 for none.
        freeze: Paths of parameters that stay as they are, see `is_frozen`.

    Returns:
        ``(tx, schedule)``; ``schedule(step)`` is the rate that ``tx`` uses.

    Raises:
        InputError: An unknown name, or a warm-up longer than the run.
    """
    choose(OPTIMIZERS, name, "optim.name =")
    rate = _schedule(
        schedule,
        learning_rate,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        power=power,
        final_fraction=final_fraction,
    )

    def kernels(params: PyTree) -> PyTree:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    if name == "sgd":
        core = optax.sgd(rate, momentum=momentum)
    elif name == "adam":
        core = optax.adam(rate)
    else:
        core = optax.adamw(rate, weight_decay=weight_decay, mask=kernels)
    parts = [optax.clip_by_global_norm(clip)] if clip else []
    if weight_decay and name != "adamw":
        parts.append(optax.add_decayed_weights(weight_decay, mask=kernels))
    tx = optax.chain(*parts, core)
    if freeze:

        def label(params: PyTree) -> PyTree:
            return jax.tree.map(
                lambda frozen: "frozen" if frozen else "trained",
                is_frozen(params, freeze),
            )

        tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, label)
    return tx, rate
