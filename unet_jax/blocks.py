"""The blocks of a level, and what re-weighs their channels.

`BLOCKS` and `EXCITES` name them. A block is a module with the fields ``features``,
``kernel``, ``stride``, ``first`` and ``kit`` that takes ``[B, *S, C]`` to
``[B, *S', features]``, and a method ``taps(axis)``: the kernel sizes of its
convolutions along an axis, in order, of which sizes and receptive fields are computed
(`unet_jax.geometry`). A new block is a class and its entry in the table.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from unet_jax.layers import Factory, Kit, at_least_float32, crop
from unet_jax.types import Array, Shape


class ConvBlock(nn.Module):
    """Convolution, normalisation, activation; twice, as in the paper.

    Attributes:
        features: Channels that come out.
        kernel: Of the convolutions, a number for each axis.
        kit: What to build with.
        stride: Of the first convolution; None for 1.
        first: Whether this is the net's first block; of no matter here.
        convs: How many convolutions.
        mid: Channels between them. ``out``: as many as come out. ``half_out``: as in
            the 3-D U-Net, which doubles channels "already before max pooling"
            (1606.06650, section 2). ``half_in``: half of what comes in, for a decoder
            whose up-sampling keeps the channels.

    Reference: Ronneberger et al. 2015, arXiv 1505.04597, section 2.
    """

    features: int
    kernel: Shape
    kit: Kit
    stride: Shape | None = None
    first: bool = False
    convs: int = 2
    mid: str = "out"
    fixed_order: ClassVar[str] = ""

    def taps(self, axis: int) -> tuple[int, ...]:
        """Kernel sizes along an axis, in order."""
        return (self.kernel[axis],) * self.convs

    @nn.compact
    def __call__(self, x: Array) -> Array:
        widths = {
            "out": self.features,
            "half_out": max(self.features // 2, 1),
            "half_in": max(x.shape[-1] // 2, 1),
        }
        for i in range(self.convs):
            x = self.kit.unit(
                x,
                str(i),
                features=self.features if i == self.convs - 1 else widths[self.mid],
                kernel=self.kernel,
                stride=self.stride if i == 0 else None,
            )
        return self.kit.excite(name="excite")(x)


def shortcut(x: Array, kit: Kit, features: int, stride: Shape | None) -> Array:
    """The other way around a residual block: ``x``, projected where it must be.

    Args:
        x: ``[B, *S, C]``.
        kit: What to build with.
        features: Channels that come out; ``x`` itself if it has them and no stride.
        stride: Of the block.
    """
    strided = stride is not None and max(stride) > 1
    if strided:
        x = x[(slice(None), *(slice(None, None, s) for s in stride or ()))]
    if strided or x.shape[-1] != features:
        x = kit.dense(features=features, name="shortcut")(x)
    return x


class ResidualBlock(nn.Module):
    """Two convolutions added to a shortcut, then the activation (post-activation).

    With valid padding the shortcut is centre-cropped. The projection, where channels
    or size change, is a 1x1 convolution with the kit's norm, as in ResNet.

    Reference: He et al. 2015, arXiv 1512.03385, figure 2 and section 3.3 (option B).
    """

    features: int
    kernel: Shape
    kit: Kit
    stride: Shape | None = None
    first: bool = False
    fixed_order: ClassVar[str] = "cna, then cn and a after the sum"

    def taps(self, axis: int) -> tuple[int, ...]:
        """Kernel sizes along an axis, in order."""
        return (self.kernel[axis],) * 2

    @nn.compact
    def __call__(self, x: Array) -> Array:
        unit = partial(self.kit.unit, features=self.features, kernel=self.kernel)
        y = unit(x, "0", stride=self.stride, order="cna")
        y = unit(y, "1", order="cn")
        y = self.kit.excite(name="excite")(y)
        beside = shortcut(x, self.kit, self.features, self.stride)
        if beside is not x:
            beside = self.kit.norm(name="shortcut_norm")(beside)
        return self.kit.act(name="act1")(crop(beside, y.shape[1:-1]) + y)


class PreactivationBlock(nn.Module):
    """The residual unit of ResUNet: twice norm, activation, convolution; plus shortcut.

    The net's first unit begins with the convolution, without norm and activation.

    Reference: Zhang et al. 2017, arXiv 1711.10684, section II and figure 2; He et al.
    2016, arXiv 1603.05027 (full pre-activation).
    """

    features: int
    kernel: Shape
    kit: Kit
    stride: Shape | None = None
    first: bool = False
    fixed_order: ClassVar[str] = "nac"

    def taps(self, axis: int) -> tuple[int, ...]:
        """Kernel sizes along an axis, in order."""
        return (self.kernel[axis],) * 2

    @nn.compact
    def __call__(self, x: Array) -> Array:
        unit = partial(self.kit.unit, features=self.features, kernel=self.kernel)
        y = unit(x, "0", stride=self.stride, order="c" if self.first else "nac")
        y = unit(y, "1", order="nac")
        y = self.kit.excite(name="excite")(y)
        beside = shortcut(x, self.kit, self.features, self.stride)
        return crop(beside, y.shape[1:-1]) + y


class RecurrentBlock(nn.Module):
    """The recurrent residual unit of R2U-Net.

    A 1x1 convolution ``x``, then twice a recurrent convolution: one set of weights
    that is applied ``steps + 1`` times, each time to its input plus its last output;
    and ``x`` is added. With valid padding what is added is centre-cropped. With batch
    norm one set of running statistics serves all applications, which differ, so that
    evaluation suffers at first (Dice 0.17 after 100 steps of ``configs/r2unet.py``,
    0.85 with group norm).

    Attributes:
        steps: How often a convolution is repeated; 2 in the paper.

    Reference: Alom et al. 2018, arXiv 1802.06955, section III and figure 4.
    """

    features: int
    kernel: Shape
    kit: Kit
    stride: Shape | None = None
    first: bool = False
    steps: int = 2
    fixed_order: ClassVar[str] = "cna"

    def taps(self, axis: int) -> tuple[int, ...]:
        """Kernel sizes along an axis, in order."""
        return (1, *(self.kernel[axis],) * (2 * (self.steps + 1)))

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.stride is not None:
            x = x[(slice(None), *(slice(None, None, s) for s in self.stride))]
        x = self.kit.dense(features=self.features, name="project")(x)
        y = x
        for i in range(2):
            conv = self.kit.conv(
                features=self.features,
                kernel=self.kernel,
                stride=(1,) * len(self.kernel),
                name=f"conv{i}",
            )
            norm = self.kit.norm(name=f"norm{i}")
            act = self.kit.act(name=f"act{i}")
            given, y = y, act(norm(conv(y)))
            for _ in range(self.steps):
                y = act(norm(conv(crop(given, y.shape[1:-1]) + y)))
        y = self.kit.excite(name="excite")(y)
        return crop(x, y.shape[1:-1]) + y


BLOCKS: dict[str, Factory] = {
    "plain": ConvBlock,
    "widening": partial(ConvBlock, mid="half_out"),
    "narrowing": partial(ConvBlock, mid="half_in"),
    "residual": ResidualBlock,
    "preactivation": PreactivationBlock,
    "recurrent": RecurrentBlock,
}


# --- What re-weighs channels ---------------------------------------------------------


class SqueezeExcite(nn.Module):
    """Weighs channels by a gate that sees the mean of each.

    Attributes:
        dense: Factory of 1x1 convolutions.
        reduction: How many times fewer channels the gate has inside.

    Reference: Hu et al. 2017, arXiv 1709.01507, section 3.
    """

    dense: Factory
    reduction: int = 16

    @nn.compact
    def __call__(self, x: Array) -> Array:
        axes = tuple(range(1, x.ndim - 1))
        inner = max(x.shape[-1] // self.reduction, 1)
        squeezed = jnp.mean(at_least_float32(x), axes)
        gate = self.dense(features=inner, use_bias=True, name="squeeze")(
            squeezed.astype(x.dtype)
        )
        gate = self.dense(features=x.shape[-1], use_bias=True, name="excite")(
            nn.relu(gate)
        )
        return x * nn.sigmoid(gate).reshape(x.shape[0], *(1,) * len(axes), -1)


class SpatialChannelExcite(nn.Module):
    """The sum of a channel gate (`SqueezeExcite`) and a gate for each pixel.

    Reference: Roy et al. 2018, arXiv 1803.02579 (scSE).
    """

    dense: Factory
    reduction: int = 16

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = SqueezeExcite(self.dense, self.reduction, name="channel")(x)
        gate = self.dense(features=1, use_bias=True, name="spatial")(x)
        return channels + x * nn.sigmoid(gate)


EXCITES: dict[str, Callable[..., nn.Module] | None] = {
    "none": None,
    "se": SqueezeExcite,
    "scse": SpatialChannelExcite,
}


def excite_factory(choice: Callable[..., nn.Module] | None, dense: Factory) -> Factory:
    """A factory ``factory(name=)(x)`` of what `EXCITES` has, or of the identity."""

    def make(name: str) -> Callable[[Array], Array]:
        return choice(dense=dense, name=name) if choice else lambda x: x

    return make
