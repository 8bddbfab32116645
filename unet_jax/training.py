"""The training step as a pure function of data.

``make_train_step`` closes over what does not change (model, optimizer, loss,
augmentation) and returns ``(state, batch) -> (state, stats)``. `TrainState` is data
only. All randomness is ``fold_in`` of the state's key, its step and an example's index.

The step is for ``jit``, on one device or, `unet_jax.sharding.within` a mesh, on many.
``make_pmap_train_step`` is its twin for `jax.pmap`, and ``several`` runs a few steps in
one dispatch.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from unet_jax import models, sharding
from unet_jax.layers import crop
from unet_jax.models import UNet
from unet_jax.normalisation import Stats, normalise
from unet_jax.types import Array, AugmentFn, Batch, LossFn, PyTree


@flax.struct.dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
        step: ``i32[]``, updates done. It is also the position in the data.
        params: The parameters, float32.
        batch_stats: Running statistics of batch normalisation, or empty.
        opt_state: The optimizer's.
        ema: ``{"params", "batch_stats"}`` averaged over steps, or None when off.
        lr_scale: ``f32[]``, what reduce-on-plateau has made of the learning rate.
        key: The run's key; constant.
    """

    step: Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema: PyTree | None
    lr_scale: Array
    key: Array

    @property
    def variables(self) -> dict[str, PyTree]:
        """What ``model.apply`` takes for evaluation: the average where there is one."""
        if self.ema is not None:
            return dict(self.ema)
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    model: UNet,
    tx: optax.GradientTransformation,
    *,
    seed: int,
    image_shape: tuple[int, ...],
    ema: bool = False,
) -> TrainState:
    """A state at step 0.

    Args:
        model: The net.
        tx: The optimizer.
        seed: Of parameters and of all later randomness.
        image_shape: ``[B, *S, C]`` of a batch; only its rank and C matter.
        ema: Whether to keep an average of the parameters.
    """
    key, init_key = jax.random.split(jax.random.key(seed))
    variables = model.init(init_key, jnp.zeros(image_shape, jnp.float32))
    params = variables["params"]
    stats = variables.get("batch_stats", {})
    average = {"params": params, "batch_stats": stats} if ema else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=stats,
        opt_state=tx.init(params),
        # A copy, because a donated state may not hold one buffer twice.
        ema=jax.tree.map(jnp.copy, average),
        lr_scale=jnp.ones((), jnp.float32),
        key=key,
    )


def fit(batch: Mapping[str, Array], logits: Array) -> tuple[Array, Array]:
    """Label and weight cut to the logits' size (a valid net's are smaller)."""
    size = logits.shape[1:-1]
    return crop(batch["label"], size), crop(batch["weight"], size)


def any_weight(weight: Array) -> Array:
    """``f32[B]``: 1 for an example of which anything counts."""
    return jnp.any(weight > 0, axis=tuple(range(1, weight.ndim))).astype(jnp.float32)


def supervised_losses(
    loss_fn: LossFn, logits: Array, aux: Mapping[str, Any], label: Array, weight: Array
) -> Array:
    """The loss of each example: of the logits, or the mean over the heads there are.

    Heads of full size (UNet++) count alike. With valid padding a deeper one is smaller;
    all are weighed on the pixels that all have. A head on a coarser level sees every
    stride-th pixel of label and weight and counts 1 / stride, as in nnU-Net
    (Isensee et al. 2021, doi 10.1038/s41592-020-01008-z, supplementary note 4).

    Args:
        loss_fn: ``(logits, label, weight) -> f32[B]``.
        logits: ``f32[B, *S, K]``.
        aux: Of the net; ``aux["heads"]`` is read.
        label: Of the logits' size, as `unet_jax.types.Batch` has it.
        weight: Likewise.

    Returns:
        ``f32[B]``.
    """
    size = logits.shape[1:-1]
    parts, shares = [], 0.0
    for head in aux.get("heads", (logits,)):
        steps = [
            round(n / m) if m < n else 1
            for n, m in zip(size, head.shape[1:-1], strict=True)
        ]
        if max(steps) > 1:
            small = head.shape[1:-1]
            given = (every(label, small, steps), every(weight, small, steps))
        else:
            head, given = crop(head, size), (label, weight)
        share = 1.0 / max(steps)
        parts.append(share * loss_fn(head, *given))
        shares += share
    return sum(parts[1:], parts[0]) * (1.0 / shares)


def every(x: Array, size: Sequence[int], steps: Sequence[int]) -> Array:
    """Every so many-th pixel, as many as ``size`` has, from the middle.

    Args:
        x: ``[B, *S, ...]``.
        size: Pixels of each axis to keep.
        steps: From one to the next.
    """
    for axis, (n, step) in enumerate(zip(size, steps, strict=True), start=1):
        last = (n - 1) * step + 1
        begin = (x.shape[axis] - last) // 2
        x = jax.lax.slice_in_dim(x, begin, begin + last, step, axis=axis)
    return x


def _microbatch(batch: Batch, accumulate: int) -> Any:
    """``[B, ...]`` -> ``[accumulate, B / accumulate, ...]``, rows taken in strides.

    Strided, so that each device keeps its own rows: contiguous microbatches would
    gather the whole batch.
    """

    def split(x: Array) -> Array:
        rows = x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:])
        return rows.swapaxes(0, 1)

    return sharding.constrain(jax.tree.map(split, batch), stacked=True)


def augment_keys(key: Array, step: Any, index: Array) -> Array:
    """The keys by which a training step augments its examples.

    Args:
        key: The run's (`TrainState.key`).
        step: Its number, from 0.
        index: ``i32[B]``, the examples' numbers in the data set.

    Returns:
        ``[B]`` keys.
    """
    return _fold(jax.random.split(jax.random.fold_in(key, step))[0], index)


def _fold(key: Array, index: Array) -> Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def trim(model: UNet, batch: Any) -> dict[str, Array]:
    """Cuts off the rows with which `sharding.place` filled up the images of a batch.

    Only nets with valid padding need it, whose sizes do not divide over devices; the
    images of others are made to divide. What stays is the largest size that the net
    works at.

    Args:
        model: The net.
        batch: As placed; of each array but ``index`` the first spatial axis is cut.
    """
    if model.padding != "valid" or sharding.parts("space") == 1:
        return dict(batch)
    size = batch["image"].shape[1:-1]
    rows = models.fitting_rows(model, size[0], len(size))
    return {k: x[:, :rows] if x.ndim > 1 else x for k, x in batch.items()}


Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]


def make_train_step(
    model: UNet,
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    augment_fn: AugmentFn | None = None,
    *,
    stats: Stats,
    accumulate: int = 1,
    ema_decay: float = 0.0,
) -> Step:
    """The training step.

    The gradient is that of the sum of the examples' losses over the number of examples
    that have any weight, divided once, after accumulation.

    Args:
        model: The net.
        tx: The optimizer.
        loss_fn: ``(logits, label, weight) -> f32[B]``.
        augment_fn: ``(key, example) -> example``, applied inside, or None.
        stats: The normalisation (`unet_jax.normalisation.measure`).
        accumulate: Microbatches a batch is worked through in; divides the batch.
        ema_decay: Of the parameters' average; 0 for none. Early steps average over
            fewer: the decay is at most ``(1 + step) / (10 + step)``.

    Returns:
        ``(state, batch) -> (state, stats)``, to be jitted with the state donated.
        ``stats`` has sums: ``loss`` and ``count`` (examples), and ``grad_norm``.
    """
    return _make_step(
        model,
        tx,
        loss_fn,
        augment_fn,
        stats=stats,
        accumulate=accumulate,
        ema_decay=ema_decay,
    )


def make_pmap_train_step(
    model: UNet,
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    augment_fn: AugmentFn | None = None,
    *,
    devices: Sequence[Any] | None = None,
    **options: Any,
) -> Step:
    """The twin of `make_train_step` for `jax.pmap`, already mapped and compiled.

    It gives the same numbers, but for dropout, which each device draws by itself, and
    for losses that pool a batch (``over="batch"``, ``normalise="weights"``), which here
    pool a device's part of it. JAX keeps ``pmap`` in maintenance mode: it is for code
    that is built on it, and ``jit`` on a mesh is what to use.

    Args:
        model, tx, loss_fn, augment_fn: As for `make_train_step`.
        devices: Which to use; None for all.
        **options: ``stats``, ``accumulate``, ``ema_decay`` of `make_train_step`.

    Returns:
        ``(state, batch) -> (state, stats)``. The state is a plain one, whole on every
        device, and donated; every array of the batch has a device axis first:
        ``[devices, B / devices, ...]``.
    """
    step = _make_step(
        model.clone(axis_name=_REPLICAS),
        tx,
        loss_fn,
        augment_fn,
        total=lambda x: jax.lax.psum(x, _REPLICAS),
        **options,
    )
    return jax.pmap(
        step,
        axis_name=_REPLICAS,
        in_axes=(None, 0),
        out_axes=None,
        devices=devices,
        donate_argnums=0,
    )


# Not "data": a function that is mapped over it is not on a mesh of `sharding`.
_REPLICAS = "replicas"


def several(step: Step) -> Step:
    """A few training steps in one dispatch, so that the host is asked less often.

    Args:
        step: `make_train_step`'s.

    Returns:
        ``(state, batches) -> (state, stats)``: every array of the batches has an axis
        of steps first, and so have the stats; but for ``batches["resident"]``, the
        examples that all crops are cut from (`unet_jax.resident`).
    """

    def steps(state: TrainState, batches: Any) -> tuple[TrainState, dict[str, Array]]:
        each = dict(batches)
        kept = {"resident": each.pop("resident")} if "resident" in each else {}

        def one(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
            return step(state, {**kept, **batch})

        return jax.lax.scan(one, state, each)

    return steps


def _make_step(
    model: UNet,
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    augment_fn: AugmentFn | None,
    *,
    stats: Stats,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    total: Callable[[PyTree], PyTree] | None = None,
) -> Step:
    """See `make_train_step`; ``total`` adds up what the devices of a pmap have."""

    def normalised(batch: Any) -> Any:
        return {
            **batch,
            "image": normalise(batch["image"], stats),
            "label": batch["label"].astype(jnp.int32),
            "weight": batch["weight"].astype(jnp.float32),
        }

    def augmented(key: Array, batch: Any) -> Any:
        batch = normalised(batch)
        keys = _fold(key, batch.pop("index"))
        assert augment_fn is not None
        return jax.vmap(augment_fn)(keys, batch)

    def prepare(key: Array, batch: Any) -> Any:
        if augment_fn is None:
            return normalised(trim(model, batch))
        # A pixel may come from anywhere in its image: gathered as stored, here and on
        # purpose, where it is smallest.
        batch = trim(model, sharding.constrain(batch, whole=True))
        return sharding.constrain(sharding.by_example(augmented, key, batch))

    def objective(
        params: PyTree, batch_stats: PyTree, batch: Any, key: Array, micro: Array
    ) -> tuple[Array, tuple[PyTree, Array]]:
        augment_key, dropout_key = jax.random.split(key)
        if total is not None:
            replica = jax.lax.axis_index(_REPLICAS)
            dropout_key = jax.random.fold_in(dropout_key, replica)
        batch = prepare(augment_key, batch)
        (logits, aux), updated = model.apply(
            sharding.gather({"params": params, "batch_stats": batch_stats}),
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(dropout_key, micro)},
        )
        label, weight = fit(batch, logits)
        counted = any_weight(weight)
        losses = supervised_losses(loss_fn, logits, aux, label, weight)
        loss = jnp.sum(losses * counted)
        return loss, (updated.get("batch_stats", batch_stats), jnp.sum(counted))

    gradient = jax.value_and_grad(objective, has_aux=True)

    def accumulated(state: TrainState, batch: Batch, key: Array) -> Any:
        def one(carry: Any, xs: Any) -> tuple[Any, None]:
            batch_stats, sums = carry
            micro, rows = xs
            (loss, (batch_stats, count)), grads = gradient(
                state.params, batch_stats, rows, key, micro
            )
            sums = jax.tree.map(jnp.add, sums, (loss, count, grads))
            return (batch_stats, sums), None

        zero = jnp.zeros((), jnp.float32)
        zeros = (zero, zero, jax.tree.map(jnp.zeros_like, state.params))
        rows = _microbatch(batch, accumulate)
        numbers = jnp.arange(accumulate, dtype=jnp.int32)
        (batch_stats, sums), _ = jax.lax.scan(
            one, (state.batch_stats, zeros), (numbers, rows)
        )
        return batch_stats, *sums

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        if accumulate == 1:
            first = jnp.zeros((), jnp.int32)
            (loss, (batch_stats, count)), grads = gradient(
                state.params, state.batch_stats, batch, key, first
            )
        else:
            batch_stats, loss, count, grads = accumulated(state, batch, key)
        if total is not None:
            loss, count, grads = total((loss, count, grads))
        examples = jnp.maximum(count, 1.0)
        grads = jax.tree.map(lambda g: g / examples.astype(g.dtype), grads)
        # optax's Adam mixes integer counts with floats on purpose.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda u: u * state.lr_scale, updates)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            now = state.step.astype(jnp.float32)
            decay = jnp.minimum(jnp.float32(ema_decay), (1.0 + now) / (10.0 + now))
            new = {"params": params, "batch_stats": batch_stats}
            ema = jax.tree.map(lambda a, b: a * decay + b * (1.0 - decay), ema, new)
        stats = {"loss": loss, "count": count, "grad_norm": optax.tree.norm(grads)}
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=ema,
        )
        return state, stats

    return step


def is_due(step: int, every: int, total: int) -> bool:
    """Whether something that happens ``every`` steps happens after step ``step``.

    Steps count from 1 to ``total``; the last one is always due. ``every = 0`` is never,
    but for the last.
    """
    return step == total or (every > 0 and step % every == 0)
