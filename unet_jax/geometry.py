"""Sizes and receptive fields, computed from what a net is built of.

A net along one spatial axis is an `Axis`: what each level of the encoder does, how the
decoder comes back up. Arithmetic on pixels; no array is touched.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from unet_jax.encoders import Step
from unet_jax.types import InputError

Span = tuple[int, int]
"""The first and the last of neighbouring pixels or cells."""


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


def _after(step: Step, size: int, *, valid: bool) -> int:
    """The size that a step makes of a size."""
    if step.pooling:  # an axis shorter than its window is left as it is
        return size // step.stride if size >= step.stride else size
    padding = 0 if valid else step.kernel // 2
    return conv_size(size, kernel=step.kernel, stride=step.stride, padding=padding)


def _before(step: Step, span: Span, size: int, *, valid: bool) -> Span:
    """What a span of outputs sees of the ``size`` inputs of a step."""
    first, last = span
    if step.pooling:
        stride = step.stride
        return span if size < stride else (first * stride, (last + 1) * stride - 1)
    begin = 0 if valid else -(step.kernel // 2)
    first, last = first * step.stride + begin, last * step.stride + begin
    return max(first, 0), min(last + step.kernel - 1, size - 1)


def _through(taps: Sequence[int], size: int, *, valid: bool) -> list[int]:
    """The sizes before and after each of some convolutions."""
    sizes = [size]
    for kernel in taps:
        sizes.append(_after(Step(kernel), sizes[-1], valid=valid))
    return sizes


def _back(
    steps: Sequence[Step], span: Span, sizes: Sequence[int], *, valid: bool
) -> Span:
    """What a span sees through several steps, ``sizes`` being those that go in."""
    for step, size in reversed(list(zip(steps, sizes, strict=False))):
        span = _before(step, span, size, valid=valid)
    return span


def _clip(span: Span, size: int) -> Span | None:
    first, last = max(span[0], 0), min(span[1], size - 1)
    return (first, last) if first <= last else None


def _mixed(span: Span, size: int, stride: int, method: str) -> Span:
    """What a span of an up-sampled map sees of the ``size`` cells it is made of."""
    first, last = span
    if method == "nearest" or stride == 1:
        return first // stride, last // stride
    if method == "linear":  # cell c stands at (c + 1/2) / stride - 1/2
        scale, first, last = 2 * stride, 2 * first + 1 - stride, 2 * last + 1 - stride
    else:  # linear_aligned: at c (size - 1) / (stride size - 1)
        scale = stride * size - 1
        first, last = first * (size - 1), last * (size - 1)
    return max(first // scale, 0), min(-(-last // scale), size - 1)


class Ascent(NamedTuple):
    """The way up to one level, along one axis.

    Attributes:
        stride: How many times larger the map gets.
        coarse: Kernel sizes before it grows.
        fine: Kernel sizes after.
        block: Kernel sizes of the level's block.
        method: What a pixel of the larger map is made of. ``nearest``: the one that it
            lies in, also of the learnt ways up, whose taps do not overlap; ``linear``
            or ``linear_aligned``: its neighbours, too (`unet_jax.resample`).
        gated: Whether skips are gated on the grid of the coarse map
            (`unet_jax.merges.GridGate`), and so see around them.
    """

    stride: int
    coarse: tuple[int, ...]
    fine: tuple[int, ...]
    block: tuple[int, ...]
    method: str = "nearest"
    gated: bool = False


class Axis(NamedTuple):
    """A net along one axis.

    Attributes:
        down: What each level of the encoder does.
        up: The way up to each level but the coarsest.
        head: The head's kernel size.
        valid: Whether convolutions lose their border.
        nested: Whether the decoder is the grid of UNet++ and each of its nodes sees all
            earlier ones of its row.
        parts: How many devices share the axis, which matters to `pads` alone.

    What a cell of a map sees is what convolutions, pooling, interpolation, skips and
    attention gates carry to it. What takes a whole map into account (the statistics of
    a norm, squeeze-and-excitation, self-attention) is not counted.
    """

    down: tuple[tuple[Step, ...], ...]
    up: tuple[Ascent, ...]
    head: int = 1
    valid: bool = False
    nested: bool = False
    parts: int = 1

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

        The padded size is a multiple of `step` (plus a constant if valid), and of as
        many `step` as there are `parts`. A size of a valid net need not divide over
        them: it is one that `fitting` finds again among a few more pixels.
        """
        step = self.step
        if not self.valid:
            step *= self.parts
            return 0, (size + step - 1) // step * step - size
        # Outputs that exist are those congruent to one of them modulo step.
        edge = self.margin
        first = next(self.working_sizes(1)) - 2 * edge
        out = first + max((size - first + step - 1) // step, 0) * step
        while (found := self.fitting(out + 2 * edge)) != out + 2 * edge:
            out = found - 2 * edge
        return edge, edge + out - size

    def fitting(self, size: int) -> int:
        """The largest size that the net works at once ``size`` is filled up.

        Filled up to a multiple of `parts`, over which an array has to divide.
        """
        filled = size + -size % self.parts
        return next((n for n in range(filled, 0, -1) if self.out(n)), size)

    def seen_down(self) -> list[tuple[int, int]]:
        """(receptive field, pixels from one output to the next) of each level's map."""
        field, jump, levels = 1, 1, []
        for level in self.down:
            for kernel, stride, _ in level:
                field += (kernel - 1) * jump
                jump *= stride
            levels.append((field, jump))
        return levels

    # --- Cells -----------------------------------------------------------------------

    def sizes(self, size: int) -> tuple[list[int], list[int]]:
        """The sizes of the encoder's maps and of the decoder's, finest first.

        The decoder's are those of the last map of each level but the coarsest; the
        first of them is what the head sees, `out` what it makes of it.

        Raises:
            InputError: A valid net does not work at this size; names those that do.
        """
        if not self.valid:
            down = [sizes[-1] for sizes in self._on_the_way(size)]
            return down, down[:-1]
        sizes = self.valid_sizes(size) if size > 0 else None
        if sizes is None:
            below, above = self.nearest_sizes(size)
            nearest = f"{below} or {above}" if below else f"{above}, the smallest"
            raise InputError(
                f"a size of {size} does not work with padding = 'valid', because it"
                f" does not stay divisible by the strides {self.strides} or gets lost"
                f" at the borders: use {nearest}."
            )
        down, up = sizes
        return down, [up[0] + self.head - 1, *up[1:]]

    def cell_down(self, size: int, pixel: int) -> list[int]:
        """The cell of each of the encoder's maps that lies over a pixel.

        A cell of a strided map covers as many pixels as it is strided by; without
        padding it is the one whose field has the pixel in its middle. Where there is
        none, at the border, it is the nearest that there is.

        Args:
            size: The image's.
            pixel: Its place in the image, from 0.

        Returns:
            The cells' places, finest level first.

        Raises:
            InputError: As `sizes`.
        """
        cells = self._cells_down(size, pixel)
        pairs = zip(cells, self.sizes(size)[0], strict=True)
        return [min(max(cell, 0), n - 1) for cell, n in pairs]

    def cell_up(self, size: int, pixel: int) -> list[int]:
        """Likewise of the decoder's maps; arguments, answer and error as `cell_down`.

        Of the logits: of the pixel itself if padded, else of ``pixel - margin``.
        """
        down, up = self.sizes(size)
        cells = self._cells_down(size, pixel)
        # Skips are cropped in the middle, and every convolution takes as much at the
        # left as at the right: what is lost is half the difference of the sizes.
        rows = zip(cells, down, up, strict=False)
        return [min(max(cell - (m - n) // 2, 0), n - 1) for cell, m, n in rows]

    def field_down(self, size: int, level: int, cell: int) -> Span:
        """The first and the last pixel that a cell of the encoder's map sees.

        Args:
            size: The image's.
            level: Of the map, 0 the finest.
            cell: The cell's place in the map.

        Returns:
            Pixels of the image, from 0, both included.

        Raises:
            InputError: As `sizes`.
            ValueError: The map has no such cell.
        """
        self._check_cell(cell, self.sizes(size)[0][level])
        return self._seen(size, {(level, 0): (cell, cell)})

    def field_up(self, size: int, level: int, cell: int) -> Span:
        """Likewise of the decoder's maps, as `field_down`; `field` is of the logits."""
        self._check_cell(cell, self.sizes(size)[1][level])
        return self._seen(size, {(level, len(self.up) - level): (cell, cell)})

    def field(self, size: int, cell: int) -> Span:
        """Likewise of the logits: the receptive field of one of them.

        Args:
            size: The image's.
            cell: The logit's place among the logits.

        Returns:
            Pixels of the image, from 0, both included.

        Raises:
            InputError: As `sizes`.
            ValueError: There is no such logit.
        """
        read = self.sizes(size)[1][0]
        self._check_cell(cell, _after(Step(self.head), read, valid=self.valid))
        span = _before(Step(self.head), (cell, cell), read, valid=self.valid)
        return self._seen(size, {(0, len(self.up)): span})

    @property
    def receptive_field(self) -> int:
        """The most pixels that one logit sees, in an image without borders."""
        return self._widest(self.field)

    @property
    def halo(self) -> int:
        """How much further a part of an image must reach than what is wanted of it.

        The logits of a part, from pixel n to pixel m of it, are those of the whole
        image if n and m are multiples of `step` and as far from where it was cut off.
        It is what any block of ``step`` logits sees before or after itself, rounded up
        to a multiple of `step`. Added to it before that is ``step - 1``, because what a
        blur after up-sampling and the pooled shortcut around a kernel of 1 see is not
        counted as field, and less than that.

        Of nets that pad, but not if maps are interpolated by aligning their corners:
        then every logit depends on the size of the image.
        """
        reach = 0
        for cell, (first, last) in self._inside(self.field):
            block = cell // self.step * self.step
            reach = max(reach, block - first, last - (block + self.step - 1))
        return -(-(reach + self.step - 1) // self.step) * self.step

    def seen_grid(self) -> list[list[int]]:
        """The receptive field of each node ``X[i, j]`` of UNet++.

        Of a U-Net the first of each row are those of the encoder, the last those of
        the decoder, and there are no others.
        """
        depth = len(self.up)

        def widest(node: tuple[int, int]) -> int:
            return self._widest(lambda size, c: self._seen(size, {node: (c, c)}))

        return [
            [widest((i, j)) for j in range(depth + 1 - i)] for i in range(depth + 1)
        ]

    def seen_up(self) -> list[int]:
        """The receptive field of each of the decoder's maps, finest first."""
        return [row[-1] for row in self.seen_grid()[:-1]]

    def _widest(self, field: Callable[[int, int], Span]) -> int:
        spans = self._inside(field)
        return max(last - first + 1 for _, (first, last) in spans)

    def _inside(self, field: Callable[[int, int], Span]) -> list[tuple[int, Span]]:
        """Cells whose fields reach no border, one of each phase, and their fields."""
        size = 8 * self.step
        while True:
            size = next(self.working_sizes(2 * size))
            # What cells see repeats after as many of them as the strides multiply to.
            # Those a quarter into the map, as in its very middle maps aligned at their
            # corners meet and the neighbour's share is next to nothing.
            begin = min(self.sizes(size)[1]) // 4
            if begin < self.step:
                continue
            cells = range(begin, begin + self.step)
            spans = [(cell, field(size, cell)) for cell in cells]
            if all(first > 0 and last < size - 1 for _, (first, last) in spans):
                return spans

    @staticmethod
    def _check_cell(cell: int, size: int) -> None:
        if not 0 <= cell < size:
            raise ValueError(f"a map of {size} cells has no cell {cell}")

    def _on_the_way(self, size: int) -> list[list[int]]:
        """At each of the encoder's levels the sizes that its steps get, and its own."""
        levels = []
        for level in self.down:
            sizes = [size]
            for step in level:
                sizes.append(_after(step, sizes[-1], valid=self.valid))
            size = sizes[-1]
            levels.append(sizes)
        return levels

    def _cells_down(self, size: int, pixel: int) -> list[int]:
        """As `cell_down`, but where the net loses its border beyond the map."""
        cells = []
        for level, sizes in zip(self.down, self._on_the_way(size), strict=True):
            for step, n in zip(level, sizes, strict=False):
                if step.pooling:
                    pixel = pixel // step.stride if n >= step.stride else pixel
                else:
                    lost = (step.kernel - 1) // 2 if self.valid else 0
                    pixel = (pixel - lost) // step.stride
            cells.append(pixel)
        return cells

    def _grid(self, down: Sequence[int]) -> list[list[int]]:
        """The sizes of the nodes of UNet++, of which a U-Net has the last of each row.

        ``grid[i][j]``, as in `unet_jax.decoders.UNetPlusPlusDecoder`.
        """
        grid = [[n] for n in down]
        for row in reversed(range(len(self.up))):
            for coarse in grid[row + 1]:
                raised = self._raised(row, coarse)[1][-1] if self.valid else down[row]
                block = _through(self.up[row].block, raised, valid=self.valid)
                grid[row].append(block[-1])
        return grid

    def _raised(self, row: int, coarse: int) -> tuple[list[int], list[int]]:
        """The sizes on the way up to a row, before the map grows and after."""
        before = _through(self.up[row].coarse, coarse, valid=self.valid)
        grown = before[-1] * self.up[row].stride
        return before, _through(self.up[row].fine, grown, valid=self.valid)

    def _seen(self, size: int, wanted: dict[tuple[int, int], Span]) -> Span:
        """What spans of nodes (row, column) see of the image, all together."""
        way = self._on_the_way(size)
        grid = self._grid([sizes[-1] for sizes in way])
        wanted = dict(wanted)

        def want(node: tuple[int, int], span: Span) -> None:
            first, last = wanted.get(node, span)
            wanted[node] = min(first, span[0]), max(last, span[1])

        for column in range(len(self.up), 0, -1):
            for row in range(len(self.up) + 1 - column):
                if (row, column) in wanted:
                    span = wanted.pop((row, column))
                    for node, seen in self._inputs(grid, row, column, span):
                        want(node, seen)
        for row in range(len(self.up), 0, -1):
            if (row, 0) in wanted:
                span = wanted[row, 0]
                seen = _back(self.down[row], span, way[row], valid=self.valid)
                want((row - 1, 0), seen)
        return _back(self.down[0], wanted[0, 0], way[0], valid=self.valid)

    def _inputs(
        self, grid: list[list[int]], row: int, column: int, span: Span
    ) -> Iterator[tuple[tuple[int, int], Span]]:
        """The nodes of which a node is made, and what a span of it sees of each."""
        ascent, valid = self.up[row], self.valid
        coarse = grid[row + 1][column - 1]
        before, after = self._raised(row, coarse)
        merged = after[-1] if valid else grid[row][0]
        block = [Step(kernel) for kernel in ascent.block]
        sizes = _through(ascent.block, merged, valid=valid)
        span = first, last = _back(block, span, sizes, valid=valid)
        skipped = span
        if ascent.gated:
            window, around = _gate(span, merged, coarse, ascent.stride)
            skipped = min(first, window[0]), max(last, window[1])
            yield (row + 1, column - 1), around
        for earlier in range(column) if self.nested else (0,):
            shift = (grid[row][earlier] - merged) // 2
            yield (row, earlier), (skipped[0] + shift, skipped[1] + shift)
        # Of another size than the skip, it is cropped or has zeros around it.
        shift = _shift(merged, after[-1])
        up = _clip((first + shift, last + shift), after[-1])
        if up is None:
            return
        up = _back([Step(kernel) for kernel in ascent.fine], up, after, valid=valid)
        up = _mixed(up, before[-1], ascent.stride, ascent.method)
        up = _back([Step(kernel) for kernel in ascent.coarse], up, before, valid=valid)
        yield (row + 1, column - 1), up


def _shift(size: int, old: int) -> int:
    """What to add to a place in a map of ``size`` that `layers.align` made of ``old``.

    Its sum is the place in the map of ``old``.
    """
    return (old - size) // 2 if old >= size else -((size - old) // 2)


def _gate(span: Span, size: int, coarse: int, stride: int) -> tuple[Span, Span]:
    """What a span of a gated skip sees of the skip and of the coarse map.

    Args:
        span: Places in the skip.
        size: Of the skip.
        coarse: Size of the map whose grid the gate is computed on.
        stride: From the one to the other.
    """
    grown = coarse * stride
    shift = max(grown - size, 0) // 2  # where too small, the last gate is repeated
    first, last = (min(place + shift, grown - 1) for place in span)
    around = _mixed((first, last), coarse, stride, "linear")
    shift = _shift(coarse, size // stride)
    cells = _clip((around[0] + shift, around[1] + shift), size // stride)
    if cells is None:
        return span, around
    return (cells[0] * stride, (cells[1] + 1) * stride - 1), around
