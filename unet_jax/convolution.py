"""The convolution of every net: `jax.lax`'s, and faster where that is slow.

On an accelerator, on a mesh, and for strides, it is `jax.lax.conv_general_dilated`. XLA
on a CPU is slow at two things. It has no fast convolution of volumes: they become one
of their slices (`_of_volumes`). And the gradient of a kernel, a convolution whose
window is the whole map, is slow with padding and for maps that the caches do not hold:
it is taken of the padded map, as one tall image in blocks of rows.

The gradients are not written as gradients. What is written down is the derivative, in
such a form that its transpose is the program that is wanted (`_derivative`), so that
every transformation of JAX goes on working, in both directions and any number of times.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unet_jax import sharding
from unet_jax.types import Array, Pads

BLOCK = 2**22  # bytes of rows that the gradient of a kernel is summed up over at once
BLOCKS = 32  # at most: each is compiled by itself


def convolve(
    x: Array, kernel: Array, strides: Sequence[int], padding: Any, **options: Any
) -> Array:
    """`jax.lax.conv_general_dilated`, right on a mesh, and fast on a CPU.

    Values and derivatives are the same up to rounding; ``docs/performance.md`` says how
    long they take.

    Args:
        x: ``[B, *S, C]``.
        kernel: ``[*taps, C, features]``.
        strides: A number for each axis.
        padding: ``"VALID"``, or (before, after) for each axis.
        **options: As for `jax.lax.conv_general_dilated`, which gets them; dilations and
            groups must be the default.
    """
    rank = x.ndim - 2
    pads = ((0, 0),) * rank if padding == "VALID" else tuple(map(tuple, padding))

    def plain(x: Array, kernel: Array) -> Array:
        # Held on the mesh: where a map does not divide over its devices, XLA takes some
        # of them at a reshape and then adds up the kernel's gradient over all, so that
        # it is 2 or 4 times too large (jax 0.10.1, padding = "valid").
        x = sharding.constrain(x)
        y = jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
        return sharding.constrain(y)

    if not _quick(x, kernel, pads):
        return plain(x, kernel)
    precision = options.get("precision")
    if set(strides) == {1} and sharding.parts("data") == 1:
        return _of_stride_one(pads, precision, x, kernel)
    if rank == 2:
        return plain(x, kernel)
    quick = partial(_of_volumes, strides, pads, precision)
    return jax.lax.platform_dependent(x, kernel, cpu=quick, default=plain)


def _quick(x: Array, kernel: Array, pads: Pads) -> bool:
    """Whether there is another way than `jax.lax`'s for these shapes, here."""
    rank, taps = x.ndim - 2, kernel.shape[: x.ndim - 2]
    # Of no channels, or a map smaller than the kernel, there is nothing to fold; what
    # lies on several devices would be gathered; and rows of padding that no tap sees
    # beside the image would be taken for rows of another.
    return (
        rank in (2, 3)
        and sharding.parts("space") == 1
        and x.size > 0
        and kernel.size > 0
        and all(0 <= p < t for pad, t in zip(pads, taps, strict=True) for p in pad)
        and all(
            n + sum(pad) >= t
            for n, pad, t in zip(x.shape[1:-1], pads, taps, strict=True)
        )
    )


def product(x: Array, kernel: Array) -> Array:
    """``[..., C]`` times ``[C, features]``: a 1x1 convolution.

    As one product of two matrices where there is no mesh to be seen: of a product over
    the last of several axes XLA on a CPU takes the kernel's gradient of a transposed
    copy of the map.
    """
    if sharding.parts("data") * sharding.parts("space") > 1 or not x.size:
        return jnp.dot(x, kernel)
    y = jnp.dot(x.reshape(-1, x.shape[-1]), kernel)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _conv(
    strides: Sequence[int], pads: Pads, precision: Any, x: Array, kernel: Array
) -> Array:
    space = "DHW"[5 - x.ndim :]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        precision=precision,
    )


# --- Volumes as slices ---------------------------------------------------------------


class _Slices(NamedTuple):
    """How a convolution of volumes becomes one of slices, in three linear steps.

    Attributes:
        of_map: ``[B, D, H, W, C]`` to slices, as a batch.
        of_kernel: ``[taps, h, w, C, features]`` to a kernel of two axes.
        of_result: What that gives to ``[B, D', H', W', features]``.
    """

    of_map: Callable[[Array], Array]
    of_kernel: Callable[[Array], Array]
    of_result: Callable[[Array], Array]


def _slices(
    stride: int,
    pad: tuple[int, int],
    x: Array,
    kernel: Array,
    *,
    gather: bool,
    surplus: int = 0,
) -> _Slices:
    """The slices are the batch, and the taps along the depth are in the channels.

    Args:
        stride: Along the depth; 1 unless ``gather``.
        pad: Slices before and after.
        x: ``[B, D, H, W, C]``; only the shape matters.
        kernel: ``[taps, h, w, C, features]``; likewise.
        gather: Whether the slices that a tap sees are put beside each other before the
            convolution, or what the taps give is moved to its slices after it.
        surplus: Rows of what comes back to drop, of each slice the last.
    """
    batch, depth = x.shape[:2]
    taps = kernel.shape[0]
    size = (depth + sum(pad) - taps) // stride + 1

    def flat(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])

    def whole(y: Array) -> Array:
        return y.reshape(batch, -1, *y.shape[1:])

    def beside(x: Array) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[1] = pad
        x = jnp.pad(x, widths) if any(pad) else x
        last = (size - 1) * stride + 1
        # Joined as slices, here and on the way back (`moved`): XLA on a CPU would make
        # what is reshaped once for each use of it.
        parts = [
            flat(jax.lax.slice_in_dim(x, tap, tap + last, stride, axis=1))
            for tap in range(taps)
        ]
        return jnp.concatenate(parts, axis=-1) if taps > 1 else parts[0]

    def moved(y: Array) -> Array:
        total = None
        for tap, part in enumerate(jnp.split(y, taps, axis=-1) if taps > 1 else [y]):
            widths = [(0, 0, 0)] * x.ndim
            widths[1] = (pad[0] - tap, size - depth - pad[0] + tap, 0)
            widths[2] = (0, -surplus, 0)
            part = jax.lax.pad(whole(part), jnp.zeros((), y.dtype), widths)
            total = part if total is None else total + part
        assert total is not None
        return total

    def to_channels(axis: int, kernel: Array) -> Array:
        height, width, channels, features = kernel.shape[1:]
        # Either taps x channels or taps x features are one axis afterwards.
        shape = (-1, features) if axis == 2 else (channels, -1)
        return jnp.moveaxis(kernel, 0, axis).reshape(height, width, *shape)

    if gather:
        result = whole if not surplus else lambda y: whole(y)[:, :, :-surplus]
        return _Slices(beside, partial(to_channels, 2), result)
    return _Slices(flat, partial(to_channels, 3), moved)


def _of_volumes(
    strides: Sequence[int], pads: Pads, precision: Any, x: Array, kernel: Array
) -> Array:
    """A convolution of volumes as one of slices.

    It gathers where there are fewer channels than features, or strides, and else moves.
    With 16 of each, a volume of 64 x 64 x 64 takes 70 ms instead of 380 ms on one core.
    """
    gather = kernel.shape[-2] < kernel.shape[-1] or strides[0] > 1
    slices = _slices(strides[0], pads[0], x, kernel, gather=gather)
    conv = partial(_conv, strides[1:], pads[1:], precision)
    return slices.of_result(conv(slices.of_map(x), slices.of_kernel(kernel)))


# --- Of stride 1 ---------------------------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _of_stride_one(pads: Pads, precision: Any, x: Array, kernel: Array) -> Array:
    strides = (1,) * len(pads)
    plain = partial(_conv, strides, pads, precision)
    if len(pads) == 2:
        return plain(x, kernel)
    quick = partial(_of_volumes, strides, pads, precision)
    return jax.lax.platform_dependent(x, kernel, cpu=quick, default=plain)


@_of_stride_one.defjvp
def _(
    pads: Pads, precision: Any, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    y = _of_stride_one(pads, precision, *primals)

    def derivative(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> Array:
        if sharding.on_cpu():
            return _derivative(pads, precision, primals, tangents)
        conv = partial(_conv, (1,) * len(pads), pads, precision)
        (x, kernel), (dx, dkernel) = primals, tangents
        return conv(dx, kernel) + conv(x, dkernel)

    # Computed again on the way back: else the padded map would be kept beside the map.
    return y, jax.checkpoint(derivative, prevent_cse=False)(primals, tangents)


def _derivative(
    pads: Pads, precision: Any, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> Array:
    """The derivative in a form whose transpose is fast."""
    (x, kernel), (dx, dkernel) = primals, tangents
    *before, up, across = pads
    taps = kernel.shape[-4]
    spacing = _spacing(up)
    surplus = spacing - sum(up) + taps - 1  # rows that see two images
    if not before:
        dy = _conv((1, 1), pads, precision, dx, kernel)
        more = _in_blocks(across, precision, _tall(up, taps, x), dkernel)
        more = more.reshape(len(x), -1, *more.shape[2:])
        return dy + (more[:, :-surplus] if surplus else more)
    gather = kernel.shape[-2] < kernel.shape[-1]
    slices = _slices(1, before[0], x, kernel, gather=gather, surplus=surplus)
    kernel, dkernel = map(slices.of_kernel, (kernel, dkernel))
    x, dx = map(slices.of_map, (x, dx))
    # With the spacing, too, so that the gradient, its slices beside each other, is put
    # together once for both.
    dx = jnp.pad(dx, ((0, 0), (0, spacing), (0, 0), (0, 0)))
    dy = _conv((1, 1), ((up[0], taps - 1 - up[0]), across), precision, dx, kernel)
    more = _in_blocks(across, precision, _tall(up, taps, x), dkernel)
    return slices.of_result(dy + more.reshape(dy.shape))


# --- The gradient of a kernel --------------------------------------------------------


def _spacing(pad: tuple[int, int]) -> int:
    """Rows of zeros between two images of a tall one, padding of both."""
    return max(pad)


def _tall(pad: tuple[int, int], taps: int, x: Array) -> Array:
    """All images under each other as one, with the padding between them.

    Of what a convolution of so many taps then gives, the first H' of every
    ``H + spacing`` rows are an image's; the others see two, and are to be dropped.

    Args:
        pad: Of the rows.
        taps: Along the rows.
        x: ``[B, H, W, C]``.

    Returns:
        ``[1, B * (H + spacing) + taps - 1, W, C]``.
    """
    zero = jnp.zeros((), x.dtype)
    between = _spacing(pad)
    if between:
        x = jax.lax.pad(x, zero, [(0, 0, 0), (0, between, 0), (0, 0, 0), (0, 0, 0)])
    x = x.reshape(1, -1, *x.shape[2:])
    ends = (pad[0], taps - 1 - pad[0], 0)
    return jax.lax.pad(x, zero, [(0, 0, 0), ends, (0, 0, 0), (0, 0, 0)])


def _in_blocks(pad: tuple[int, int], precision: Any, x: Array, dkernel: Array) -> Array:
    """The convolution of a map by a kernel's tangent, of which that is transposed.

    Each block of rows is a convolution of its own: transposed, its gradient.

    Args:
        pad: Of the columns. There is none of rows.
        precision: Of the products.
        x: ``[1, H, W, C]``.
        dkernel: ``[*taps, C, features]``.
    """
    taps = dkernel.shape[0]
    x = jnp.pad(x, ((0, 0), (0, 0), pad, (0, 0))) if any(pad) else x
    valid = x.shape[1] - taps + 1
    row_bytes = x.shape[2] * max(dkernel.shape[2:]) * x.dtype.itemsize
    # Blocks are added up in their own type, which bfloat16 would lose digits by.
    most = BLOCKS if x.dtype.itemsize >= 4 else 1
    count = min(-(-valid * row_bytes // BLOCK), most)
    step = -(-valid // count)
    blocks = [
        _conv(
            (1, 1),
            ((0, 0), (0, 0)),
            precision,
            x[:, begin : min(begin + step, valid) + taps - 1],
            dkernel,
        )
        for begin in range(0, valid, step)
    ]
    return jnp.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]
