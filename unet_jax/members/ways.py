"""How a step of all members is taken: in one program, or one after another."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unet_jax import sharding
from unet_jax.training import TrainState
from unet_jax.types import Array, Batch, NumpyArray

AXIS = "members"


class Way(Protocol):
    """How a step of all members is taken; what they have is opaque in between."""

    def shapes(self, shapes: TrainState) -> Any:
        """What `gather` gives, from the shapes of one member's state."""
        ...

    def gather(self, states: Iterable[TrainState]) -> Any:
        """The members' states as `step` takes them."""
        ...

    def place(self, batch: Batch) -> Any:
        """Batches ``[K, B, ...]`` of the host as `step` takes them."""
        ...

    def compile(self, states: Any, batches: Any) -> Any:
        """Compiles the step ahead of time; the program."""
        ...

    def step(self, states: Any, batches: Any) -> tuple[Any, list[Mapping[str, Any]]]:
        """The states after a step, the old ones donated; each member's stats."""
        ...

    def take(self, states: Any, i: int) -> TrainState:
        """Member i's own state, on the mesh that evaluates."""
        ...

    def rescaled(self, states: Any, scales: Sequence[float]) -> Any:
        """The states with each member's scale of the learning rate."""
        ...


One = Callable[[Array, Array, TrainState, Any], tuple[TrainState, dict[str, Array]]]
"""(shift f32[C], scale f32[C], state, batch) -> (state, stats), of one member"""


class Together:
    """One program: ``vmap`` of the step, members spread over devices.

    Never ``jit(vmap)`` on sharded arrays: the partitioner of XLA then gives wrong
    numbers, silently, where a vmapped 1x1 convolution is split over fewer devices than
    there are members. Under `jax.shard_map` each device has a program of its own.

    Args:
        one: The step of one member.
        stats: ``shift`` and ``scale`` of each member's normalisation, ``f32[K, C]``.
        mesh: Whose devices; their number divides K.
    """

    def __init__(self, one: One, stats: Mapping[str, NumpyArray], mesh: Mesh) -> None:
        count = len(stats["shift"])
        self._mesh, self._each = mesh, count // mesh.size
        line = jax.make_mesh(
            (mesh.size,),
            (AXIS,),
            axis_types=(AxisType.Auto,),
            devices=list(mesh.devices.flat),
        )
        spec = PartitionSpec(AXIS)
        self._at = NamedSharding(line, spec)
        self._stats = jax.device_put((stats["shift"], stats["scale"]), self._at)
        step = jax.shard_map(
            jax.vmap(one), mesh=line, in_specs=spec, out_specs=spec, check_vma=False
        )
        self._step: Any = jax.jit(step, donate_argnums=2)
        self._row = jax.jit(lambda tree, row: jax.tree.map(lambda x: x[row], tree))
        self._count = count

    def shapes(self, shapes: TrainState) -> Any:
        def one(x: Any) -> jax.ShapeDtypeStruct:
            size = (self._count, *x.shape)
            return jax.ShapeDtypeStruct(size, x.dtype, sharding=self._at)

        return jax.tree.map(one, shapes)

    def gather(self, states: Iterable[TrainState]) -> Any:
        # By way of the host, where they are stacked: no device ever has all of them.
        held = [jax.tree.map(_held, state) for state in states]
        return jax.tree.map(lambda *rows: jax.device_put(_stack(rows), self._at), *held)

    def place(self, batch: Batch) -> Any:
        return jax.device_put(dict(batch), self._at)

    def compile(self, states: Any, batches: Any) -> Any:
        self._step = self._step.lower(*self._stats, states, batches).compile()
        return self._step

    def step(self, states: Any, batches: Any) -> tuple[Any, list[Mapping[str, Any]]]:
        states, stats = self._step(*self._stats, states, batches)
        return states, [_Row(stats, i) for i in range(self._count)]

    def take(self, states: Any, i: int) -> TrainState:
        # Of the device that has it: to index the whole would gather all on every one.
        first = i // self._each * self._each

        def local(x: Array) -> Array:
            shards: Any = x.addressable_shards
            return next(s.data for s in shards if (s.index[0].start or 0) == first)

        state = self._row(jax.tree.map(local, states), i - first)
        return jax.device_put(state, sharding.replicated(self._mesh))

    def rescaled(self, states: Any, scales: Sequence[float]) -> Any:
        scale = jax.device_put(np.asarray(scales, np.float32), self._at)
        return dataclasses.replace(states, lr_scale=scale)


class InTurn:
    """One compiled step, for one member after another; all on one device.

    Args:
        one, stats: As for `Together`.
        mesh: Of one device.
    """

    def __init__(self, one: One, stats: Mapping[str, NumpyArray], mesh: Mesh) -> None:
        self._at = sharding.replicated(mesh)
        pairs = zip(stats["shift"], stats["scale"], strict=True)
        self._stats = [jax.device_put(pair, self._at) for pair in pairs]
        self._step: Any = jax.jit(one, donate_argnums=2)

    def shapes(self, shapes: TrainState) -> Any:
        return [shapes] * len(self._stats)

    def gather(self, states: Iterable[TrainState]) -> Any:
        return list(states)

    def place(self, batch: Batch) -> Any:
        arrays: dict[str, Any] = dict(batch)
        return [
            jax.device_put({k: x[i] for k, x in arrays.items()}, self._at)
            for i in range(len(self._stats))
        ]

    def compile(self, states: Any, batches: Any) -> Any:
        lowered = self._step.lower(*self._stats[0], states[0], batches[0])
        self._step = lowered.compile()
        return self._step

    def step(self, states: Any, batches: Any) -> tuple[Any, list[Mapping[str, Any]]]:
        done = [
            self._step(*pair, state, batch)
            for pair, state, batch in zip(self._stats, states, batches, strict=True)
        ]
        return [state for state, _ in done], [stats for _, stats in done]

    def take(self, states: Any, i: int) -> TrainState:
        return states[i]

    def rescaled(self, states: Any, scales: Sequence[float]) -> Any:
        return [
            dataclasses.replace(
                state, lr_scale=jax.device_put(np.float32(scale), self._at)
            )
            for state, scale in zip(states, scales, strict=True)
        ]


class _Row(Mapping[str, Any]):
    """One member's part of the stats of all, fetched only when it is read."""

    def __init__(self, stats: Mapping[str, Array], row: int) -> None:
        self._stats, self._row = stats, row

    def __getitem__(self, key: str) -> Any:
        return np.asarray(self._stats[key])[self._row]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stats)

    def __len__(self) -> int:
        return len(self._stats)


def _held(x: Array) -> Any:
    """An array on the host; keys, which NumPy does not know, stay where they are."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return x if is_key else np.asarray(x)


def _stack(rows: Sequence[Any]) -> Any:
    return jnp.stack(rows) if isinstance(rows[0], jax.Array) else np.stack(rows)
