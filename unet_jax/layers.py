"""What every part of a net is made of, for any number of spatial axes.

A part never knows whether it trains and never chooses a convolution or a norm: it is
given a `Kit` of factories by the top module (`unet_jax.models.UNet`), which alone
knows. A factory is called with a ``name`` (and the number of features where that
matters), so that the parameter paths are chosen by the part and do not depend on what
is switched on.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unet_jax.convolution import convolve
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
