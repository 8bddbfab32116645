"""What every part of a net is made of, for any number of spatial axes.

A part never knows whether it trains and never chooses a convolution or a norm: it is
given a `Kit` of factories by the top module (`unet_jax.models.UNet`), which alone
knows. A factory is called with a ``name`` (and the number of features where that
matters), so that the parameter paths are chosen by the part and do not depend on what
is switched on.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unet_jax import sharding
from unet_jax.types import Array, InputError, Pads, Shape, choose

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

PADDINGS = ("same", "valid", "reflect")


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


def shifted(x: Array, axis: int, by: int) -> Array:
    """``x[i + by]`` in place of pixel i of an axis, and zeros where there is none.

    One padding, so that of a map split over devices only border rows move.

    Args:
        x: Any array.
        axis: Of the pixels.
        by: At most the axis' size, of either sign.
    """
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (-by, by, 0)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), widths)


def mirrored(x: Array, pads: Pads) -> Array:
    """`mirror` of a map whose first spatial axis may be split over devices.

    Each row outside is selected from the map shifted by as much as puts its mirror
    image there. `mirror` takes rows out, reverses and joins them, which over a mesh
    sums up and gathers them. Forward and backward with a convolution of 3 x 3, 16
    channels and 4 x 128 x 128, it takes 3 % longer on two CPU cores.

    Args:
        x: ``[B, *S, C]``. Where it has no more rows than are to be added, it is too
            small to be split, and this is `mirror`.
        pads: Pixels (before, after) for each spatial axis.

    Returns:
        ``[B, *(before + S + after), C]``.
    """
    before, after = pads[0]
    if max(before, after) >= x.shape[1]:
        return mirror(x, pads)
    x = mirror(x, ((0, 0), *pads[1:]))
    x = padded = jnp.pad(x, [(0, 0), (before, after), *((0, 0),) * (x.ndim - 2)])
    last = x.shape[1] - 1
    row = np.arange(last + 1).reshape(-1, *(1,) * (x.ndim - 2))[None]
    for i in range(before):
        image = shifted(padded, 1, 2 * (before - i))
        x = jnp.where(jnp.asarray(row == i), image, x)
    for i in range(after):
        image = shifted(padded, 1, -2 * (after - i))
        x = jnp.where(jnp.asarray(row == last - i), image, x)
    return x


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


def per_axis(value: int | Sequence[int], rank: int, what: str) -> Shape:
    """A number for each spatial axis, of one for all or of one each.

    Args:
        value: A whole number, or ``rank`` of them.
        rank: Spatial axes.
        what: What the sentence calls it, such as ``"model.kernels"``.

    Raises:
        InputError: Another number of numbers.
    """
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank:
        raise InputError(
            f"{what} has the entry {value}, {len(values)} numbers for an image of"
            f" {rank} axes: give one number, or one an axis."
        )
    return values


# --- The kit -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kit:
    """The factories that blocks, up-samplings, merges and encoders build with.

    Attributes:
        conv: ``conv(features=, kernel=, stride=, name=)(x)``, a padded or valid
            convolution; ``kernel`` and ``stride`` have a number for each axis.
        dense: ``dense(features=, name=)(x)``, a 1x1 convolution: a product over the
            last axis, which is right under every sharding.
        norm: ``norm(name=)(x)``.
        act: ``act(name=)(x)``; the name is for activations with a parameter.
        excite: ``excite(name=)(x)``: what re-weighs a block's channels, or nothing.
        up_conv: ``up_conv(features=, stride=, name=)(x)``, the paper's up-convolution;
            with ``kernel=``, the transposed convolution whose taps overlap.
        order: In what order `unit` applies ``c``\\ onv, ``n``\\ orm and ``a``\\ ct.
        padding: ``same`` | ``valid`` | ``reflect``.
    """

    conv: Factory
    dense: Factory
    norm: Factory
    act: Factory
    excite: Factory
    up_conv: Factory
    order: str = "cna"
    padding: str = "same"

    def unit(
        self,
        x: Array,
        suffix: str,
        *,
        features: int,
        kernel: Shape,
        stride: Shape | None = None,
        order: str | None = None,
    ) -> Array:
        """Convolution, norm and activation, called ``conv{suffix}`` and so on.

        Args:
            x: ``[B, *S, C]``.
            suffix: The end of the submodules' names.
            features: Channels that come out.
            kernel: Of the convolution, a number for each axis.
            stride: Likewise; None for 1.
            order: Instead of the kit's; any of the letters c, n, a, each once.
        """
        stride = stride or (1,) * len(kernel)
        for letter in order or self.order:
            if letter == "c":
                name = f"conv{suffix}"
                x = self.conv(
                    features=features, kernel=kernel, stride=stride, name=name
                )(x)
            elif letter == "n":
                x = self.norm(name=f"norm{suffix}")(x)
            else:
                x = self.act(name=f"act{suffix}")(x)
        return x


def convolve(
    x: Array, kernel: Array, strides: Sequence[int], padding: Any, **options: Any
) -> Array:
    """`jax.lax.conv_general_dilated`, right on a mesh, and fast for volumes on a CPU.

    On a CPU a 3-D convolution becomes one 2-D convolution: the slices are the batch,
    and the neighbouring slices that a tap sees stand beside each other in the channels.
    Values and gradients are the same. At 4 x 32 x 40 x 32 with 16 channels in and out,
    forward and backward, 82 ms instead of 426 ms on two cores.

    Args:
        x: ``[B, *S, C]``.
        kernel: ``[*taps, C, features]``.
        strides: A number for each axis.
        padding: ``"VALID"``, or (before, after) for each axis.
        **options: As for `jax.lax.conv_general_dilated`; dilations and groups must be
            the default.
    """

    def plain(x: Array, kernel: Array) -> Array:
        # Held on the mesh: where a map does not divide over its devices, XLA takes some
        # of them at a reshape and then adds up the kernel's gradient over all, so that
        # it is 2 or 4 times too large (jax 0.10.1, padding = "valid").
        x = sharding.constrain(x)
        y = jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
        return sharding.constrain(y)

    def folded(x: Array, kernel: Array) -> Array:
        (before, after), *around = ((0, 0),) * 3 if padding == "VALID" else padding
        widths = [(0, 0)] * x.ndim
        widths[1] = (before, after)
        x = jnp.pad(x, widths)
        taps, height, width, channels, features = kernel.shape
        depth = (x.shape[1] - taps) // strides[0] + 1
        last = (depth - 1) * strides[0] + 1
        slices = [
            jax.lax.slice_in_dim(x, tap, tap + last, strides[0], axis=1)
            for tap in range(taps)
        ]
        flat = jnp.concatenate(slices, axis=-1)
        flat = flat.reshape(-1, *flat.shape[2:])
        kernel = jnp.moveaxis(kernel, 0, 2)
        y = jax.lax.conv_general_dilated(
            flat,
            kernel.reshape(height, width, taps * channels, features),
            strides[1:],
            around,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=options.get("precision"),
        )
        return y.reshape(x.shape[0], depth, *y.shape[1:])

    # A map without channels, or smaller than the kernel, has nothing to fold; and one
    # whose slices lie on several devices would be gathered to make them a batch.
    before, after = (0, 0) if padding == "VALID" else padding[0]
    split = sharding.parts("space") > 1
    if (
        x.ndim < 5
        or split
        or not x.size
        or x.shape[1] + before + after < kernel.shape[0]
    ):
        return plain(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=folded, default=plain)


def conv_factory(
    *,
    padding: str,
    use_bias: bool,
    init: Callable[..., Any],
    dtype: Any,
) -> Factory:
    """A factory of convolutions: ``factory(features=, kernel=, stride=, name=)(x)``.

    ``padding`` and ``use_bias`` may be given to the factory, too.

    Args:
        padding: ``same``: zeros around the image, half a kernel wide; ``reflect``: the
            image's own mirror image there; ``valid``: none.
        use_bias: Whether the convolution owns a bias.
        init: The kernels' initialiser.
        dtype: The type to compute in; parameters stay float32.
    """
    choose(PADDINGS, padding, "model.padding =")

    def make(
        features: int,
        kernel: Shape,
        stride: Shape,
        name: str,
        padding: str = padding,
        use_bias: bool = use_bias,
    ) -> Callable[[Array], Array]:
        conv = partial(
            nn.Conv,
            features=features,
            kernel_size=kernel,
            strides=stride,
            use_bias=use_bias,
            kernel_init=init,
            dtype=dtype,
            name=name,
        )
        if padding == "reflect":
            pads = tuple(((k - 1) // 2, k // 2) for k in kernel)
            unpadded = conv(padding="VALID", conv_general_dilated=convolve)
            return lambda x: unpadded(mirrored(x, pads))
        # Explicit widths: XLA's 'SAME' pads a strided convolution after the image only.
        widths = tuple((k // 2, k // 2) for k in kernel)
        return conv(
            padding=widths if padding == "same" else "VALID",
            conv_general_dilated=convolve,
        )

    return make


def act_factory(kind: str, *, slope: float | None = None) -> Factory:
    """A factory of activations: ``factory(name=)(x)``.

    Args:
        kind: A name of `ACTIVATIONS`, or ``prelu``: a slope for negative inputs that
            is learnt, one a layer, as PyTorch's ``PReLU()``.
        slope: Of ``leaky_relu`` (0.01 by default), or where ``prelu`` starts (0.25).

    Raises:
        InputError: An unknown name, or a slope for an activation without one.
    """
    function = choose({**ACTIVATIONS, "prelu": None}, kind, "model.act =")
    if slope is not None and kind not in ("leaky_relu", "prelu"):
        raise InputError(
            f"model.act_slope = {slope} is for leaky_relu and prelu, and model.act ="
            f" {kind!r}: leave it out."
        )
    if kind == "leaky_relu" and slope is not None:
        function = partial(nn.leaky_relu, negative_slope=slope)

    def make(name: str) -> Callable[[Array], Array]:
        if kind == "prelu":
            start = 0.25 if slope is None else slope
            prelu = nn.PReLU(negative_slope_init=start, name=name)
            return lambda x: prelu(x).astype(x.dtype)
        return function

    return make


def mean_over(x: Array, axes: Sequence[int]) -> Array:
    """The mean over axes that stay with size 1, one axis after the other.

    XLA on a CPU adds up one value after the other, which costs digits in float32: over
    48 x 96 x 96 pixels at once, a group norm of flax is off by 2.5e-4 of its largest
    value, and this way by 1.4e-7. It takes no longer.

    Args:
        x: Any array.
        axes: Of the mean.
    """
    for axis in sorted(axes, reverse=True):
        x = jnp.mean(x, axis, keepdims=True)
    return x


class GroupedNorm(nn.Module):
    """Each example normalised by itself, over space and the channels of a group.

    Epsilon is 1e-5. The parameters are those of ``flax.linen.GroupNorm`` and
    ``InstanceNorm``; `mean_over` says why it is not one of them.

    Attributes:
        groups: How many; None for as many as channels (instance norm).
        affine: Whether a scale and a bias for each channel follow.
    """

    groups: int | None = None
    affine: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """``[B, *S, C]`` in float32 or float64 -> the same."""
        *outer, width = x.shape
        groups = self.groups or width
        space = tuple(range(1, x.ndim - 1))
        y = x if groups == width else x.reshape(*outer, groups, width // groups)
        axes = space if groups == width else (*space, y.ndim - 1)
        y = y - mean_over(y, axes)
        y = y * jax.lax.rsqrt(mean_over(jnp.square(y), axes) + 1e-5)
        y = y.reshape(x.shape)
        if not self.affine:
            return y
        wide = (1,) * (x.ndim - 1) + (width,)
        scale = self.param("scale", nn.initializers.ones_init(), (width,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (width,), jnp.float32)
        return y * scale.astype(y.dtype).reshape(wide) + bias.astype(y.dtype).reshape(
            wide
        )


class UnbiasedBatchNorm(nn.Module):
    """Batch normalisation that keeps the unbiased variance, as PyTorch does.

    Both normalise by the biased variance of the batch. PyTorch's running variance,
    which evaluation uses, is of ``n / (n - 1)`` times that, n being the values of a
    channel in the batch: 4 % more at 24 values, as deep in a net on small crops.
    Epsilon is 1e-5 and 0.9 of the old statistics is kept.

    Attributes:
        use_running_average: Whether to normalise by the running statistics.
        axis_name: The axis of a `jax.pmap` whose devices share the statistics.
    """

    use_running_average: bool
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """``[..., C]`` in float32 or float64 -> the same."""
        zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
        width = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, width, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, width, jnp.float32)
        scale = self.param("scale", ones, width, jnp.float32)
        bias = self.param("bias", zeros, width, jnp.float32)
        if self.use_running_average:
            centre, spread = mean.value, var.value
        else:
            axes = tuple(range(x.ndim - 1))
            count = x.size // x.shape[-1]
            shared = None if self.is_initializing() else self.axis_name

            def mean_of(x: Array) -> Array:
                own = mean_over(x, axes).reshape(width)
                return own if shared is None else jax.lax.pmean(own, shared)

            if shared is not None:
                count *= jax.lax.axis_size(shared)
            centre = mean_of(x)
            spread = mean_of(jnp.square(x - self._wide(centre, x)))
            if not self.is_initializing():
                unbiased = spread * (count / max(count - 1, 1))
                mean.value = 0.9 * mean.value + 0.1 * centre
                var.value = 0.9 * var.value + 0.1 * unbiased
        factor = jax.lax.rsqrt(spread + 1e-5) * scale
        return (x - self._wide(centre, x)) * self._wide(factor, x) + self._wide(bias, x)

    @nn.nowrap
    def _wide(self, values: Array, x: Array) -> Array:
        return values.reshape((1,) * (x.ndim - 1) + values.shape)


def norm_factory(
    kind: str, *, train: bool, groups: int = 8, axis_name: str | None = None
) -> Factory:
    """A factory of normalisation layers: ``factory(name=...)(x)``.

    Statistics are taken in float32 and the result returned in the type of ``x``.
    Epsilon is 1e-5 and batch statistics keep 0.9 of the old, as in PyTorch.

    Args:
        kind: ``batch`` | ``instance`` | ``group`` | ``none``. ``batch_unbiased``: as
            PyTorch keeps its running variance (`UnbiasedBatchNorm`);
            ``instance_plain``: without scale and bias, as PyTorch's default.
        train: Whether batch normalisation takes the batch's statistics.
        groups: Groups of ``group``; of a layer whose width they do not divide, their
            greatest common divisor, and of a narrower one 1.
        axis_name: The axis of a `jax.pmap` whose devices share batch statistics. Under
            ``jit`` on a mesh they always do, and there is none.

    Returns:
        The factory. ``none`` makes layers that do nothing and own nothing.
    """

    modules: dict[str, Callable[[str, int], nn.Module] | None] = {
        "batch": lambda name, _: nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            use_fast_variance=False,
            axis_name=axis_name,
            name=name,
        ),
        "batch_unbiased": lambda name, _: UnbiasedBatchNorm(
            use_running_average=not train, axis_name=axis_name, name=name
        ),
        "instance": lambda name, _: GroupedNorm(name=name),
        "instance_plain": lambda name, _: GroupedNorm(affine=False, name=name),
        # The gcd, for a width inside a block that the groups do not divide.
        "group": lambda name, width: GroupedNorm(
            math.gcd(groups, width) if width >= groups else 1, name=name
        ),
        "none": None,
    }
    module = choose(modules, kind, "model.norm =")

    def make(name: str) -> Callable[[Array], Array]:
        layers: list[Any] = []  # made once: a recurrent block calls it several times

        def apply(x: Array) -> Array:
            if module is None:
                return x
            if not layers:
                layers.append(module(name, x.shape[-1]))
            return layers[0](at_least_float32(x)).astype(x.dtype)

        return apply

    return make


def at_least_float32(x: Array) -> Array:
    """``x`` in float32, or in float64 if that is what it is in."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)
