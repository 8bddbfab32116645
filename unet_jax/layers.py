"""The parts that encoders and decoders are made of, for any number of spatial axes.

A block never knows whether it trains: it is given ``conv``, ``norm`` and ``dropout``
factories by the top module (`unet_jax.models.UNet`), which alone knows. A factory is
called with a ``name`` (and the number of features where that matters), so that the
parameter paths are chosen here and do not depend on what is switched on.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unet_jax.types import Array, Pads, choose

Factory = Callable[..., Any]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "leaky_relu": partial(nn.leaky_relu, negative_slope=0.01),
    "elu": nn.elu,
    "gelu": nn.gelu,
    "silu": nn.silu,
}

INITIALISERS: dict[str, Callable[..., Any]] = {
    # The paper's: Gaussian of deviation sqrt(2/N), N = the inputs of a neuron (sec. 3).
    "he_normal": nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
    # PyTorch's kaiming_normal_(mode="fan_out").
    "he_normal_fan_out": nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    "he_uniform": nn.initializers.variance_scaling(2.0, "fan_in", "uniform"),
    "glorot_uniform": nn.initializers.glorot_uniform(),
    # PyTorch's default: kaiming_uniform_(a=sqrt(5)), that is variance 1 / (3 fan_in).
    "torch": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
}


# --- Geometry ------------------------------------------------------------------------


def crop(x: Any, size: Sequence[int], *, axis: int = 1) -> Any:
    """Cuts the centre out of the spatial axes.

    Args:
        x: ``[..., *S, ...]``, JAX or NumPy, the first spatial axis being ``axis``.
        size: The spatial size to keep, at most the size of ``x``. Of an odd surplus the
            smaller half is cut in front: it begins at ``(old - new) // 2``.
        axis: Where the spatial axes begin.

    Returns:
        ``x`` with spatial size ``size``.
    """
    index: list[slice] = [slice(None)] * x.ndim
    for a, new in enumerate(size, start=axis):
        begin = (x.shape[a] - new) // 2
        if begin < 0:
            raise ValueError(f"cannot crop axis {a} of {x.shape} to {new}")
        index[a] = slice(begin, begin + new)
    return x[tuple(index)]


def mirror(x: Any, pads: Pads, *, axis: int = 1) -> Any:
    """Extends the spatial axes by their mirror image, as the paper does (fig. 2).

    The outermost pixel is not repeated; a pad wider than the image mirrors back and
    forth, and an axis of size 1 repeats its one pixel.

    Args:
        x: ``[..., *S, ...]``, JAX or NumPy, the first spatial axis being ``axis``.
        pads: Pixels (before, after) for each spatial axis.
        axis: Where the spatial axes begin.

    Returns:
        The longer array, of the kind that came in.
    """
    if not any(before or after for before, after in pads):
        return x
    after_axes = x.ndim - axis - len(pads)
    widths = ((0, 0),) * axis + tuple(pads) + ((0, 0),) * after_axes
    pad = np.pad if isinstance(x, np.ndarray) else jnp.pad
    return pad(x, widths, mode="reflect")


def align(x: Array, size: Sequence[int]) -> Array:
    """Brings a map to ``size``: zeros where it is smaller, its centre where larger.

    A missing row or column is split as ``diff // 2`` before and the rest after, as
    PyTorch U-Nets do, so that odd sizes give the same numbers.

    Args:
        x: ``[B, *S, C]``.
        size: The spatial size wanted.

    Returns:
        ``[B, *size, C]``.
    """
    diffs = [max(new - old, 0) for new, old in zip(size, x.shape[1:-1], strict=True)]
    if any(diffs):
        spatial = [(d // 2, d - d // 2) for d in diffs]
        x = jnp.pad(x, [(0, 0), *spatial, (0, 0)])
    return crop(x, size)


# --- Resampling ----------------------------------------------------------------------


def max_pool(x: Array) -> Array:
    """Maximum over windows of 2, stride 2; an odd last row or column is dropped.

    Of equal maxima the first (in row-major order) receives the gradient, as in PyTorch.
    Written as comparisons of slices because XLA's select-and-scatter, the gradient of
    ``reduce_window``, is slow on CPU: conv, pool, conv at 128 x 128 x 32 and batch 4
    takes 9 ms forward and backward this way and 27 ms with ``nn.max_pool``.

    Args:
        x: ``[B, *S, C]``. An axis of size 1 is left as it is.

    Returns:
        ``[B, *(S // 2), C]``.
    """
    pooled = [size // 2 if size > 1 else 1 for size in x.shape[1:-1]]
    window = [2 if size > 1 else 1 for size in x.shape[1:-1]]
    whole = tuple(slice(0, p * w) for p, w in zip(pooled, window, strict=True))
    x = x[(slice(None), *whole)]
    split = [n for pair in zip(pooled, window, strict=True) for n in pair]
    x = x.reshape(x.shape[0], *split, x.shape[-1])
    best = None
    for offset in np.ndindex(*window):
        index = [i for o in offset for i in (slice(None), o)]
        value = x[(slice(None), *index)]
        if best is None:
            best = value
        else:  # `value != value` lets a NaN through, as a maximum must
            best = jnp.where((value > best) | (value != value), value, best)
    assert best is not None
    return best


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


def double_linear(x: Array) -> Array:
    """Linear up-sampling by 2 with half-pixel centres (``align_corners=False``).

    Each output is 3/4 of its own pixel and 1/4 of the neighbour on its side; beyond the
    border the border pixel counts as its own neighbour.

    Args:
        x: ``[B, *S, C]``.

    Returns:
        ``[B, *(2 S), C]``.
    """
    for axis in range(1, x.ndim - 1):
        size = x.shape[axis]
        take = partial(jax.lax.slice_in_dim, x, axis=axis)
        before = jnp.concatenate([take(0, 1), take(0, size - 1)], axis)
        after = jnp.concatenate([take(1, size), take(size - 1, size)], axis)
        pair = jnp.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis + 1)
        x = pair.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
    return x


def double_linear_aligned(x: Array) -> Array:
    """Linear up-sampling by 2 with the corner pixels kept (``align_corners=True``).

    Args:
        x: ``[B, *S, C]``.

    Returns:
        ``[B, *(2 S), C]``.
    """
    for axis in range(1, x.ndim - 1):
        size = x.shape[axis]
        position = np.arange(2 * size) * ((size - 1) / (2 * size - 1))
        hat = np.abs(position[:, None] - np.arange(size)[None, :])
        weights = jnp.asarray(np.maximum(1.0 - hat, 0.0), x.dtype)
        product = jnp.tensordot(weights, x, ((1,), (axis,)), precision="highest")
        x = jnp.moveaxis(product, 0, axis)
    return x


def double_nearest(x: Array) -> Array:
    """Repeats every pixel twice along each spatial axis: ``[B, *(2 S), C]``."""
    for axis in range(1, x.ndim - 1):
        x = jnp.repeat(x, 2, axis=axis)
    return x


class UpConv(nn.Module):
    """The paper's 2x2 "up-convolution" of stride 2: no two taps overlap.

    Hence it is one matrix product to ``2^rank * features`` channels and an interleave,
    which is exact and avoids the input dilation that makes ``nn.ConvTranspose`` slow
    on every backend. ``kernel`` has shape ``[*stride, C, features]`` and its tap
    ``(i, j)`` fills the pixels ``(2 y + i, 2 x + j)``: PyTorch's weight
    ``[C, features, i, j]`` moves over by one transpose.

    Reference: Ronneberger et al. 2015, arXiv 1505.04597, section 2.
    """

    features: int
    use_bias: bool = True
    kernel_init: Callable[..., Any] = INITIALISERS["he_normal"]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        rank = x.ndim - 2
        stride = (2,) * rank
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


class Upsample(nn.Module):
    """Doubles the spatial size, by a learnt up-convolution or by interpolation.

    Interpolation has no parameters and keeps the channels; the block after it reduces
    them. ``features`` matters for ``transpose`` only.

    Attributes:
        features: Channels that come out of an up-convolution.
        method: ``transpose``, ``bilinear`` (linear along every axis) or ``nearest``.
        align_corners: For ``bilinear``: whether the corner pixels keep their place.
        up_conv: The factory of the up-convolution.
    """

    features: int
    method: str = "transpose"
    align_corners: bool = False
    up_conv: Factory = UpConv

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.method == "transpose":
            return self.up_conv(features=self.features, name="conv")(x)
        linear = double_linear_aligned if self.align_corners else double_linear
        methods = {"bilinear": linear, "nearest": double_nearest, "transpose": None}
        return choose(methods, self.method, "up =")(x)


# --- Blocks --------------------------------------------------------------------------


def norm_factory(kind: str, *, train: bool, groups: int = 8) -> Factory:
    """A factory of normalisation layers: ``factory(name=...)(x)``.

    Statistics are taken in float32 and the result returned in the type of ``x``.
    Epsilon is 1e-5 and batch statistics keep 0.9 of the old, as in PyTorch.

    Args:
        kind: ``batch`` | ``instance`` | ``group`` | ``none``.
        train: Whether batch normalisation takes the batch's statistics.
        groups: Groups of ``group``; they must divide the features of every layer.

    Returns:
        The factory. ``none`` makes layers that do nothing and own nothing.
    """

    def make(name: str) -> Callable[[Array], Array]:
        shared: dict[str, Any] = {
            "epsilon": 1e-5,
            "use_fast_variance": False,
            "dtype": jnp.float32,
            "name": name,
        }
        modules: dict[str, Callable[[], nn.Module] | None] = {
            "batch": lambda: nn.BatchNorm(
                use_running_average=not train, momentum=0.9, **shared
            ),
            "instance": lambda: nn.InstanceNorm(**shared),
            "group": lambda: nn.GroupNorm(num_groups=groups, **shared),
            "none": None,
        }
        module = choose(modules, kind, "norm =")

        def apply(x: Array) -> Array:
            if module is None:
                return x
            return module()(x.astype(jnp.float32)).astype(x.dtype)

        return apply

    return make


class ConvBlock(nn.Module):
    """Convolution, normalisation, activation; twice, as in the paper.

    Attributes:
        features: Channels that come out.
        conv: Factory of 3x3 convolutions.
        norm: Factory of normalisation layers (`norm_factory`).
        act: The activation function.
        convs: How many convolutions.
        mid_features: Channels between them; None means ``features``.
    """

    features: int
    conv: Factory
    norm: Factory
    act: Callable[[Array], Array]
    convs: int = 2
    mid_features: int | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.convs):
            last = i == self.convs - 1
            features = self.features if last else self.mid_features or self.features
            x = self.conv(features=features, name=f"conv{i}")(x)
            x = self.act(self.norm(name=f"norm{i}")(x))
        return x


def conv_factory(
    *,
    rank: int,
    padding: str,
    use_bias: bool,
    init: Callable[..., Any],
    dtype: Any,
) -> Factory:
    """A factory of 3x3 (3x3x3) convolutions: ``factory(features=..., name=...)(x)``.

    Args:
        rank: Spatial axes.
        padding: ``same`` (one pixel of zeros a side) or ``valid`` (none).
        use_bias: Whether the convolution owns a bias.
        init: The kernels' initialiser.
        dtype: The type to compute in; parameters stay float32.
    """
    width = choose({"same": 1, "valid": 0}, padding, "padding =")
    return partial(
        nn.Conv,
        kernel_size=(3,) * rank,
        padding=((width, width),) * rank,
        use_bias=use_bias,
        kernel_init=init,
        dtype=dtype,
    )
