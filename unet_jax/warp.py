"""Reading an example at a field of coordinates: where augmentation interpolates.

A field is f32 ``[rank, *S]``: for each pixel of the output, the place in the input to
read. Fields compose by arithmetic, so that a rotation and a displacement added to it
still cost one interpolation::

    moved = resample(example, affine_field(shape, angles=(0.2,)) + displacement)

Everything is pure, works under ``jit`` and ``vmap``, and takes (H, W) or (D, H, W).
"""

from typing import Any

import chex
import jax.numpy as jnp

from unet_jax.types import Array, Example, Shape


def coordinates(shape: Shape) -> Array:
    """The field that changes nothing: each pixel's own coordinates.

    Args:
        shape: ``*S``.

    Returns:
        f32 ``[rank, *S]``; pixel centres are at whole numbers, as in
        ``scipy.ndimage.map_coordinates``.
    """
    axes = [jnp.arange(size, dtype=jnp.float32) for size in shape]
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"))


def affine_field(
    shape: Shape, *, angles: Any = (), zoom: Any = 1.0, shift: Any = ()
) -> Array:
    """Where to read an image so that it appears rotated, scaled and shifted.

    The content is rotated and scaled about the centre of the frame, then shifted. The
    voxels are taken to be cubes: angles are right where the spacing is equal.

    Args:
        shape: ``*S``.
        angles: radians, ``()`` for none. In 2-D one angle, turning counter-clockwise
            with the row axis down (as ``np.rot90``). In 3-D one to three, in the planes
            of axes (1, 2), (0, 2) and (0, 1), applied in this order.
        zoom: factor of the content's size, above 0.
        shift: pixels along each axis, towards higher indices; ``()`` for none.

    Returns:
        f32 ``[rank, *S]``. With the defaults it equals ``coordinates(shape)`` exactly.
    """
    rank = len(shape)
    chex.assert_scalar_in(len(angles), 0, 1 if rank == 2 else 3)
    centre = [(size - 1) / 2 for size in shape]
    offset = []
    for axis, size in enumerate(shape):
        line = jnp.arange(size, dtype=jnp.float32) - centre[axis]
        line = line - shift[axis] if len(shift) else line
        offset.append(line.reshape([-1 if i == axis else 1 for i in range(rank)]))
    planes = [(rank - 2, rank - 1), (0, 2), (0, 1)][: len(angles)]
    # The field goes from the output back to the input: the inverse turns, last first.
    # They are spelled out because a matmul may run in bf16 or TF32 on an accelerator,
    # which is pixels off.
    for (row, column), angle in reversed(list(zip(planes, angles, strict=True))):
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        offset[row], offset[column] = (
            cos * offset[row] + sin * offset[column],
            cos * offset[column] - sin * offset[row],
        )
    field = [x / zoom + middle for x, middle in zip(offset, centre, strict=True)]
    return jnp.stack([jnp.broadcast_to(x, shape) for x in field])


def flip_field(field: Array, *, flipped: Any) -> Array:
    """The field that reads an example as the given one would read its mirror image.

    ``resample(example, flip_field(field, flipped=f))`` is
    ``resample(augment.flip(example, flipped=f), field)`` with less work.

    Args:
        field: f32 ``[rank, *S]``.
        flipped: bool ``[rank]``, the axes that are mirrored; may be traced.

    Returns:
        f32 ``[rank, *S]``.
    """
    ends = [size - 1 for size in field.shape[1:]]
    return jnp.stack(
        [
            jnp.where(flipped[axis], end - field[axis], field[axis])
            for axis, end in enumerate(ends)
        ]
    )


def quarter_turn_field(field: Array, *, turns: Any) -> Array:
    """The field that reads an example as the given one would read it turned.

    Args:
        field: f32 ``[rank, *S]``.
        turns: integer ``[]`` as for ``augment.quarter_turn``; may be traced.

    Returns:
        f32 ``[rank, *S]``.
    """
    turns = jnp.asarray(turns, jnp.int32) % 4
    *rest, row, column = field
    height, width = field.shape[-2:]
    row = jnp.where((turns == 1) | (turns == 2), height - 1 - row, row)
    column = jnp.where(turns >= 2, width - 1 - column, column)
    odd = turns % 2 == 1
    turned = (jnp.where(odd, column, row), jnp.where(odd, row, column))
    return jnp.stack([*rest, *turned])


def resample(example: Example, field: Array) -> Example:
    """Read an example at a field of coordinates.

    The image is interpolated linearly and mirrored outside the frame (about the centre
    of its first and last pixel). The label is that of the nearest pixel. The weight is
    interpolated linearly, and 0 where the nearest pixel has weight 0 or the coordinate
    lies more than half a pixel outside: a label that is void or invented is not learnt.

    Args:
        example: one example.
        field: f32 ``[rank, *S]``, the coordinates to read each output pixel at.
            Whole numbers inside the frame give those pixels back exactly.

    Returns:
        The example, of the same shapes and dtypes.
    """
    shape = example["image"].shape[:-1]
    chex.assert_shape(field, (len(shape), *shape))
    chex.assert_type(example["image"], float)
    inside = jnp.ones(shape, jnp.bool_)
    lower, fraction = [], []
    for axis, size in enumerate(shape):
        inside &= (field[axis] >= -0.5) & (field[axis] <= size - 0.5)
        position = _reflect(field[axis], size)
        below = jnp.floor(position)
        lower.append(below.astype(jnp.int32))
        fraction.append(position - below)
    upper = [jnp.minimum(i + 1, n - 1) for i, n in zip(lower, shape, strict=True)]
    near = [
        jnp.where(part > 0.5, high, low)
        for low, high, part in zip(lower, upper, fraction, strict=True)
    ]

    def linear(array: Array, corner: tuple[Array, ...] = ()) -> Array:
        axis = len(corner)
        if axis == len(shape):
            return _gather(array, corner)
        first = linear(array, (*corner, lower[axis]))
        last = linear(array, (*corner, upper[axis]))
        return first + _like(fraction[axis], first) * (last - first)

    weight = example.get("weight")
    if weight is None:
        weight = jnp.ones(example["label"].shape, jnp.float32)
    kept = _gather(weight, tuple(near)) > 0
    return {
        **example,
        "image": linear(example["image"]).astype(example["image"].dtype),
        "label": _gather(example["label"], tuple(near)),
        "weight": jnp.where(kept & _like(inside, weight), linear(weight), 0.0),
    }


def _reflect(position: Array, size: int) -> Array:
    """Fold a coordinate into [0, size - 1], mirrored about the end pixels' centres."""
    if size == 1:
        return jnp.zeros_like(position)
    period = 2.0 * (size - 1)
    position = jnp.abs(position)
    position = position - period * jnp.floor(position / period)
    # The subtraction rounds: without the bounds an index could leave the frame.
    return jnp.clip(jnp.minimum(position, period - position), 0.0, size - 1.0)


def _gather(array: Array, index: tuple[Array, ...]) -> Array:
    """``array[index]`` over the leading axes, as one lookup in a flat table."""
    rank = len(index)
    flat = index[0]
    for axis in range(1, rank):
        flat = flat * array.shape[axis] + index[axis]
    table = jnp.asarray(array).reshape(-1, *array.shape[rank:])
    return table.at[flat].get(mode="promise_in_bounds")


def _like(values: Array, array: Array) -> Array:
    """``values`` ``[*S]`` with as many axes as ``array`` ``[*S]`` or ``[*S, K]``."""
    return values.reshape(values.shape + (1,) * (array.ndim - values.ndim))
