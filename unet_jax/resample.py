"""Going down and up a level: pooling, up-convolution, interpolation, pixel shuffle.

`DOWNS` and `UPS` name them. A new one is a function or module and its entry there. An
up-sampling is a module with the fields ``features``, ``stride``, ``kernel`` (a number
for each axis) and ``kit``, and a method ``taps(axis)``: the kernel sizes of its
convolutions along an axis, those before and those after the size has grown. One that
interpolates says by a field ``method`` (`nearest`, `linear`, `linear_aligned`) how.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unet_jax.layers import INITIALISERS, Factory, Kit
from unet_jax.types import Array, Shape

Taps = tuple[tuple[int, ...], tuple[int, ...]]

# --- Down ----------------------------------------------------------------------------


def _windows(x: Array, stride: Sequence[int]) -> list[Array]:
    """The pixels of each place in windows of ``stride``; what is left over is dropped.

    An axis shorter than its stride is left as it is.
    """
    window = [w if n >= w else 1 for n, w in zip(x.shape[1:-1], stride, strict=True)]
    pooled = [n // w for n, w in zip(x.shape[1:-1], window, strict=True)]
    whole = tuple(slice(0, p * w) for p, w in zip(pooled, window, strict=True))
    x = x[(slice(None), *whole)]
    split = [n for pair in zip(pooled, window, strict=True) for n in pair]
    x = x.reshape(x.shape[0], *split, x.shape[-1])
    places = [[i for o in at for i in (slice(None), o)] for at in np.ndindex(*window)]
    return [x[(slice(None), *place)] for place in places]


def max_pool(x: Array, stride: Sequence[int]) -> Array:
    """Maximum over windows that do not overlap; an odd last row or column is dropped.

    Of equal maxima the first (in row-major order) receives the gradient, as in PyTorch.
    Written as comparisons of slices because XLA's select-and-scatter, the gradient of
    ``reduce_window``, is slow on CPU: conv, pool, conv at 128 x 128 x 32 and batch 4
    takes 9 ms forward and backward this way and 27 ms with ``nn.max_pool``.

    Args:
        x: ``[B, *S, C]``. An axis shorter than its window is left as it is.
        stride: The window, a number for each axis.

    Returns:
        ``[B, *(S // stride), C]``.
    """
    best, *others = _windows(x, stride)
    for value in others:  # `value != value` lets a NaN through, as a maximum must
        best = jnp.where((value > best) | (value != value), value, best)
    return best


def average_pool(x: Array, stride: Sequence[int]) -> Array:
    """The mean over the same windows as `max_pool`."""
    values = _windows(x, stride)
    return sum(values[1:], values[0]) * jnp.asarray(1 / len(values), x.dtype)


# None: nothing is pooled, the first convolution of the next block strides instead.
DOWNS: dict[str, Callable[[Array, Sequence[int]], Array] | None] = {
    "max": max_pool,
    "average": average_pool,
    "strided": None,
}


# --- Up ------------------------------------------------------------------------------


def depth_to_space(x: Array, stride: Sequence[int]) -> Array:
    """Interleaves ``[B, *S, *stride, C]`` to ``[B, *(S * stride), C]``."""
    rank = len(stride)
    batch, *size = x.shape[: rank + 1]
    order = [0]
    for a in range(rank):
        order += [1 + a, 1 + rank + a]
    x = x.transpose(*order, 2 * rank + 1)
    size = [n * s for n, s in zip(size, stride, strict=True)]
    return x.reshape(batch, *size, x.shape[-1])


def linear(x: Array, stride: Sequence[int]) -> Array:
    """Linear up-sampling with half-pixel centres (``align_corners=False``).

    By 2, each output is 3/4 of its own pixel and 1/4 of the neighbour on its side;
    beyond the border the border pixel counts as its own neighbour.

    Args:
        x: ``[B, *S, C]``.
        stride: The factor of each axis.

    Returns:
        ``[B, *(stride * S), C]``.
    """
    for axis, factor in enumerate(stride, start=1):
        if factor == 1:
            continue
        size = x.shape[axis]
        take = partial(jax.lax.slice_in_dim, x, axis=axis)
        before = jnp.concatenate([take(0, 1), take(0, size - 1)], axis)
        after = jnp.concatenate([take(1, size), take(size - 1, size)], axis)
        phases = []
        for phase in range(factor):
            shift = (phase + 0.5) / factor - 0.5
            other, share = (before, -shift) if shift < 0 else (after, shift)
            phases.append((1.0 - share) * x + share * other)
        stacked = jnp.stack(phases, axis + 1)
        x = stacked.reshape(*x.shape[:axis], factor * size, *x.shape[axis + 1 :])
    return x


def linear_aligned(x: Array, stride: Sequence[int]) -> Array:
    """Linear up-sampling with the corner pixels kept (``align_corners=True``).

    Args:
        x: ``[B, *S, C]``.
        stride: The factor of each axis.

    Returns:
        ``[B, *(stride * S), C]``.
    """
    for axis, factor in enumerate(stride, start=1):
        if factor == 1:
            continue
        size = x.shape[axis]
        position = np.arange(factor * size) * ((size - 1) / (factor * size - 1))
        hat = np.abs(position[:, None] - np.arange(size)[None, :])
        weights = jnp.asarray(np.maximum(1.0 - hat, 0.0), x.dtype)
        product = jnp.tensordot(weights, x, ((1,), (axis,)), precision="highest")
        x = jnp.moveaxis(product, 0, axis)
    return x


def nearest(x: Array, stride: Sequence[int]) -> Array:
    """Repeats every pixel along each axis: ``[B, *(stride * S), C]``."""
    for axis, factor in enumerate(stride, start=1):
        x = jnp.repeat(x, factor, axis=axis) if factor > 1 else x
    return x


class UpConv(nn.Module):
    """The paper's 2x2 "up-convolution" of stride 2: no two taps overlap.

    Hence it is one matrix product to ``prod(stride) * features`` channels and an
    interleave, which is exact and avoids the input dilation that makes
    ``nn.ConvTranspose`` slow on every backend. ``kernel`` has shape
    ``[*stride, C, features]`` and its tap ``(i, j)`` fills the pixels
    ``(2 y + i, 2 x + j)``: PyTorch's weight ``[C, features, i, j]`` moves over by one
    transpose.

    Reference: Ronneberger et al. 2015, arXiv 1505.04597, section 2.
    """

    features: int
    stride: Shape | None = None
    use_bias: bool = True
    kernel_init: Callable[..., Any] = INITIALISERS["he_normal"]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        rank = x.ndim - 2
        stride = self.stride or (2,) * rank
        taps = math.prod(stride)

        def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            # An output pixel sees C inputs through one tap: the fan-in of a 1x1 kernel.
            one_tap = (1,) * rank + (shape[-2], taps * shape[-1])
            kernel = self.kernel_init(key, one_tap, dtype)
            kernel = kernel.reshape(shape[-2], *stride, shape[-1])
            return jnp.moveaxis(kernel, 0, -2)

        shape = (*stride, x.shape[-1], self.features)
        kernel = self.param("kernel", init, shape, jnp.float32)
        kernel = jnp.moveaxis(kernel, -2, 0).reshape(x.shape[-1], -1)
        y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))
        y = depth_to_space(y.reshape(*x.shape[:-1], *stride, self.features), stride)
        if self.use_bias:
            zeros = nn.initializers.zeros_init()
            bias = self.param("bias", zeros, (self.features,), jnp.float32)
            y = y + bias.astype(self.dtype).reshape((1,) * (rank + 1) + (-1,))
        return y


class Transposed(nn.Module):
    """The up-convolution: learnt, to ``features`` channels."""

    features: int
    stride: Shape
    kernel: Shape
    kit: Kit

    def taps(self, axis: int) -> Taps:
        """Its taps do not overlap: a pixel comes of one coarse pixel."""
        return (), ()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return self.kit.up_conv(
            features=self.features, stride=self.stride, name="conv"
        )(x)


class Interpolated(nn.Module):
    """Interpolation: no parameters, and the channels stay; ``features`` is not read.

    Attributes:
        method: `linear`, `linear_aligned` or `nearest`.
    """

    features: int
    stride: Shape
    kernel: Shape
    kit: Kit
    method: Callable[[Array, Sequence[int]], Array] = nearest

    def taps(self, axis: int) -> Taps:
        """None that would shrink the map."""
        return (), ()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return self.method(x, self.stride)


class InterpolatedUnit(nn.Module):
    """Interpolation, then convolution, norm and activation to ``features`` channels.

    Attributes:
        method: `linear`, `linear_aligned` or `nearest`.
    """

    features: int
    stride: Shape
    kernel: Shape
    kit: Kit
    method: Callable[[Array, Sequence[int]], Array] = nearest

    def taps(self, axis: int) -> Taps:
        """One convolution of the larger map."""
        return (), (self.kernel[axis],)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.method(x, self.stride)
        return self.kit.unit(x, "0", features=self.features, kernel=self.kernel)


class PixelShuffle(nn.Module):
    """A convolution to ``prod(stride) * features`` channels, interleaved.

    Reference: Shi et al. 2016, arXiv 1609.05158.
    """

    features: int
    stride: Shape
    kernel: Shape
    kit: Kit

    def taps(self, axis: int) -> Taps:
        """One convolution of the smaller map."""
        return (self.kernel[axis],), ()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = self.kit.conv(
            features=math.prod(self.stride) * self.features,
            kernel=self.kernel,
            stride=(1,) * len(self.stride),
            name="conv",
        )(x)
        split = (*y.shape[:-1], *self.stride, self.features)
        return depth_to_space(y.reshape(split), self.stride)


UPS: dict[str, Factory] = {
    "transpose": Transposed,
    "bilinear": partial(Interpolated, method=linear),
    "bilinear_aligned": partial(Interpolated, method=linear_aligned),
    "nearest": partial(Interpolated, method=nearest),
    "nearest_conv": partial(InterpolatedUnit, method=nearest),
    "pixel_shuffle": PixelShuffle,
}
