"""Sizes and receptive fields, computed from what a net is built of.

A net along one spatial axis is an `Axis`: what each level of the encoder does, how the
decoder comes back up. Arithmetic on pixels; no array is touched.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from unet_jax.encoders import Step


def conv_size(
    size: int,
    *,
    kernel: int,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int = 1,
) -> int:
    """The size that comes out of a convolution or pooling, along one axis.

    ``floor((size + padding - dilation (kernel - 1) - 1) / stride) + 1``.

    Args:
        size: Pixels that go in.
        kernel: Taps of the kernel.
        stride: Pixels from one output to the next.
        padding: Pixels added at each side, or (before, after).
        dilation: Pixels from one tap to the next.

    Returns:
        Pixels that come out; 0 where the kernel does not fit.
    """
    before, after = (padding, padding) if isinstance(padding, int) else padding
    free = size + before + after - dilation * (kernel - 1) - 1
    return free // stride + 1 if free >= 0 else 0


def conv_transpose_size(
    size: int,
    *,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    output_padding: int = 0,
    dilation: int = 1,
) -> int:
    """The size that comes out of a transposed convolution, as PyTorch defines it.

    ``(size - 1) stride - 2 padding + dilation (kernel - 1) + output_padding + 1``.

    Args:
        size: Pixels that go in.
        kernel: Taps of the kernel.
        stride: Pixels from one input to the next, in the output.
        padding: Pixels cut off at each side.
        output_padding: Pixels added at the end.
        dilation: Pixels from one tap to the next.
    """
    grown = (size - 1) * stride + dilation * (kernel - 1) + 1
    return max(grown - 2 * padding + output_padding, 0)


class Ascent(NamedTuple):
    """The way up to one level, along one axis.

    Attributes:
        stride: How many times larger the map gets.
        coarse: Kernel sizes before it grows.
        fine: Kernel sizes after.
        block: Kernel sizes of the level's block.
    """

    stride: int
    coarse: tuple[int, ...]
    fine: tuple[int, ...]
    block: tuple[int, ...]


class Axis(NamedTuple):
    """A net along one axis.

    Attributes:
        down: What each level of the encoder does.
        up: The way up to each level but the coarsest.
        head: The head's kernel size.
        valid: Whether convolutions lose their border.
    """

    down: tuple[tuple[Step, ...], ...]
    up: tuple[Ascent, ...]
    head: int = 1
    valid: bool = False

    @property
    def strides(self) -> tuple[int, ...]:
        """From each level to the next."""
        return tuple(step.stride for step in self.up)

    @property
    def step(self) -> int:
        """The product of all strides."""
        return math.prod(self.strides)

    def valid_sizes(self, size: int) -> tuple[list[int], list[int]] | None:
        """The sizes at each level on the way down and up, without padding.

        Every pooling must see a size that its stride divides (the paper, section 3),
        else the skip and the up-sampled map are half a pixel apart.

        Returns:
            The encoder's sizes and the decoder's, finest first, the last ones being
            those of the coarsest level and of the logits; None if the net has no
            output at this size.
        """
        down: list[int] = []
        for level in self.down:
            for kernel, stride, pooling in level:
                size -= 0 if pooling else kernel - 1
                if size < stride or size % stride:
                    return None
                size //= stride
            down.append(size)
        up: list[int] = []
        for ascent in reversed(self.up):
            size -= sum(ascent.coarse) - len(ascent.coarse)
            if size < 1:
                return None
            size = size * ascent.stride
            for taps in (ascent.fine, ascent.block):
                size -= sum(taps) - len(taps)
            if size < 1:
                return None
            up.append(size)
        up[-1] -= self.head - 1
        return (down, up[::-1]) if up[-1] > 0 else None

    def out(self, size: int) -> int | None:
        """The size of the logits; None if the net does not work at this size."""
        if not self.valid:
            return size
        sizes = self.valid_sizes(size)
        return sizes[1][0] if sizes else None

    @property
    def margin(self) -> int:
        """Pixels lost at each side: 92 for the paper's net, 0 if padded."""
        if not self.valid:
            return 0
        lost, scale = 0, 1
        for level in self.down:
            for kernel, stride, pooling in level:
                lost += 0 if pooling else (kernel - 1) * scale
                scale *= stride
        for ascent in reversed(self.up):
            lost += scale * sum(k - 1 for k in ascent.coarse)
            scale //= ascent.stride
            lost += scale * sum(k - 1 for k in (*ascent.fine, *ascent.block))
        return (lost + self.head - 1) // 2

    def working_sizes(self, size: int) -> Iterator[int]:
        """Sizes from ``size`` on at which a valid net works."""
        while True:
            if self.out(size):
                yield size
            size += 1

    def nearest_sizes(self, size: int) -> tuple[int | None, int]:
        """The nearest size below that works, if there is one, and the nearest above."""
        above = next(self.working_sizes(max(size, 1)))
        below = next((n for n in range(size, 0, -1) if self.out(n)), None)
        return below, above

    def pads(self, size: int) -> tuple[int, int]:
        """Pixels to mirror before and after, so that the output covers ``size``.

        The padded size is a multiple of `step` (plus a constant if valid).
        """
        step = self.step
        if not self.valid:
            return 0, (size + step - 1) // step * step - size
        # Outputs that exist are those congruent to one of them modulo step.
        edge = self.margin
        first = next(self.working_sizes(1)) - 2 * edge
        out = first + max((size - first + step - 1) // step, 0) * step
        return edge, edge + out - size

    def seen_down(self) -> list[tuple[int, int]]:
        """(receptive field, pixels from one output to the next) of each level's map."""
        field, jump, levels = 1, 1, []
        for level in self.down:
            for kernel, stride, _ in level:
                field += (kernel - 1) * jump
                jump *= stride
            levels.append((field, jump))
        return levels
