"""Going down and up a level: pooling, up-convolution, interpolation, pixel shuffle.

`DOWNS` and `UPS` name them. A new one is a function or module and its entry there. An
up-sampling is a module with the fields ``features``, ``stride``, ``kernel`` (a number
for each axis) and ``kit``, called as ``up(x, size)``, and a method ``taps(axis)``: the
kernel sizes of its convolutions along an axis, those before and those after the size
has grown. One that interpolates says by a field ``method`` (`nearest`, `linear`,
`linear_aligned`) how, and goes to ``size`` where that is not None; the others multiply
by the stride whatever it is.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unet_jax.convolution import convolve, product
from unet_jax.layers import INITIALISERS, Factory, Kit, shifted
from unet_jax.types import Array, NumpyArray, Shape

Taps = tuple[tuple[int, ...], tuple[int, ...]]

# --- Down ----------------------------------------------------------------------------


def _windows(x: Array, stride: Sequence[int]) -> Array:
    """``[B, *(S // window, window), C]``: pixels that no window holds are dropped.

    An axis shorter than its stride is left as it is.
    """
    window = [w if n >= w else 1 for n, w in zip(x.shape[1:-1], stride, strict=True)]
    pooled = [n // w for n, w in zip(x.shape[1:-1], window, strict=True)]
    whole = tuple(slice(0, p * w) for p, w in zip(pooled, window, strict=True))
    split = [n for pair in zip(pooled, window, strict=True) for n in pair]
    return x[(slice(None), *whole)].reshape(x.shape[0], *split, x.shape[-1])


def _places(windows: Array) -> list[Array]:
    """The pixels of each place in the windows, in row-major order."""
    places = np.ndindex(*windows.shape[2:-1:2])
    whole = slice(None)
    return [windows[(whole, *(i for o in at for i in (whole, o)))] for at in places]


def _maximum(windows: Array) -> tuple[Array, Array]:
    """The maximum of each window, and the number of its first place, small integers."""
    best, *others = _places(windows)
    kind = np.min_scalar_type(len(others))
    place = jnp.zeros(best.shape, kind)
    for number, value in enumerate(others, start=1):
        # `value != value` lets a NaN through, as a maximum must
        better = (value > best) | (value != value)
        best = jnp.where(better, value, best)
        place = jnp.where(better, jnp.asarray(number, kind), place)
    return best, place


@jax.custom_jvp
def _pooled(windows: Array) -> Array:
    return _maximum(windows)[0]


@_pooled.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    best, place = _maximum(*primals)
    sides = tuple(range(2, best.ndim * 2 - 3, 2))

    def picked(place: Array, windows: Array) -> Array:
        # One selection and one sum, so that the way back is one selection, too.
        shape = [n if a in sides else 1 for a, n in enumerate(windows.shape)]
        numbers = np.arange(np.prod(shape), dtype=place.dtype).reshape(shape)
        here = jnp.expand_dims(place, sides) == jnp.asarray(numbers)
        chosen = jnp.where(here, windows, jnp.zeros((), windows.dtype))
        return jnp.sum(chosen, sides, dtype=windows.dtype)

    # Where the maximum is, as large as the map, is found again on the way back.
    again = jax.checkpoint(picked, prevent_cse=False)
    return best, again(place, *tangents)


def max_pool(x: Array, stride: Sequence[int]) -> Array:
    """Maximum over windows that do not overlap; an odd last row or column is dropped.

    Of equal maxima the first (in row-major order) receives the gradient, as in PyTorch.
    XLA's select-and-scatter, the gradient of ``reduce_window``, is slow on CPU: conv,
    pool, conv at 128 x 128 x 32 and batch 4 takes 9 ms forward and backward this way
    and 27 ms with ``nn.max_pool``. What is kept is a byte for each window.

    Args:
        x: ``[B, *S, C]``. An axis shorter than its window is left as it is.
        stride: The window, a number for each axis.

    Returns:
        ``[B, *(S // stride), C]``.
    """
    return _pooled(_windows(x, stride))


def average_pool(x: Array, stride: Sequence[int]) -> Array:
    """The mean over the same windows as `max_pool`."""
    values = _places(_windows(x, stride))
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


def _positions(old: int, new: int, *, aligned: bool) -> NumpyArray:
    """Where between ``old`` pixels each of ``new`` ones stands: ``f64[new]``."""
    index = np.arange(new)
    if aligned:
        return index * ((old - 1) / max(new - 1, 1))
    return np.clip((index + 0.5) * old / new - 0.5, 0, old - 1)


def _interpolated(x: Array, stride: Sequence[int], *, aligned: bool) -> Array:
    """Each pixel of an axis becomes ``stride`` ones, mixed with the pixels beside it.

    No new pixel is as far as one from that which it is made of. Shifted maps and not a
    product with a matrix, which sums up whole maps where they are split over devices:
    this way only border rows move.
    """
    for axis, factor in enumerate(stride, start=1):
        if factor == 1:
            continue
        size = x.shape[axis]
        at = _positions(size, factor * size, aligned=aligned)
        wide = tuple(-1 if a == axis else 1 for a in range(x.ndim))
        phases = []
        for phase in range(factor):
            terms = []
            for by in (0, -1, 1):
                distance = np.abs(at[phase::factor] - (np.arange(size) + by))
                weights = np.maximum(1.0 - distance, 0.0)
                if np.any(weights):
                    weights = jnp.asarray(weights, x.dtype).reshape(wide)
                    terms.append(weights * (shifted(x, axis, by) if by else x))
            phases.append(sum(terms[1:], terms[0]))
        stacked = jnp.stack(phases, axis + 1)
        x = stacked.reshape(*x.shape[:axis], factor * size, *x.shape[axis + 1 :])
    return x


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
    return _interpolated(x, stride, aligned=False)


def linear_aligned(x: Array, stride: Sequence[int]) -> Array:
    """Linear up-sampling with the corner pixels kept (``align_corners=True``).

    Args:
        x: ``[B, *S, C]``.
        stride: The factor of each axis.

    Returns:
        ``[B, *(stride * S), C]``.
    """
    return _interpolated(x, stride, aligned=True)


def nearest(x: Array, stride: Sequence[int]) -> Array:
    """Repeats every pixel along each axis: ``[B, *(stride * S), C]``."""
    for axis, factor in enumerate(stride, start=1):
        x = jnp.repeat(x, factor, axis=axis) if factor > 1 else x
    return x


Method = Callable[[Array, Sequence[int]], Array]


def to_size(x: Array, size: Sequence[int], method: Method = nearest) -> Array:
    """Interpolates to any size, as PyTorch's ``interpolate(size=...)`` does.

    Pixel i of the result stands at ``(i + 1/2) in / out - 1/2`` (`linear`), at
    ``i (in - 1) / (out - 1)`` (`linear_aligned`), or is pixel ``floor(i in / out)``
    (`nearest`: not the nearest centre, for sizes that are no multiples).

    Args:
        x: ``[B, *S, C]``.
        size: The spatial size wanted.
        method: `nearest`, `linear` or `linear_aligned`.

    Returns:
        ``[B, *size, C]``.
    """
    old = x.shape[1:-1]
    if all(new % n == 0 for new, n in zip(size, old, strict=True)):
        return method(x, [new // n for new, n in zip(size, old, strict=True)])
    for axis, (n, new) in enumerate(zip(old, size, strict=True), start=1):
        if n == new:
            continue
        if method is nearest:
            # In float32, as PyTorch: at some sizes it rounds to another pixel.
            index = np.arange(new).astype(np.float32)
            pixel = np.floor(index * np.float32(n / new))
            pixel = np.minimum(pixel.astype(np.int32), n - 1)
            x = jnp.take(x, jnp.asarray(pixel), axis=axis)
            continue
        position = _positions(n, new, aligned=method is linear_aligned)
        hat = np.abs(position[:, None] - np.arange(n)[None, :])
        weights = jnp.asarray(np.maximum(1.0 - hat, 0.0), x.dtype)
        product = jnp.tensordot(weights, x, ((1,), (axis,)), precision="highest")
        x = jnp.moveaxis(product, 0, axis)
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
        y = product(x.astype(self.dtype), kernel.astype(self.dtype))
        y = depth_to_space(y.reshape(*x.shape[:-1], *stride, self.features), stride)
        if self.use_bias:
            zeros = nn.initializers.zeros_init()
            bias = self.param("bias", zeros, (self.features,), jnp.float32)
            y = y + bias.astype(self.dtype).reshape((1,) * (rank + 1) + (-1,))
        return y


def phase_taps(kernel: Array, axis: int, stride: int) -> tuple[Array, tuple[int, int]]:
    """A transposed convolution's taps along an axis, as a convolution of its input.

    With c = (k - 1) // 2, pixel ``stride j + phase`` of the result gets tap
    ``phase + c - stride u`` of pixel j + u, for every u that leaves one of 0 to k - 1.

    Args:
        kernel: ``[..., k, ...]``, and c is the tap that falls on ``stride j``.
        axis: Of the taps.
        stride: Of the axis.

    Returns:
        ``[..., U, stride, ...]``: the tap for each u and phase, 0 where there is none;
        and how many u are below and above 0, which is what the convolution pads.
    """
    size = kernel.shape[axis]
    centre = (size - 1) // 2
    first, last = (centre - size + stride) // stride, -(-centre // stride)
    # By m = c - t = stride u - phase, the taps run on from one u to the next: those of
    # the kernel from c - k + 1 to c, those wanted from stride (first - 1) + 1.
    widths = [(0, 0)] * kernel.ndim
    begin, end = stride * (first - 1) + 1, stride * last
    widths[axis] = (centre - size + 1 - begin, end - centre)
    taps = jnp.pad(jnp.flip(kernel, axis), widths)
    outer, inner = kernel.shape[:axis], kernel.shape[axis + 1 :]
    taps = taps.reshape(*outer, last - first + 1, stride, *inner)
    return jnp.flip(taps, axis + 1), (-first, last)


class WideUpConv(nn.Module):
    """A transposed convolution with a kernel larger than its stride: its taps overlap.

    ``kernel`` has shape ``[*kernel, C, features]`` and its tap t adds pixel x to the
    pixel ``stride x + t - (kernel - 1) // 2``: PyTorch's weight ``[C, features, *t]``
    with ``padding=(kernel - 1) // 2``, moved over by one transpose. The result is cut
    or filled up to ``stride * size``, or, where ``short``, to what PyTorch's
    ``output_padding=0`` gives: ``stride - 1`` less if the kernel is odd.

    Computed as a convolution of the small map to ``prod(stride) * features`` channels
    and an interleave (`phase_taps`): an input dilation is slow on a CPU (a kernel of 3
    and stride 2 on 2 x 64 x 64 x 32 to 16 features, forward and backward, takes 0.31 of
    its time this way), and its kernel gradient gathers the large map over a mesh.

    Reference: Shi et al. 2016, arXiv 1609.07009.
    """

    features: int
    stride: Shape
    kernel: Shape
    short: bool = False
    use_bias: bool = True
    kernel_init: Callable[..., Any] = INITIALISERS["he_normal"]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """``[B, *S, C]`` -> ``[B, *(stride * S), features]``."""
        rank = x.ndim - 2
        shape = (*self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        taps, pads, whole = kernel.astype(self.dtype), [], []
        for axis, stride in enumerate(self.stride):
            taps, (before, after) = phase_taps(taps, 2 * axis, stride)
            size, length = x.shape[1 + axis], self.kernel[axis]
            new = stride * size
            if self.short:
                new += length - 2 * ((length - 1) // 2) - stride
            # One more than the map has where a short one of stride 1 is larger.
            pixels = -(-new // stride)
            pads.append((before, after + pixels - size))
            whole.append(slice(new))
        # [U, stride, U, stride, ..., C, features]: the strides go to the channels.
        last = 2 * rank
        taps = taps.transpose(*range(0, last, 2), last, *range(1, last, 2), last + 1)
        space = "DHW"[3 - rank :]
        y = convolve(
            x.astype(self.dtype),
            taps.reshape(*taps.shape[: rank + 1], -1),
            (1,) * rank,
            pads,
            dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        )
        y = y.reshape(*y.shape[:-1], *self.stride, self.features)
        y = depth_to_space(y, self.stride)[(slice(None), *whole)]
        if self.use_bias:
            zeros = nn.initializers.zeros_init()
            bias = self.param("bias", zeros, (self.features,), jnp.float32)
            y = y + bias.astype(self.dtype).reshape((1,) * (rank + 1) + (-1,))
        return y


def up_convolution(
    features: int, stride: Shape, name: str, kernel: Shape | None = None, **options: Any
) -> nn.Module:
    """`UpConv`, or `WideUpConv` where a kernel is given.

    Args:
        features: Channels that come out.
        stride: The factor of each axis.
        name: Of the module.
        kernel: A number for each axis, or None for the stride's.
        **options: Of the module.
    """
    if kernel is None:
        return UpConv(features=features, stride=stride, name=name, **options)
    return WideUpConv(features, stride, kernel, name=name, **options)


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
    def __call__(self, x: Array, size: Shape | None = None) -> Array:
        return self.kit.up_conv(
            features=self.features, stride=self.stride, name="conv"
        )(x)


class WideTransposed(nn.Module):
    """A transposed convolution with the level's kernel, larger than the stride.

    Attributes:
        short: Whether the last ``stride - 1`` pixels are missing.
        unit: Whether norm and activation follow, in the kit's order.
        bare: Whether they do not, after all: the result are logits.
    """

    features: int
    stride: Shape
    kernel: Shape
    kit: Kit
    short: bool = False
    unit: bool = False
    bare: bool = False
    same_only: ClassVar[bool] = True

    def taps(self, axis: int) -> Taps:
        """At most what a kernel sees of the map repeated to the larger size."""
        return (), (self.kernel[axis],)

    @nn.compact
    def __call__(self, x: Array, size: Shape | None = None) -> Array:
        x = self.kit.up_conv(
            features=self.features,
            stride=self.stride,
            kernel=self.kernel,
            short=self.short,
            name="conv",
        )(x)
        for letter in self.kit.order if self.unit and not self.bare else "":
            if letter != "c":
                layer = self.kit.norm if letter == "n" else self.kit.act
                x = layer(name="norm" if letter == "n" else "act")(x)
        return x


class Interpolated(nn.Module):
    """Interpolation: no parameters, and the channels stay; ``features`` is not read.

    Attributes:
        method: `linear`, `linear_aligned` or `nearest`.
    """

    features: int
    stride: Shape
    kernel: Shape
    kit: Kit
    method: Method = nearest

    def taps(self, axis: int) -> Taps:
        """None that would shrink the map."""
        return (), ()

    @nn.compact
    def __call__(self, x: Array, size: Shape | None = None) -> Array:
        return _grown(x, self.stride, size, self.method)


def _grown(x: Array, stride: Shape, size: Shape | None, method: Method) -> Array:
    return method(x, stride) if size is None else to_size(x, size, method)


class InterpolatedDense(nn.Module):
    """Interpolation and a 1x1 convolution, in either order.

    Attributes:
        method: `linear`, `linear_aligned` or `nearest`.
        dense_first: Whether the convolution comes first, and only if it changes the
            number of channels; its bias is that of up-convolutions.
    """

    features: int
    stride: Shape
    kernel: Shape
    kit: Kit
    method: Method = nearest
    dense_first: bool = False

    def taps(self, axis: int) -> Taps:
        """None that would shrink the map."""
        return (), ()

    @nn.compact
    def __call__(self, x: Array, size: Shape | None = None) -> Array:
        if not self.dense_first:
            x = _grown(x, self.stride, size, self.method)
        elif self.features == x.shape[-1]:
            return _grown(x, self.stride, size, self.method)
        x = self.kit.dense(features=self.features, use_bias=True, name="conv")(x)
        return _grown(x, self.stride, size, self.method) if self.dense_first else x


class InterpolatedUnit(nn.Module):
    """Interpolation, then convolution, norm and activation to ``features`` channels.

    Attributes:
        method: `linear`, `linear_aligned` or `nearest`.
    """

    features: int
    stride: Shape
    kernel: Shape
    kit: Kit
    method: Method = nearest

    def taps(self, axis: int) -> Taps:
        """One convolution of the larger map."""
        return (), (self.kernel[axis],)

    @nn.compact
    def __call__(self, x: Array, size: Shape | None = None) -> Array:
        x = _grown(x, self.stride, size, self.method)
        return self.kit.unit(x, "0", features=self.features, kernel=self.kernel)


class PixelShuffle(nn.Module):
    """A convolution to ``prod(stride) * features`` channels, interleaved.

    Attributes:
        blur: Whether each pixel then becomes the mean of itself and its neighbours
            before it (zeros beyond the border), against checkerboards
            (arXiv 1806.02658); the convolution then owns a bias always.

    Reference: Shi et al. 2016, arXiv 1609.05158.
    """

    features: int
    stride: Shape
    kernel: Shape
    kit: Kit
    blur: bool = False

    def taps(self, axis: int) -> Taps:
        """One convolution of the smaller map."""
        return (self.kernel[axis],), ()

    @nn.compact
    def __call__(self, x: Array, size: Shape | None = None) -> Array:
        y = self.kit.conv(
            features=math.prod(self.stride) * self.features,
            kernel=self.kernel,
            stride=(1,) * len(self.stride),
            name="conv",
            **({"use_bias": True} if self.blur else {}),
        )(x)
        split = (*y.shape[:-1], *self.stride, self.features)
        y = depth_to_space(y.reshape(split), self.stride)
        for axis, factor in enumerate(self.stride if self.blur else (), start=1):
            before = [(int(a == axis) * (factor - 1), 0) for a in range(y.ndim)]
            padded, n = jnp.pad(y, before), y.shape[axis]
            parts = [
                jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(factor)
            ]
            y = sum(parts[1:], parts[0]) * jnp.asarray(1 / factor, y.dtype)
        return y


UPS: dict[str, Factory] = {
    "transpose": Transposed,
    "bilinear": partial(Interpolated, method=linear),
    "bilinear_aligned": partial(Interpolated, method=linear_aligned),
    "nearest": partial(Interpolated, method=nearest),
    "nearest_conv": partial(InterpolatedUnit, method=nearest),
    "pixel_shuffle": PixelShuffle,
    # As some PyTorch nets have them (docs/torch.md says which).
    "transpose_wide": WideTransposed,
    "transpose_wide_unit": partial(WideTransposed, unit=True),
    "transpose_wide_short": partial(WideTransposed, short=True),
    "bilinear_dense": partial(InterpolatedDense, method=linear),
    "dense_bilinear_aligned": partial(
        InterpolatedDense, method=linear_aligned, dense_first=True
    ),
    "pixel_shuffle_blurred": partial(PixelShuffle, blur=True),
}
