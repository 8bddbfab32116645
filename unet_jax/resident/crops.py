"""Crops that are cut on the device, out of examples that are kept there."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unet_jax import sharding
from unet_jax.types import Array, Shape


@flax.struct.dataclass
class Resident:
    """All examples of a training set, on every device.

    Attributes:
        image: ``[N, *S, C]`` as stored; images smaller than the largest have zeros
            behind them.
        label: ``[N, *S]`` or ``[N, *S, K]``, likewise.
        weight: Like the label, u8 where there are only zeros and ones; ``[1, *S]``
            where it is one everywhere, of one image for all.
        size: ``i32[N, rank]``, pixels of each image.
        crop: What is cut from them.
    """

    image: Any
    label: Any
    weight: Any
    size: Any
    crop: Shape = flax.struct.field(pytree_node=False)


def placed(
    crops: Iterator[Any], resident: Resident, mesh: Mesh, *, stacked: bool = False
) -> Iterator[Any]:
    """What a step `with_crops` takes.

    They are not placed ahead: a few numbers are on the device before it asks for them.

    Args:
        crops: Of `unet_jax.data.crop_reader`, one after another.
        resident: The examples.
        mesh: Where.
        stacked: Whether an axis of several batches comes first.
    """
    at = _rows(mesh, stacked=stacked)
    return ({"resident": resident, **jax.device_put(some, at)} for some in crops)


def shapes(
    resident: Resident, mesh: Mesh, *, batch_size: int, together: int = 1
) -> dict[str, Any]:
    """The shapes of what `placed` gives, and where it lies.

    Args:
        resident: The examples.
        mesh: Where.
        batch_size: Rows.
        together: Batches to a call.
    """
    at = _rows(mesh, stacked=together > 1)
    first = (together, batch_size) if together > 1 else (batch_size,)
    rank = len(resident.crop)
    return {
        "resident": jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            resident,
        ),
        "index": jax.ShapeDtypeStruct(first, np.int32, sharding=at),
        "begin": jax.ShapeDtypeStruct((*first, rank), np.int32, sharding=at),
    }


def _rows(mesh: Mesh, *, stacked: bool) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(None,) * stacked, sharding.AXES[0]))


def with_crops(step: Callable[..., Any], *, whole: bool = False) -> Callable[..., Any]:
    """A step that cuts its batch itself, where it is given crops instead of one.

    Args:
        step: ``(state, batch) -> ...``, of training or evaluation, not yet compiled.
        whole: Whether images that are split over ``space`` begin whole, because an
            augmentation comes first that needs them so.

    Returns:
        The same for a batch, or for ``{"resident", "index", "begin"}``: the examples,
        ``i32[B]`` and ``i32[B, rank]`` of `unet_jax.data.crop_reader`.
    """

    def either(state: Any, batch: Any) -> Any:
        return step(state, cut(batch, whole=whole) if "resident" in batch else batch)

    return either


def cut(batch: Mapping[str, Any], *, whole: bool = False) -> dict[str, Array]:
    """A batch of crops, as `unet_jax.sharding.place` would have put it there.

    Args:
        batch: ``{"resident", "index", "begin"}``.
        whole: See `with_crops`.

    Returns:
        A `unet_jax.types.Batch`. Each device has cut its rows.
    """
    rows = {"index": batch["index"], "begin": batch["begin"]}
    made = sharding.by_example(_cut, batch["resident"], rows)
    missing = -batch["resident"].crop[0] % sharding.parts("space")

    def filled(x: Array) -> Array:
        widths = [(0, missing if axis == 1 else 0) for axis in range(x.ndim)]
        return jnp.pad(x, widths) if missing else x

    made = {key: filled(x) for key, x in made.items()}
    return sharding.constrain({**made, "index": batch["index"]}, whole=whole)


def _cut(resident: Resident, rows: Mapping[str, Array]) -> dict[str, Array]:
    """Image, label and weight of the rows that lie on one device."""
    return jax.vmap(_crop, (None, 0, 0))(resident, rows["index"], rows["begin"])


def _crop(resident: Resident, index: Array, begin: Array) -> dict[str, Array]:
    size, rank = resident.size[index], len(resident.crop)
    places = [begin[a] + jnp.arange(resident.crop[a]) for a in range(rank)]
    picks = jnp.ix_(*map(reflected, places, size))

    def taken(x: Array) -> Array:
        number = index if len(x) > 1 else jnp.zeros_like(index)
        return x.at[(number, *picks)].get(mode="promise_in_bounds")

    label = taken(resident.label)
    weight = taken(resident.weight).astype(jnp.float32)
    ends = [(at >= 0) & (at < n) for at, n in zip(places, size, strict=True)]
    inside = functools.reduce(jnp.logical_and.outer, ends)
    inside = inside.reshape(inside.shape + (1,) * (label.ndim - rank))
    weight = jnp.where(inside, weight, jnp.zeros((), jnp.float32))
    return {"image": taken(resident.image), "label": label, "weight": weight}


def reflected(place: Array, size: Array) -> Array:
    """The pixels that stand in a mirror at places inside and outside of an image.

    As `unet_jax.layers.mirror` has it: the outermost pixel is not repeated, what is far
    outside is mirrored back and forth, and an axis of one pixel repeats it.

    Args:
        place: ``i32[n]``, any numbers.
        size: ``i32[]``, of the image along the axis.

    Returns:
        ``i32[n]``, from 0 to below the size.
    """
    period = jnp.maximum(2 * (size - 1), 1)
    there = place % period
    return jnp.minimum(there, period - there)
