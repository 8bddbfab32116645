"""The mesh of devices, and how a batch and a state lie on it.

One code path from one CPU to a pod: ``jit`` with `NamedSharding` on a mesh of two axes.
A batch is split over ``data`` by its rows and over ``space`` along the first spatial
axis of every image; the state is whole on every device, or split over ``data``, too.
XLA inserts what devices have to tell each other: the borders of the parts of an image,
and sums. Batch statistics are therefore those of the whole batch, wherever it lies.

A part that must know that it is split asks `parts`; `within` is how a function is told.
"""

import collections
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unet_jax.types import Array, InputError, NumpyArray, PyTree

AXES = ("data", "space")


def make_mesh(
    data: int = -1, space: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of ``data x space`` devices.

    Args:
        data: How many parts a batch is split into; -1 for as many as there are devices
            for.
        space: How many parts every image is split into along its first spatial axis.
        devices: Which to use; None for all of all processes.

    Raises:
        InputError: Numbers that the devices do not allow.
    """
    devices = jax.devices() if devices is None else devices
    one = len(devices) == 1
    there = "there is 1 device" if one else f"there are {len(devices)} devices"
    if space < 1 or (data < 1 and data != -1):
        raise InputError(
            f"mesh.data = {data} and mesh.space = {space} must be 1 or more, or"
            " mesh.data=-1 for all devices."
        )
    if data == -1 and len(devices) % space:
        divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        nearest = min(divisors, key=lambda n: (abs(n - space), -n))
        raise InputError(
            f"mesh.space = {space} does not divide the {len(devices)} devices: use"
            f" mesh.space={nearest}, or say mesh.data as well."
        )
    data = len(devices) // space if data == -1 else data
    count = data * space
    if count > len(devices):
        most = max(len(devices) // space, 1)
        remedy = f"mesh.data={most}" if space <= len(devices) else "a smaller mesh"
        raise InputError(
            f"mesh.data = {data} with mesh.space = {space} needs {count} devices, but"
            f" {there}: use {remedy}, or mesh.data=-1 for all."
        )
    idle = {d.process_index for d in devices} - {
        d.process_index for d in devices[:count]
    }
    if idle:
        raise InputError(
            f"mesh.data = {data} with mesh.space = {space} uses {count} of"
            f" {len(devices)} devices and leaves {len(idle)} process(es) without one:"
            " use mesh.data=-1, or start fewer processes."
        )
    # Auto, because make_mesh's default has become Explicit, in which every operation
    # would have to say its own sharding.
    return jax.make_mesh(
        (data, space), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[:count]
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, rank: int = 1, *, stacked: bool = False) -> NamedSharding:
    """The sharding of an array of a batch: its rows, and its first spatial axis.

    Args:
        mesh: Where.
        rank: Axes of the array; of one axis (an index) only the rows are split.
        stacked: Whether an axis of several batches comes first.
    """
    return NamedSharding(mesh, _spec(rank, stacked=stacked))


def _spec(rank: int, *, stacked: bool = False) -> PartitionSpec:
    axes = AXES if rank - stacked > 1 else AXES[:1]
    return PartitionSpec(*(None,) * stacked, *axes)


# Smaller arrays stay whole: to fetch a part of them takes longer than to keep it.
SMALLEST_SPLIT = 2**14


def state_shardings(state: PyTree, mesh: Mesh, *, fsdp: bool = False) -> PyTree:
    """The shardings of a state, or of its shapes.

    Args:
        state: A tree of arrays or `jax.ShapeDtypeStruct`.
        mesh: Where.
        fsdp: Whether parameters and what the optimizer keeps of them are split over
            ``data`` (fully sharded data parallelism): each array of at least
            `SMALLEST_SPLIT` numbers along the last of its axes that divides, the
            channels that come out of a convolution. They are gathered as they are
            used, so that a device keeps ``1 / data`` of them.

    Reference: Rajbhandari et al. 2020, arXiv 1910.02054 (ZeRO), stage 3.
    """
    parts = mesh.shape["data"]

    def one(leaf: Any) -> NamedSharding:
        spec: list[str | None] = [None] * len(leaf.shape)
        if fsdp and math.prod(leaf.shape) >= SMALLEST_SPLIT:
            axes = [a for a, n in enumerate(leaf.shape) if n % parts == 0]
            if axes:
                spec[axes[-1]] = "data"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, state)


# --- What a function knows of the mesh it is traced for ------------------------------


def within(mesh: Mesh, fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, traced so that `parts` and `constrain` know the mesh."""

    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fn(*args)

    return traced


def parts(axis: str) -> int:
    """How many parts an axis of the mesh around has; 1 where there is no mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def on_cpu() -> bool:
    """Whether what is being traced will most likely run on a CPU.

    For choosing between two programs of the same result. Where only the compiler can
    know, `jax.lax.platform_dependent` chooses, but it traces both, which takes a net's
    training step a second longer.
    """
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    platform = getattr(device, "platform", device)
    return (platform or jax.default_backend()) == "cpu"


def constrain(tree: PyTree, *, whole: bool = False, stacked: bool = False) -> PyTree:
    """The arrays of a batch, held to lie on the mesh around as `split` says.

    Args:
        tree: Arrays; they come back as they are where there is no mesh.
        whole: Whether images are to be whole: rows are split and nothing else.
        stacked: Whether an axis of several batches comes first.
    """
    if parts("data") * parts("space") == 1:
        return tree

    def one(x: Array) -> Array:
        spec = _spec(1 + stacked if whole else x.ndim, stacked=stacked)
        return jax.lax.with_sharding_constraint(x, spec)

    return jax.tree.map(one, tree)


def gather(tree: PyTree) -> PyTree:
    """Parameters, whole on every device of the mesh around while they are used."""
    if parts("data") * parts("space") == 1:
        return tree
    whole = PartitionSpec()
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, whole), tree)


def by_example(fn: Callable[..., Any], shared: Any, rows: PyTree) -> PyTree:
    """``fn(shared, rows)``, each device for the rows that lie on it.

    For functions of each example by itself, which XLA would else split as it sees fit:
    a look-up of pixels gathers what another device has no need of.

    Args:
        fn: ``(shared, rows [B, ...]) -> [B, ...]``.
        shared: What all examples have in common.
        rows: Arrays of a batch, images whole (`constrain`).
    """
    if parts("data") * parts("space") == 1:
        return fn(shared, rows)
    here, split_rows = PartitionSpec(), PartitionSpec(AXES[0])
    return jax.shard_map(
        fn, in_specs=(here, split_rows), out_specs=split_rows, check_vma=False
    )(shared, rows)


# --- Batches -------------------------------------------------------------------------


def check_batch(mesh: Mesh, batch_size: int, name: str, *, times: int = 1) -> None:
    """Raises InputError where rows do not divide over the mesh.

    Args:
        mesh: Where.
        batch_size: Rows.
        name: What the sentence calls them.
        times: Microbatches that each have to divide.
    """
    unit = mesh.shape["data"] * times
    if batch_size < 1 or batch_size % unit:
        nearest = max(batch_size // unit, 1) * unit
        by = f"{mesh.shape['data']} devices"
        by += f" and {times} microbatches" if times > 1 else ""
        raise InputError(
            f"{name} = {batch_size} does not divide over {by}: use {nearest} or"
            f" {nearest + unit}, or mesh.data=1."
        )


def round_up(mesh: Mesh, batch_size: int) -> int:
    """The smallest number of rows from ``batch_size`` on that divides over ``data``."""
    data = mesh.shape["data"]
    return -(-batch_size // data) * data


def own_rows(mesh: Mesh, batch_size: int) -> NumpyArray:
    """The numbers of the rows of a batch that this process has to provide.

    Two processes that hold parts of the same images provide the same rows.

    Args:
        mesh: Where.
        batch_size: Rows of the whole batch.
    """
    process, each = jax.process_index(), batch_size // mesh.shape["data"]
    mine = [
        np.arange(number * each, (number + 1) * each)
        for number, devices in enumerate(mesh.devices)
        if any(d.process_index == process for d in devices)
    ]
    return np.concatenate(mine)


def place(batch: PyTree, mesh: Mesh, *, stacked: bool = False) -> PyTree:
    """A batch as arrays over the whole mesh; the copy is asynchronous.

    An image whose first spatial axis does not divide over ``space`` gets zeros behind
    its last row: `unet_jax.training.trim` cuts them off again where they are not to be
    seen.

    Args:
        batch: NumPy arrays, of `own_rows`.
        mesh: Where.
        stacked: Whether an axis of several batches comes first.
    """
    space, axis = mesh.shape["space"], 1 + stacked

    def one(x: Any) -> Array:
        x = np.asarray(x)
        if x.ndim > axis and (missing := -x.shape[axis] % space):
            widths = [(0, missing if a == axis else 0) for a in range(x.ndim)]
            x = np.pad(x, widths)
        sharding = split(mesh, x.ndim, stacked=stacked)
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        return _assembled(x, mesh, sharding, axis - 1)

    return jax.tree.map(one, batch)


def _assembled(x: NumpyArray, mesh: Mesh, sharding: NamedSharding, axis: int) -> Array:
    """The global array of which each process has some rows, along ``axis``."""
    grid, process = mesh.devices, jax.process_index()
    mine = sum(any(d.process_index == process for d in row) for row in grid)
    size = x.shape[axis] // mine * len(grid)
    first = {int(row): i for i, row in enumerate(own_rows(mesh, size))}

    def part(index: Any) -> NumpyArray:
        begin, end, _ = index[axis].indices(size)
        at = first[begin]
        here = slice(at, at + end - begin)
        return x[(*index[:axis], here, *index[axis + 1 :])]

    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
    return jax.make_array_from_callback(shape, sharding, part)


def fetch(tree: PyTree) -> PyTree:
    """NumPy arrays of all that is on the mesh, on every process.

    Where there are several, all of them have to call it together.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def one(x: Array) -> NumpyArray:
        if x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(one, tree)


AHEAD = 2  # batches that wait on the devices


def prefetch(
    batches: Iterator[Any], mesh: Mesh, *, ahead: int = AHEAD, stacked: bool = False
) -> Iterator[Any]:
    """Places batches ``ahead`` of their use, so that copies hide behind the steps."""
    queue: collections.deque[Any] = collections.deque()
    for batch in batches:
        queue.append(place(batch, mesh, stacked=stacked))
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue
