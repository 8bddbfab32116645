"""Reading an example at a field of coordinates: where augmentation interpolates.

A field is f32 ``[rank, *S]``: for each pixel of the output, the place in the input to
read. Fields compose by arithmetic, so that an elastic deformation of a rotated, scaled,
shifted and mirrored image still costs one interpolation::

    bent = grid_displacement(vectors, shape)
    field = affine_field(shape, angles=(0.2,), zoom=1.1, displacement=bent)
    moved = resample(example, flip_field(field, flipped=(True, False)))

Everything is pure, works under ``jit`` and ``vmap``, and takes (H, W) or (D, H, W).
"""

import functools
import math
from typing import Any, Literal, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np

from unet_jax.types import Array, Example, NumpyArray, Shape, choose

Interpolation = Literal["linear", "cubic"]


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
    shape: Shape,
    *,
    angles: Any = (),
    zoom: Any = 1.0,
    shift: Any = (),
    displacement: Array | None = None,
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
        displacement: f32 ``[rank, *S]``, pixels by which the moved content is deformed
            after that: output pixel x shows what the affine map alone would show at
            ``x + displacement(x)``. None for none.

    Returns:
        f32 ``[rank, *S]``. With the defaults it equals ``coordinates(shape)`` exactly.
    """
    rank = len(shape)
    if displacement is not None:
        chex.assert_shape(displacement, (rank, *shape))
    chex.assert_scalar_in(len(angles), 0, 1 if rank == 2 else 3)
    centre = [(size - 1) / 2 for size in shape]
    offset = []
    for axis, size in enumerate(shape):
        line = jnp.arange(size, dtype=jnp.float32) - centre[axis]
        line = line - shift[axis] if len(shift) else line
        line = line.reshape([-1 if i == axis else 1 for i in range(rank)])
        offset.append(line if displacement is None else line + displacement[axis])
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


def grid_displacement(
    vectors: Array, shape: Shape, *, method: Interpolation = "cubic"
) -> Array:
    """The displacement of every pixel from those at the nodes of a coarse grid.

    The grid spans the frame: its outermost nodes lie on the first and the last pixel.
    At a node the displacement is the node's; vectors that are a linear function of
    their place give that function.

    Args:
        vectors: f32 ``[rank, *G]`` pixels, at least 2 nodes along each axis.
        shape: ``*S``.
        method: ``cubic``, separable cubic convolution with continuous slope, or
            ``linear``.

    Returns:
        f32 ``[rank, *S]``, pixels.

    Reference:
        Ronneberger et al., U-Net, 2015, section 3.1 (3 x 3 nodes, bicubic); Keys 1981,
        doi 10.1109/TASSP.1981.1163711 (cubic convolution, a = -1/2).
    """
    choose(get_args(Interpolation), method, "augment.elastic_method =")
    chex.assert_shape(vectors, (len(shape), *[None] * len(shape)))
    for axis, size in enumerate(shape, start=1):
        matrix = jnp.asarray(_between(vectors.shape[axis], size, method))
        vectors = _along(matrix, vectors, axis)
    return vectors


def smooth_displacement(noise: Array, *, sigma: float) -> Array:
    """White noise smoothed to a displacement field, of the noise's own deviation.

    Args:
        noise: f32 ``[rank, *S]``, independent values of deviation s pixels.
        sigma: Deviation of the Gaussian in pixels, above 0; static. What lies beyond
            the frame has no part in it.

    Returns:
        f32 ``[rank, *S]``. Each value has deviation s: the smoothing is followed by
        what it takes to restore it, at the frame's edge as well.

    Reference:
        Simard et al. 2003, doi 10.1109/ICDAR.2003.1227801, section 2 (there the field
        is scaled by a factor whose effect depends on sigma).
    """
    for axis, size in enumerate(noise.shape[1:], start=1):
        noise = _along(jnp.asarray(_gaussian(size, sigma)), noise, axis)
    return noise


def resample(
    example: Example, field: Array, *, interpolation: Interpolation = "linear"
) -> Example:
    """Read an example at a field of coordinates.

    The image is interpolated and mirrored outside the frame (about the centre of its
    first and last pixel). The label is that of the nearest pixel. The weight is
    interpolated linearly, and 0 where the nearest pixel has weight 0 or the coordinate
    lies more than half a pixel outside: a label that is void or invented is not learnt.

    Args:
        example: one example.
        field: f32 ``[rank, *S]``, the coordinates to read each output pixel at.
            Whole numbers inside the frame give those pixels back exactly.
        interpolation: of the image: ``linear``, or ``cubic`` convolution (Keys 1981,
            a = -1/2), which is sharper, may overshoot, and reads 4 instead of 2 pixels
            an axis.

    Returns:
        The example, of the same shapes and dtypes.
    """
    choose(get_args(Interpolation), interpolation, "augment.interpolation =")
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

    def cubic(array: Array, corner: tuple[Array, ...] = ()) -> Array:
        axis = len(corner)
        if axis == len(shape):
            return _gather(array, corner)
        parts = []
        for tap, share in zip(range(-1, 3), _keys(fraction[axis]), strict=True):
            place = _mirrored(lower[axis] + tap, shape[axis])
            part = cubic(array, (*corner, place))
            parts.append(_like(share, part) * part)
        return sum(parts[1:], parts[0])

    weight = example.get("weight")
    if weight is None:
        weight = jnp.ones(example["label"].shape, jnp.float32)
    kept = _gather(weight, tuple(near)) > 0
    read = linear if interpolation == "linear" else cubic
    return {
        **example,
        "image": read(example["image"]).astype(example["image"].dtype),
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


def _mirrored(index: Array, size: int) -> Array:
    """As `_reflect`, of whole numbers at most two outside the frame."""
    if size < 3:  # so narrow that a mirror image would have to be mirrored again
        return _reflect(index.astype(jnp.float32), size).astype(jnp.int32)
    index = jnp.abs(index)
    return jnp.minimum(index, 2 * (size - 1) - index)


def _keys(fraction: Any) -> tuple[Any, Any, Any, Any]:
    """What the four neighbours of a place count in cubic convolution, a = -1/2.

    Args:
        fraction: How far the place lies from the second towards the third, in [0, 1].
    """
    t = fraction
    return (
        ((-0.5 * t + 1.0) * t - 0.5) * t,
        (1.5 * t - 2.5) * t * t + 1.0,
        ((-1.5 * t + 2.0) * t + 0.5) * t,
        (0.5 * t - 0.5) * t * t,
    )


@functools.cache
def _between(nodes: int, size: int, method: str) -> NumpyArray:
    """``f32[size, nodes]``: what each node counts at each pixel of an axis."""
    if nodes < 2:
        raise ValueError(f"{nodes} node(s) along an axis span nothing: use 2 or more")
    place = np.linspace(0.0, nodes - 1.0, size)
    lower = np.minimum(np.floor(place).astype(int), nodes - 2)
    part = place - lower
    rows = np.arange(size)
    # A node beyond each end, which continues the two at that end in a straight line.
    padded = np.zeros((size, nodes + 2))
    taps = (0 * part, 1 - part, part, 0 * part)
    for tap, share in enumerate(_keys(part) if method == "cubic" else taps):
        padded[rows, lower + tap] += share
    matrix = padded[:, 1:-1].copy()
    matrix[:, 0] += 2 * padded[:, 0]
    matrix[:, 1] -= padded[:, 0]
    matrix[:, -1] += 2 * padded[:, -1]
    matrix[:, -2] -= padded[:, -1]
    return matrix.astype(np.float32)


@functools.cache
def _gaussian(size: int, sigma: float) -> NumpyArray:
    """``f32[size, size]``: Gaussian rows, each of length 1, which keeps deviations."""
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma = {sigma} must be above 0")
    away = np.subtract.outer(np.arange(size), np.arange(size))
    rows = np.exp(-0.5 * (away / sigma) ** 2)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _along(matrix: Array, array: Array, axis: int) -> Array:
    """A matrix applied along one axis, exactly: a TF32 product would be pixels off."""
    moved = jnp.tensordot(
        array, matrix, ((axis,), (1,)), precision=jax.lax.Precision.HIGHEST
    )
    return jnp.moveaxis(moved, -1, axis)


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
