"""Encoders: an image goes in, a pyramid of feature maps comes out, finest first.

`ENCODERS` names them. An encoder is a module with the fields ``features``, ``kit``,
``blocks``, ``strides``, ``pool``, ``dropout`` and ``dropout_from`` (its docstring says
which it reads), a static method ``check`` that refuses what it cannot be built with,
and a method ``steps(axis)``, of which sizes and receptive fields are computed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from unet_jax.blocks import ResidualBlock, shortcut
from unet_jax.layers import Factory, Kit
from unet_jax.types import Array, InputError, Shape

Pool = Callable[[Array, Sequence[int]], Array]


class Step(NamedTuple):
    """A convolution or pooling, along one axis.

    Attributes:
        kernel: Pixels that it sees.
        stride: Pixels from one output to the next.
        pooling: Whether it pools windows that do not overlap, and so loses no border.
    """

    kernel: int
    stride: int = 1
    pooling: bool = False


class PlainEncoder(nn.Module):
    """The contracting path: a block a level, pooling between them.

    The last entry of the pyramid is the bottleneck.

    Attributes:
        features: Channels of each level, finest first. 0 for the first: the full size
            has no features, and the net begins with the way down to the next.
        kit: Not read: the blocks have it.
        blocks: Factory of each level's block, called with ``features``, ``stride``,
            ``first`` and ``name``.
        strides: From each level to the next.
        pool: ``pool(x, stride)``; None: the blocks stride.
        dropout: Factory of dropout layers, called with ``name``, or None.
        dropout_from: The first level that ends in dropout; the last but one in the
            authors' own network ("drop-out layers at the end of the contracting path").

    Reference: Ronneberger et al. 2015, arXiv 1505.04597, section 2 and 3.1.
    """

    features: tuple[int, ...]
    kit: Kit
    blocks: tuple[Factory, ...]
    strides: tuple[Shape, ...]
    pool: Pool | None = None
    dropout: Factory | None = None
    dropout_from: int = 0

    @staticmethod
    def check(model: Any) -> None:
        """Refuses fields of a net that this encoder cannot have."""
        features = model.features
        whole = all(isinstance(n, int) for n in features)
        if len(features) < 2 or not whole or features[0] < 0 or min(features[1:]) < 1:
            raise InputError(
                f"model.features = {features} must be two or more whole numbers above"
                " 0, finest level first, such as (16,32,64,128)."
            )

    @nn.nowrap
    def _block(self, level: int, **where: Any) -> Any:
        strided = level > 0 and self.pool is None
        return self.blocks[level](
            features=self.features[level],
            stride=self.strides[level - 1] if strided else None,
            first=not any(self.features[:level]),
            **where,
        )

    def steps(self, axis: int) -> tuple[tuple[Step, ...], ...]:
        """What each level does along an axis, in order."""
        levels = []
        for level in range(len(self.features)):
            if not self.features[level]:
                levels.append(())
                continue
            block = self._block(level, parent=None)
            first, *others = block.taps(axis)
            steps = [Step(first, block.stride[axis] if block.stride else 1)]
            steps += [Step(tap) for tap in others]
            if level and self.pool is not None:
                stride = self.strides[level - 1][axis]
                steps.insert(0, Step(stride, stride, pooling=True))
            levels.append(tuple(steps))
        return tuple(levels)

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, ...]:
        """``[B, *S, C]`` -> ``([B, *S, f0], [B, *(S/2), f1], ...)``."""
        pyramid = []
        for level in range(len(self.features)):
            if not self.features[level]:
                pyramid.append(x[..., :0])
                continue
            if level and self.pool is not None:
                x = self.pool(x, self.strides[level - 1])
            x = self._block(level, name=f"level{level}")(x)
            if self.dropout and level >= self.dropout_from:
                x = self.dropout(name=f"dropout{level}")(x)
            pyramid.append(x)
        return tuple(pyramid)


# --- ResNet --------------------------------------------------------------------------


class BottleneckBlock(nn.Module):
    """1x1, 3x3, 1x1 around a shortcut; the 3x3 strides, as in torchvision.

    Reference: He et al. 2015, arXiv 1512.03385, figure 5 (right).
    """

    features: int
    kernel: Shape
    kit: Kit
    stride: Shape | None = None

    def taps(self, axis: int) -> tuple[int, ...]:
        """Kernel sizes along an axis, in order."""
        return (self.kernel[axis],)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kit, inner = self.kit, self.features // 4
        y = kit.dense(features=inner, name="conv0")(x)
        y = kit.act(name="act0")(kit.norm(name="norm0")(y))
        y = kit.unit(
            y, "1", features=inner, kernel=self.kernel, stride=self.stride, order="cna"
        )
        y = kit.dense(features=self.features, name="conv2")(y)
        y = kit.excite(name="excite")(kit.norm(name="norm2")(y))
        beside = shortcut(x, kit, self.features, self.stride)
        if beside is not x:
            beside = kit.norm(name="shortcut_norm")(beside)
        return kit.act(name="act2")(beside + y)


class ResNetEncoder(nn.Module):
    """A ResNet without its classifier, for same padding.

    The full size has no features: that level is a map of no channels, which tells the
    decoder how large the image is and gives it nothing to skip. Level 1 is the 7x7
    stem, at half the size; after 3x3 max-pooling follow the four stages.

    Attributes:
        features: ``(0, stem, stage 1, ..., stage 4)``, for ResNet-34
            ``(0, 64, 64, 128, 256, 512)``.
        kit: What to build with.
        blocks, strides, pool, dropout, dropout_from: Not read; a ResNet has its own
            blocks, strides and pooling, and no dropout.
        counts: Blocks of each stage.
        block: `unet_jax.blocks.ResidualBlock` or `BottleneckBlock`.

    Reference: He et al. 2015, arXiv 1512.03385, table 1.
    """

    features: tuple[int, ...]
    kit: Kit
    blocks: tuple[Factory, ...] = ()
    strides: tuple[Shape, ...] = ()
    pool: Pool | None = None
    dropout: Factory | None = None
    dropout_from: int = 0
    counts: tuple[int, ...] = (3, 4, 6, 3)
    block: Factory = ResidualBlock

    @staticmethod
    def check(model: Any) -> None:
        """Refuses fields of a net that this encoder cannot have."""
        features = model.features
        right = len(features) == 6 and all(isinstance(n, int) for n in features)
        if not right or features[0] != 0 or min(features[1:]) < 4:
            raise InputError(
                f"model.features = {features} does not fit a ResNet encoder: use 0 for"
                " the full size, then the stem and four stages, such as"
                " (0,64,64,128,256,512)."
            )
        for name, only in (("padding", "same"), ("kernels", ()), ("strides", ())):
            value = getattr(model, name)
            if value != only:
                raise InputError(
                    f"model.{name} = {value!r} does not go with a ResNet encoder, which"
                    f" has kernels and strides of its own and zeros at its borders: use"
                    f" model.{name} = {only!r}, or encoder = 'plain'."
                )
        if model.dropout:
            raise InputError(
                f"model.dropout = {model.dropout} does not go with a ResNet encoder,"
                " which has no dropout: use 0."
            )

    def steps(self, axis: int) -> tuple[tuple[Step, ...], ...]:
        """What each level does along an axis, in order."""
        per_block = 1 if self.block is BottleneckBlock else 2
        levels: list[tuple[Step, ...]] = [(), (Step(7, 2),)]
        for stage, count in enumerate(self.counts[: len(self.features) - 2]):
            steps = [Step(3)] * (per_block * count)
            steps[0] = Step(3, 1 if stage == 0 else 2)
            levels.append((Step(3, 2), *steps) if stage == 0 else tuple(steps))
        return tuple(levels)

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, ...]:
        """``[B, *S, C]`` -> ``([B, *S, 0], [B, *(S/2), f1], ...)``, rounded up."""
        rank = x.ndim - 2
        kernel, twice = (3,) * rank, (2,) * rank
        pyramid = [x[..., :0]]
        if len(self.features) > 1:
            stem = partial(self.kit.unit, features=self.features[1], order="cna")
            x = stem(x, "_stem", kernel=(7,) * rank, stride=twice)
            pyramid.append(x)
        stages = zip(self.features[2:], self.counts, strict=False)
        for stage, (features, count) in enumerate(stages, start=1):
            if stage == 1:
                # Beyond the border -inf, so that it never wins.
                widths = ((0, 0), *((1, 1),) * rank, (0, 0))
                window, stride = (1, *kernel, 1), (1, *twice, 1)
                x = jax.lax.reduce_window(
                    x, -float("inf"), jax.lax.max, window, stride, widths
                )
            for i in range(count):
                x = self.block(
                    features=features,
                    kernel=kernel,
                    kit=self.kit,
                    stride=twice if stage > 1 and i == 0 else None,
                    name=f"level{stage + 1}_{i}",
                )(x)
            pyramid.append(x)
        return tuple(pyramid)


ENCODERS: dict[str, Factory] = {
    "plain": PlainEncoder,
    "resnet18": partial(ResNetEncoder, counts=(2, 2, 2, 2)),
    "resnet34": ResNetEncoder,
    "resnet50": partial(ResNetEncoder, block=BottleneckBlock),
    "resnet101": partial(ResNetEncoder, block=BottleneckBlock, counts=(3, 4, 23, 3)),
    "resnet152": partial(ResNetEncoder, block=BottleneckBlock, counts=(3, 8, 36, 3)),
}
