"""Optimizers and learning-rate schedules, from optax."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import optax

from unet_jax.types import InputError, PyTree, choose

OPTIMIZERS = ("sgd", "rmsprop", "adam", "adamw")
SCHEDULES = ("constant", "cosine", "poly", "plateau")

LrScale = Mapping[str, float] | Sequence[tuple[str, float]]
"""(pattern of parameter paths, factor), in order"""


def _path(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(part, "key", part)) for part in path)


def _meets(pattern: Sequence[str], path: Sequence[str]) -> bool:
    """Whether a pattern's components match the leading ones of a path."""
    if not pattern:
        return True
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        return any(_meets(rest, path[i:]) for i in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], first) and _meets(rest, path[1:])


def _last_match(params: PyTree, patterns: Sequence[str], key: str) -> PyTree:
    """The number of the last pattern that matches each parameter, -1 for none."""
    split = [pattern.strip("/").split("/") for pattern in patterns]
    names = [_path(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern, parts in zip(patterns, split, strict=True):
        if not any(_meets(parts, name.split("/")) for name in names):
            tops = sorted({"/".join(n.split("/")[:2]) for n in names})
            raise InputError(
                f"{key} = {pattern!r} matches no parameter: use one of {tops},"
                " a part of one, or a pattern such as '**/kernel'."
            )

    def last(path: tuple[Any, ...], _: Any) -> int:
        name = _path(path).split("/")
        return max(
            (i for i, parts in enumerate(split) if _meets(parts, name)), default=-1
        )

    return jax.tree_util.tree_map_with_path(last, params)


def is_frozen(params: PyTree, freeze: Sequence[str]) -> PyTree:
    """Which parameters the patterns freeze.

    A pattern matches a path such as ``encoder/level0/conv0/kernel`` if it matches all
    of it or a leading part that ends at a slash: ``encoder`` freezes all below it.
    ``*``, ``?`` and ``[...]`` stay within one component, ``**`` is any number of
    components: ``decoder/up*``, ``**/norm*``.

    Args:
        params: The parameters.
        freeze: Patterns of their paths.

    Returns:
        The tree of ``params`` with a bool at each leaf.

    Raises:
        InputError: A pattern that matches no parameter.
    """
    numbers = _last_match(params, freeze, "optim.freeze")
    return jax.tree.map(lambda i: i >= 0, numbers)


def _pairs(lr_scale: LrScale) -> list[tuple[str, float]]:
    pairs = list(lr_scale.items() if isinstance(lr_scale, Mapping) else lr_scale)
    for pair in pairs:
        match pair:
            case (str(), int() | float() as factor) if 0 < factor < math.inf:
                continue
            case (str() as pattern, 0 | 0.0):
                raise InputError(
                    f"optim.lr_scale of {pattern!r} is 0, which would still keep its"
                    f" optimizer state: use optim.freeze=({pattern!r},)."
                )
        raise InputError(
            f"optim.lr_scale has {pair!r} where a pair of a pattern and a positive"
            " factor should be: write it as (('encoder', 0.1),)."
        )
    return pairs


def _scaled(
    tx: optax.GradientTransformation, lr_scale: LrScale
) -> optax.GradientTransformation:
    """``tx`` with the final update of the matched parameters times their factor.

    Scaling the update is scaling the rate for every optimizer, decoupled weight decay
    included. The state is that of ``tx``, so a run may go on with other factors.
    """
    pairs = _pairs(lr_scale)
    patterns = [pattern for pattern, _ in pairs]
    # No match is number -1, which is the last.
    factors = [*(float(factor) for _, factor in pairs), 1.0]

    def init(params: PyTree) -> optax.OptState:
        _last_match(params, patterns, "optim.lr_scale")
        return tx.init(params)

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.OptState]:
        updates, state = tx.update(updates, state, params)
        numbers = _last_match(updates, patterns, "optim.lr_scale")
        return jax.tree.map(lambda u, i: u * factors[i], updates, numbers), state

    return optax.GradientTransformation(init, update)


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
    warmup_steps = min(warmup_steps, total_steps // 2)
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


def _check_numbers(**values: float) -> None:
    """Refuses what would climb, or make NaN."""
    for key, value in values.items():
        if not 0 <= value < math.inf:
            raise InputError(
                f"optim.{key} = {value} must be a finite number of 0 or more."
            )


def _check_parts(key: str, values: Sequence[float]) -> None:
    """Refuses averages that do not forget."""
    if not all(0 <= value < 1 for value in values):
        shown = values[0] if len(values) == 1 else tuple(values)
        raise InputError(f"optim.{key} = {shown} must be from 0 to below 1.")


def build(
    *,
    name: str = "adamw",
    learning_rate: float = 1e-3,
    total_steps: int,
    schedule: str = "constant",
    warmup_steps: int = 0,
    power: float = 0.9,
    final_fraction: float = 0.0,
    momentum: float | None = None,
    nesterov: bool = False,
    betas: Sequence[float] = (0.9, 0.999),
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_all: bool = False,
    clip: float = 0.0,
    freeze: Sequence[str] = (),
    lr_scale: LrScale = (),
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """An optimizer with its schedule; each computes what PyTorch's of its name does.

    Args:
        name: ``sgd`` | ``rmsprop`` | ``adam`` | ``adamw``.
        learning_rate: The peak.
        total_steps: Updates in all; where ``cosine`` and ``poly`` end.
        schedule: ``constant`` | ``cosine`` | ``poly`` | ``plateau``. ``plateau`` is
            constant here: the loop scales the update (`unet_jax.evaluation.Progress`).
        warmup_steps: Updates of linear rise, from ``1 / warmup_steps`` of the peak; at
            most half of all.
        power: The exponent of ``poly``.
        final_fraction: Where ``cosine`` and ``poly`` end, as a part of the peak.
        momentum: Of ``sgd``, by default the paper's 0.99 (arXiv 1505.04597, section
            3), and of ``rmsprop``, by default 0 as in PyTorch.
        nesterov: Nesterov's form of the momentum of ``sgd``.
        betas: Of ``adam`` and ``adamw``: how slowly the averages of the gradient and
            of its square forget.
        alpha: Of ``rmsprop``: how slowly the average of the squared gradient forgets.
        eps: Added to the root of that average; ``rmsprop``, ``adam`` and ``adamw``.
        weight_decay: Decoupled for ``adamw``, otherwise the L2 term of PyTorch's
            optimizers; on kernels only, never on biases or norms.
        decay_all: Decay every parameter, as PyTorch does.
        clip: The largest global norm of the gradient, 0 for none. PyTorch's
            ``clip_grad_norm_`` adds 1e-6 to the norm it divides by, so that what it
            clips is smaller by a factor of ``norm / (norm + 1e-6)``.
        freeze: Patterns of parameters that stay as they are, see `is_frozen`; no
            optimizer state is kept for them and ``clip`` does not count them.
        lr_scale: Pairs ``(pattern, factor)``, or a mapping, with the patterns of
            `is_frozen`: the learning rate of what they match is multiplied. Where
            several match, the last one alone counts.

    Returns:
        ``(tx, schedule)``; ``schedule(step)`` is the rate that ``tx`` uses, before
        ``lr_scale``.

    Raises:
        InputError: An unknown name, a warm-up longer than the run, Nesterov without
            momentum, or a factor that is not positive. ``tx.init`` raises it for a
            pattern that matches no parameter.
    """
    choose(OPTIMIZERS, name, "optim.name =")
    if momentum is None:
        momentum = 0.99 if name == "sgd" else 0.0
    if nesterov and (name != "sgd" or not momentum):
        raise InputError(
            f"optim.nesterov = True does not go with optim.name = {name!r} and"
            f" optim.momentum = {momentum}: leave it out, or use optim.name='sgd' with"
            " a momentum above 0."
        )
    _check_numbers(
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        power=power,
        final_fraction=final_fraction,
        eps=eps,
        weight_decay=weight_decay,
        clip=clip,
    )
    for key, values in (("momentum", (momentum,)), ("alpha", (alpha,))):
        _check_parts(key, values)
    if len(betas) != 2:
        raise InputError(
            f"optim.betas = {tuple(betas)} must be two numbers, such as (0.9, 0.999)."
        )
    _check_parts("betas", betas)
    rate = _schedule(
        schedule,
        learning_rate,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        power=power,
        final_fraction=final_fraction,
    )

    def decayed(params: PyTree) -> PyTree:
        return jax.tree.map(lambda p: decay_all or p.ndim > 1, params)

    first, second = betas
    if name == "sgd":
        core = optax.sgd(rate, momentum=momentum, nesterov=nesterov)
    elif name == "rmsprop":
        # Not optax.rmsprop, whose momentum gathers steps times their rates: PyTorch's
        # gathers the steps and multiplies by the rate of now.
        gather = [optax.trace(momentum)] if momentum else []
        core = optax.chain(
            optax.scale_by_rms(alpha, eps, eps_in_sqrt=False),
            *gather,
            optax.scale_by_learning_rate(rate),
        )
    elif name == "adam":
        core = optax.adam(rate, first, second, eps)
    else:
        core = optax.adamw(
            rate, first, second, eps, weight_decay=weight_decay, mask=decayed
        )
    parts = [optax.clip_by_global_norm(clip)] if clip else []
    if weight_decay and name != "adamw":
        parts.append(optax.add_decayed_weights(weight_decay, mask=decayed))
    tx = optax.chain(*parts, core)
    if freeze:

        def label(params: PyTree) -> PyTree:
            frozen = is_frozen(params, freeze)
            if all(jax.tree.leaves(frozen)):
                raise InputError(
                    f"optim.freeze = {tuple(freeze)} leaves nothing to train: freeze"
                    " less."
                )
            return jax.tree.map(lambda held: "frozen" if held else "trained", frozen)

        tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, label)
    if lr_scale:
        tx = _scaled(tx, lr_scale)
    return tx, rate
