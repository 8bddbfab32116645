"""The mesh of devices, and how a batch and a state lie on it.

One code path from one CPU to all devices of a host: ``jit`` with `NamedSharding`. A
batch is split over the axis ``data``, the state is replicated, and XLA inserts the
collectives; batch statistics are therefore those of the whole batch.
"""

import collections
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unet_jax.types import InputError


def make_mesh(data: int = -1) -> Mesh:
    """A mesh of ``data`` devices in a row, named ``data``.

    Args:
        data: How many devices share a batch; -1 for all there are.

    Raises:
        InputError: More devices asked for than there are, or several processes.
    """
    if jax.process_count() > 1:
        raise InputError(
            f"this is one of {jax.process_count()} processes, and a run uses the"
            " devices of one: start it on a single host."
        )
    devices = jax.devices()
    count = len(devices) if data == -1 else data
    if not 1 <= count <= len(devices):
        raise InputError(
            f"mesh.data = {data}, but there are {len(devices)} devices:"
            f" use 1 to {len(devices)}, or -1 for all."
        )
    # Auto, because make_mesh's default has become Explicit, in which every operation
    # would have to say its own sharding.
    return jax.make_mesh(
        (count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count]
    )


def split(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its rows over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a state: whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh, batch_size: int, name: str) -> None:
    """Raises InputError where ``batch_size`` rows do not divide over the devices."""
    devices = mesh.shape["data"]
    if batch_size < 1 or batch_size % devices:
        nearest = max(batch_size // devices, 1) * devices
        raise InputError(
            f"{name} = {batch_size} does not divide over {devices} devices: use"
            f" {nearest} or {nearest + devices}, or mesh.data=1."
        )


def round_up(mesh: Mesh, batch_size: int) -> int:
    """The smallest number of rows from ``batch_size`` on that divides over devices."""
    devices = mesh.shape["data"]
    return -(-batch_size // devices) * devices


def place(batch: Any, mesh: Mesh) -> Any:
    """This process's rows as arrays over the whole mesh; the copy is asynchronous."""
    sharding = split(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def prefetch(batches: Iterator[Any], mesh: Mesh, *, ahead: int = 2) -> Iterator[Any]:
    """Places batches ``ahead`` of their use, so that copies hide behind the steps."""
    queue: collections.deque[Any] = collections.deque()
    for batch in batches:
        queue.append(place(batch, mesh))
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue
