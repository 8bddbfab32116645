"""The blocks of a level, and what re-weighs their channels.

`BLOCKS` and `EXCITES` name them. A block is a module with the fields ``features``,
``kernel``, ``stride``, ``first`` and ``kit`` that takes ``[B, *S, C]`` to
``[B, *S', features]``, and a method ``taps(axis)``: the kernel sizes of its
convolutions along an axis, in order, of which sizes and receptive fields are computed
(`unet_jax.geometry`). A new block is a class and its entry in the table.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from unet_jax.layers import (
    Factory,
    Kit,
    act_factory,
    align,
    crop,
)
from unet_jax.norms import at_least_float32, norm_factory
from unet_jax.resample import average_pool
from unet_jax.types import Array, Shape


class ConvBlock(nn.Module):
    """Convolution, normalisation, activation; twice, as in the paper.

    Attributes:
        features: Channels that come out.
        kernel: Of the convolutions, a number for each axis.
        kit: What to build with.
        stride: Of the first convolution; None for 1.
        first: Whether this is the net's first block; of no matter here.
        units: How many convolutions.
        mid: Channels between them. ``out``: as many as come out. ``half_out``: as in
            the 3-D U-Net, which doubles channels "already before max pooling"
            (1606.06650, section 2). ``half_in``: half of what comes in, for a decoder
            whose up-sampling keeps the channels. ``half_out_at_least_in``: as
            ``half_out``, but never fewer than come in.
        excite_input: Whether what comes in is re-weighed, too (the decoder of SMP).
        skipless: Whether no skip comes in; then that gate is built, as it is in SMP,
            and not used.
        norm: Instead of the kit's, a name as for `unet_jax.norms.norm_factory`.
        act: Instead of the kit's, a name as for `unet_jax.layers.act_factory`.
        excite: Instead of the kit's, a name of `EXCITES`.

    Reference: Ronneberger et al. 2015, arXiv 1505.04597, section 2.
    """

    features: int
    kernel: Shape
    kit: Kit
    stride: Shape | None = None
    first: bool = False
    units: int = 2
    mid: str = "out"
    excite_input: bool = False
    skipless: bool = False
    norm: str | None = None
    act: str | None = None
    excite: str | None = None
    fixed_order: ClassVar[str] = ""

    def taps(self, axis: int) -> tuple[int, ...]:
        """Kernel sizes along an axis, in order."""
        return (self.kernel[axis],) * self.units

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kit = self.kit
        if self.norm is not None:  # `train` matters to batch norm only
            norm = norm_factory(self.norm, train=False)
            kit = dataclasses.replace(kit, norm=norm)
        if self.act is not None:
            kit = dataclasses.replace(kit, act=act_factory(self.act))
        if self.excite is not None:
            excite = excite_factory(EXCITES[self.excite], kit.dense)
            kit = dataclasses.replace(kit, excite=excite)
        if self.excite_input:
            excited = kit.excite(name="excite_input")(x)
            x = x if self.skipless else excited
        half = max(self.features // 2, 1)
        widths = {
            "out": self.features,
            "half_out": half,
            "half_out_at_least_in": max(half, x.shape[-1]),
            "half_in": max(x.shape[-1] // 2, 1),
        }
        for i in range(self.units):
            x = kit.unit(
                x,
                str(i),
                features=self.features if i == self.units - 1 else widths[self.mid],
                kernel=self.kernel,
                stride=self.stride if i == 0 else None,
            )
        return kit.excite(name="excite")(x)


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


class ProjectedResidualBlock(nn.Module):
    """Two convolutions added to their input, then the activation.

    Unlike `ResidualBlock`, the projection (a 1x1 convolution with bias, without norm,
    where channels change) comes before everything, and what re-weighs channels comes
    last. As in pytorch-3dunet; for same padding and without strides.

    Attributes:
        slope: For negative values after the sum, or None for the kit's activation.

    Reference: Lee et al. 2017, arXiv 1706.00120, figure 1.
    """

    features: int
    kernel: Shape
    kit: Kit
    stride: Shape | None = None
    first: bool = False
    slope: float | None = None
    fixed_order: ClassVar[str] = ""

    def taps(self, axis: int) -> tuple[int, ...]:
        """Kernel sizes along an axis, in order."""
        return (self.kernel[axis],) * 2

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kit, features = self.kit, self.features
        unit = partial(kit.unit, features=features, kernel=self.kernel)
        if x.shape[-1] != features:
            x = kit.dense(features=features, use_bias=True, name="project")(x)
        y = unit(x, "0")
        y = unit(y, "1", order=kit.order.replace("a", ""))
        act = kit.act
        if self.slope is not None:
            act = act_factory("leaky_relu", slope=self.slope)
        y = act(name="act1")(crop(x, y.shape[1:-1]) + y)
        return kit.excite(name="excite")(y)


class ResidualUnits(nn.Module):
    """Units of convolution, norm and activation, added to their input; nothing after.

    The other way around is ``x`` itself, a 1x1 convolution where channels change, or
    one with the block's kernel and stride. As in MONAI's ``UNet``.

    Attributes:
        units: How many; of none, ``x`` comes out.
        bare: Whether the last one is the convolution alone, whose result are logits.

    Reference: Kerfoot et al. 2019, doi 10.1007/978-3-030-12029-0_40, figure 1.
    """

    features: int
    kernel: Shape
    kit: Kit
    stride: Shape | None = None
    first: bool = False
    units: int = 2
    bare: bool = False
    fixed_order: ClassVar[str] = ""

    def taps(self, axis: int) -> tuple[int, ...]:
        """Kernel sizes along an axis, in order."""
        return (self.kernel[axis],) * self.units

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if not self.units:
            return x
        y = x
        for i in range(self.units):
            y = self.kit.unit(
                y,
                str(i),
                features=self.features,
                kernel=self.kernel,
                stride=self.stride if i == 0 else None,
                order="c" if self.bare and i == self.units - 1 else None,
            )
        if self.stride is not None and max(self.stride) > 1:
            x = self.kit.conv(
                features=self.features,
                kernel=self.kernel,
                stride=self.stride,
                name="shortcut",
            )(x)
        else:
            x = shortcut(x, self.kit, self.features, None)
        return crop(x, y.shape[1:-1]) + y


class PooledResidualBlock(nn.Module):
    """`ResidualBlock` whose shortcut pools and projects separately (ResNet-D).

    A stride of the shortcut is mean pooling; a 1x1 convolution without bias, with the
    kit's norm, follows only where channels change.

    Reference: He et al. 2018, arXiv 1812.01187, figure 2c; the encoder of nnU-Net
    "ResEnc" (Isensee et al. 2024, arXiv 2404.09556).
    """

    features: int
    kernel: Shape
    kit: Kit
    stride: Shape | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kit = self.kit
        unit = partial(kit.unit, features=self.features, kernel=self.kernel)
        y = unit(x, "0", stride=self.stride, order="cna")
        y = unit(y, "1", order="cn")
        if self.stride is not None and max(self.stride) > 1:
            x = average_pool(x, self.stride)
        x = align(x, y.shape[1:-1])
        if x.shape[-1] != self.features:
            project = kit.dense(features=self.features, use_bias=False, name="shortcut")
            x = kit.norm(name="shortcut_norm")(project(x))
        return kit.act(name="act1")(x + kit.excite(name="excite")(y))


class ResidualStage(nn.Module):
    """Several `PooledResidualBlock` after each other; the net's first has a stem.

    Attributes:
        units: How many.
        first: Whether a convolution with norm and activation, the stem, comes first.
    """

    features: int
    kernel: Shape
    kit: Kit
    stride: Shape | None = None
    first: bool = False
    units: int = 1
    fixed_order: ClassVar[str] = "cna, then cn and a after the sum"

    def taps(self, axis: int) -> tuple[int, ...]:
        """Kernel sizes along an axis, in order."""
        return (self.kernel[axis],) * (2 * self.units + self.first)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.first:
            x = self.kit.unit(
                x, "_stem", features=self.features, kernel=self.kernel, order="cna"
            )
        for i in range(self.units):
            stride = self.stride if i == 0 else None
            x = PooledResidualBlock(
                self.features, self.kernel, self.kit, stride, name=f"unit{i}"
            )(x)
        return x


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
    # As some PyTorch nets have them (docs/torch.md says which).
    "widening_from": partial(ConvBlock, mid="half_out_at_least_in"),
    "excited": partial(ConvBlock, excite_input=True, excite="scse"),
    "single_instance_prelu": partial(
        ConvBlock, units=1, norm="instance_plain", act="prelu"
    ),
    "residual_projected": ProjectedResidualBlock,
    "residual_projected_leaky": partial(ProjectedResidualBlock, slope=0.1),
    "residual_units": ResidualUnits,
    "residual_stage": ResidualStage,
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
    """A channel gate (`SqueezeExcite`) and a gate for each pixel, joined.

    Attributes:
        dense: Factory of 1x1 convolutions.
        reduction: How many times fewer channels the channel gate has inside.
        larger: Whether the larger of the two results counts, or their sum.

    Reference: Roy et al. 2018, arXiv 1803.02579 (scSE).
    """

    dense: Factory
    reduction: int = 16
    larger: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = SqueezeExcite(self.dense, self.reduction, name="channel")(x)
        gate = self.dense(features=1, use_bias=True, name="spatial")(x)
        pixels = x * nn.sigmoid(gate)
        return jnp.maximum(channels, pixels) if self.larger else channels + pixels


EXCITES: dict[str, Callable[..., nn.Module] | None] = {
    "none": None,
    "se": SqueezeExcite,
    "scse": SpatialChannelExcite,
    "scse_max": partial(SpatialChannelExcite, reduction=1, larger=True),
}


def excite_factory(choice: Callable[..., nn.Module] | None, dense: Factory) -> Factory:
    """A factory ``factory(name=)(x)`` of what `EXCITES` has, or of the identity."""

    def make(name: str) -> Callable[[Array], Array]:
        return choice(dense=dense, name=name) if choice else lambda x: x

    return make
