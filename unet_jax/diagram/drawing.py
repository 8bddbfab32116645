"""A diagram as a picture: boxes as high as a map's size, as wide as its channels."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from unet_jax.diagram.net import Cost, Diagram, Node, Skip
from unet_jax.diagram.text import fit_text, flops_text, inputs_text, node_name
from unet_jax.log import replace_file
from unet_jax.types import InputError, Shape, size_text

_FILL, _EDGE = "#b9d3ec", "#2c5d8a"
_BLOCK, _COPY, _DOWN, _UP, _HEAD = "#2c5d8a", "#8c8c8c", "#b5332e", "#3d8b40", "#17888c"
_LETTER = 0.6 / 72  # inches of width of a letter, for each point of its size
_NAMES, _NUMBERS = 7.0, 5.8  # points


class _Sheet:
    """A drawing in inches, as large as what is drawn on it."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.left = self.bottom = float("inf")
        self.right = self.top = float("-inf")

    def _reach(self, *points: tuple[float, float]) -> None:
        for x, y in points:
            self.left, self.right = min(self.left, x), max(self.right, x)
            self.bottom, self.top = min(self.bottom, y), max(self.top, y)

    def box(
        self, x: float, y: float, width: float, height: float, fill: str = _FILL
    ) -> None:
        """A box around a point."""
        from matplotlib.patches import Rectangle

        corner = (x - width / 2, y - height / 2)
        self._reach(corner, (x + width / 2, y + height / 2))
        style: dict[str, Any] = {"facecolor": fill, "edgecolor": _EDGE}
        self.items.append(Rectangle(corner, width, height, linewidth=0.8, **style))

    def dot(self, x: float, y: float) -> None:
        """A gate."""
        from matplotlib.patches import Circle

        self._reach((x, y))
        style: dict[str, Any] = {"facecolor": "#ffe08a", "edgecolor": _EDGE}
        self.items.append(Circle((x, y), 0.07, linewidth=0.8, zorder=5, **style))

    def arrow(
        self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.6
    ) -> None:
        """An arrow along two points or a corner; along four as a curve."""
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path as Line

        self._reach(*points)
        codes: list[Any] = [Line.MOVETO] + [Line.LINETO] * (len(points) - 1)
        if len(points) == 4:
            codes[1:] = [Line.CURVE4] * 3
        self.items.append(
            FancyArrowPatch(
                path=Line(points, codes),
                arrowstyle="-|>",
                mutation_scale=5 + 2.5 * width,
                linewidth=width,
                color=colour,
                fill=False,
                capstyle="butt",
                joinstyle="miter",
            )
        )
        self.items[-1].set_fill(True)
        self.items[-1].set_facecolor(colour if len(points) == 2 else "none")

    def write(
        self,
        x: float,
        y: float,
        lines: Sequence[str],
        *,
        size: float = _NAMES,
        colour: str = "black",
        at: str = "center",
        above: bool = False,
    ) -> float:
        """Lines below a point, or above it; gives the y where they end."""
        from matplotlib.text import Text

        lines = [line for line in lines if line]
        height = len(lines) * size * 1.25 / 72
        width = max(map(len, lines), default=0) * size * _LETTER
        begin = {"center": x - width / 2, "left": x, "right": x - width}[at]
        top = y + height if above else y
        self._reach((begin, top - height), (begin + width, top))
        for i, line in enumerate(lines):
            middle = top - (i + 0.5) * height / len(lines)
            style: dict[str, Any] = {"fontsize": size, "color": colour}
            self.items.append(
                Text(x, middle, line, ha=at, va="center_baseline", **style)
            )
        return top if above else top - height

    def figure(self) -> Any:
        """The sheet with a margin around it."""
        from matplotlib.figure import Figure

        margin = 0.15
        width = self.right - self.left + 2 * margin
        height = self.top - self.bottom + 2 * margin
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(self.left - margin, self.right + margin)
        axes.set_ylim(self.bottom - margin, self.top + margin)
        for item in self.items:
            axes.add_artist(item)
        return figure


@dataclass(frozen=True)
class _Scale:
    """How large a map is drawn: as high as its size, as wide as its channels.

    Both by their square roots, as a net's coarsest map is often 1/32 of its finest.
    """

    size: float
    channels: int
    height: float = 1.5
    width: float = 0.5

    def __call__(self, shape: Shape) -> tuple[float, float]:
        """(width, height) of a box."""
        height = self.height * (_mean_size(shape) / self.size) ** 0.5
        return self.wide(shape[-1]), max(height, 0.1)

    def wide(self, channels: int) -> float:
        """The width of a box."""
        return max(self.width * (channels / self.channels) ** 0.5, 0.06)


def _mean_size(shape: Shape) -> float:
    product = 1.0
    for n in shape[:-1]:
        product *= n
    return product ** (1 / (len(shape) - 1))


def _scale(diagram: Diagram, **most: float) -> _Scale:
    maps = [n.shape for n in (*diagram.encoder, *diagram.decoder)]
    maps.append(diagram.image)
    return _Scale(max(map(_mean_size, maps)), max(m[-1] for m in maps), **most)


def _shape_lines(shape: Shape) -> list[str]:
    return [size_text(shape[:-1]), str(shape[-1])]


def _cost_lines(cost: Cost, name: str = "") -> list[str]:
    lines = [f"{cost.parameters:,} param."] if cost.parameters else []
    lines += [f"{flops_text(cost.flops)}FLOPs"] if cost.flops else []
    return [f"{name} {line}".strip() for line in lines]


def _letters(lines: Iterable[str], size: float) -> float:
    """The width of the longest of some lines."""
    return max(map(len, lines), default=0) * size * _LETTER


def _carried_lines(node: Node) -> list[str]:
    """What a level's skip says on its arrow."""
    skip = node.skips[0]
    lines = [size_text(skip.shape)]
    if skip.used != skip.shape:
        lines.append(f"cropped to {size_text(skip.used[:-1])}")
    if skip.gate:
        lines.append(f"gate {size_text(skip.gate[:-1])}")
    return lines


def _draw_u(diagram: Diagram) -> _Sheet:
    sheet, scale, depth = _Sheet(), _scale(diagram), diagram.depth
    nodes = {node.row: node for node in diagram.decoder}
    every = (*diagram.encoder, *diagram.decoder)
    sizes = [size_text(s[:-1]) for n in every for s in (n.entering, n.shape)]
    costs = [
        line for n in every for line in (*_cost_lines(n.cost), "skip 00.00 GFLOPs")
    ]
    costs += [f"up {n.up_cost.parameters:,} param." for n in every]
    pitch = max(_letters(sizes, _NAMES), _letters(costs, _NUMBERS)) + 0.15
    pitch = max(pitch, 1.6 * scale.width)

    # Where the rows are.
    tall = [scale(node.shape)[1] for node in diagram.encoder]
    tall[0] = max(tall[0], scale(diagram.image)[1])
    for row, node in nodes.items():
        tall[row] = max(tall[row], scale(node.entering)[1])
    rows = [0.0]
    for above, below in pairwise(tall):
        rows.append(rows[-1] - above / 2 - below / 2 - 0.55)

    # Where the columns are: under a level's last box is the next one's first.
    middles = {row: (row + 1) * pitch for row in range(depth + 1)}
    ends = [
        scale.wide(node.entering[-1] if node.how == "no skip" else node.up[-1])
        for node in (nodes[row] for row in range(depth))
        if node.up is not None
    ]
    copies = [_copy_width(nodes[row], scale) for row in range(depth)]
    last = depth * pitch + pitch * (2 if diagram.bottleneck else 1)
    for row, node in nodes.items():
        gated = any(skip.gate for skip in node.skips)
        need = _letters(_carried_lines(node) if node.skips else [], _NUMBERS) + 0.5
        need += 0.25 if gated else 0
        taken = scale(diagram.encoder[row].shape)[0] / 2 + copies[row] + ends[row] / 2
        free = last + (depth - 1 - row) * pitch - middles[row] - taken
        last += max(need - free, 0)
    grown = {row: last + (depth - 1 - row) * pitch for row in range(depth)}

    _draw_down(sheet, diagram, scale, rows, pitch, last)
    for row in range(depth):
        node, y = nodes[row], rows[row]
        below = nodes[row + 1].shape if row + 1 < depth else diagram.encoder[-1].shape
        x, right = grown[row], grown[row] + pitch
        wide, high = ends[row], scale(node.entering)[1]
        # Up, and the skip beside it.
        top = rows[row + 1] + scale(below)[1] / 2
        sheet.arrow([(x, top), (x, y - high / 2)], _UP, 2)
        sheet.box(x, y, wide, high)
        begin = x - wide / 2 - copies[row]
        if copies[row]:
            sheet.box((begin + x - wide / 2) / 2, y, copies[row], high, "white")
        middle = (begin + x + wide / 2) / 2
        sheet.write(
            middle, y + high / 2 + 0.03, _shape_lines(node.entering), above=True
        )
        if node.how != "no skip":
            _draw_skip(sheet, node, scale, (middles[row], begin), y)
        # The block.
        out_wide, out_high = scale(node.shape)
        _block(sheet, x + wide / 2, right - out_wide / 2, y)
        sheet.box(right, y, out_wide, out_high)
        end = sheet.write(right, y - out_high / 2 - 0.03, _shape_lines(node.shape))
        lines = _cost_lines(node.cost)
        lines += _cost_lines(node.up_cost, "up") + _cost_lines(node.merge_cost, "skip")
        if fit_text(node):
            lines += [f"up {size_text((node.up or ())[:-1])}", fit_text(node)]
        lines.append(f"sees {size_text(node.field)}")
        sheet.write(right, end - 0.02, lines, size=_NUMBERS, colour="#555555")
    _draw_head(sheet, diagram, scale, (grown[0] + pitch, rows[0]), pitch)
    return sheet


def _copy_width(node: Node, scale: _Scale) -> float:
    """Of the white box: what of the merged map is copied."""
    joined = node.how not in ("no skip", "sum")
    carried = sum(skip.used[-1] for skip in node.skips) if joined else 0
    return scale.wide(carried) if carried else 0.0


def _block(sheet: _Sheet, begin: float, end: float, y: float) -> None:
    sheet.arrow([(begin + 0.03, y), (end - 0.03, y)], _BLOCK)


def _draw_down(
    sheet: _Sheet,
    diagram: Diagram,
    scale: _Scale,
    rows: Sequence[float],
    pitch: float,
    last: float,
) -> None:
    """The encoder and the bottleneck; ``last`` is where the way up begins."""
    above, under = diagram.image, 0.0
    for row, node in enumerate(diagram.encoder):
        x, y = row * pitch, rows[row]
        wide, high = scale(node.entering)
        # A block that strides has no map of its own size before it.
        own = row == 0 or node.entering[:-1] != above[:-1]
        end = y - 0.06
        if own:
            fill = "#eeeeee" if row == 0 else _FILL
            sheet.box(x, y, wide, high, fill)
            end = y - high / 2 - 0.03
            end = sheet.write(x, end, _shape_lines(node.entering))
        if row == 0:
            under = end - 0.03
            sheet.write(x, y + high / 2 + 0.03, ["image"], above=True)
        out_wide, out_high = scale(node.shape)
        bottom = row == diagram.depth
        out = x + pitch
        if bottom and not diagram.bottleneck:
            out = last
        if row > 0:
            start = (x, rows[row - 1] - scale(above)[1] / 2)
            if not above[-1]:  # from the image itself
                start = (x - pitch, under)
            if own:
                sheet.arrow([start, (x, y + high / 2)], _DOWN, 2)
            else:
                corner = (start[0], y)
                sheet.arrow([start, corner, (out - out_wide / 2 - 0.03, y)], _DOWN, 2)
        lines = _cost_lines(node.cost)
        if node.shape[-1]:
            lines.append(f"sees {size_text(node.field)}")
            if own:
                _block(sheet, x + wide / 2, out - out_wide / 2, y)
            sheet.box(out, y, out_wide, out_high)
            label = _shape_lines(node.shape)
            if bottom:
                sheet.write(out, y - out_high / 2 - 0.03, label)
            else:
                sheet.write(out, y + out_high / 2 + 0.03, label, above=True)
        sheet.write(x, end - 0.02, lines, size=_NUMBERS, colour="#555555")
        above = node.shape
    if diagram.bottleneck:
        part, y = diagram.bottleneck, rows[-1]
        wide, high = scale(part.shape)
        start = (diagram.depth + 1) * pitch + scale(diagram.encoder[-1].shape)[0] / 2
        _block(sheet, start, last - wide / 2, y)
        sheet.box(last, y, wide, high, "#f2dfb5")
        end = sheet.write(last, y - high / 2 - 0.03, [part.name])
        sheet.write(last, end, _cost_lines(part.cost), size=_NUMBERS, colour="#555555")


def _draw_skip(
    sheet: _Sheet, node: Node, scale: _Scale, ends: tuple[float, float], y: float
) -> None:
    """The arrow of a level's skip, with its gate."""
    skip = node.skips[0]
    begin, end = ends[0] + scale(skip.shape)[0] / 2 + 0.04, ends[1] - 0.04
    sheet.arrow([(begin, y), (end, y)], _COPY, 2.4)
    lines = _carried_lines(node)
    middle = (begin + end) / 2 - (0.15 if skip.gate else 0.03)
    sheet.write(middle, y + 0.06, lines[:1], size=_NUMBERS, above=True)
    sheet.write(middle, y - 0.06, lines[1:], size=_NUMBERS)
    if skip.gate:
        sheet.dot(end - 0.24, y)


def _draw_head(
    sheet: _Sheet,
    diagram: Diagram,
    scale: _Scale,
    place: tuple[float, float],
    pitch: float,
) -> None:
    head, (x, y) = diagram.heads[-1], place
    wide, high = scale(head.shape)
    begin = x + scale(diagram.decoder[-1].shape)[0] / 2
    sheet.arrow([(begin + 0.03, y), (x + pitch - wide / 2 - 0.03, y)], _HEAD)
    x += pitch
    sheet.box(x, y, wide, high, "#cfe9e4")
    sheet.write(x, y + high / 2 + 0.03, ["logits"], above=True)
    end = sheet.write(x, y - high / 2 - 0.03, _shape_lines(head.shape))
    lines = [*_cost_lines(head.cost), f"sees {size_text(diagram.field)}"]
    sheet.write(x, end - 0.02, lines, size=_NUMBERS, colour="#555555")


def _draw_grid(diagram: Diagram) -> _Sheet:
    """The triangle of UNet++: skips along the rows, the diagonals going up."""
    sheet, scale = _Sheet(), _scale(diagram, height=0.7, width=0.4)
    labels = {}
    for node in (*diagram.encoder, *diagram.decoder):
        cost = node.cost + node.up_cost + node.merge_cost
        crops = {size_text(s.used[:-1]) for s in node.skips if s.used != s.shape}
        gates = [s for s in node.skips if s.gate]
        labels[node.row, node.column] = [
            size_text(node.shape) if node.shape[-1] else "",
            inputs_text(node) if node.column else "",
            *(f"cropped to {size}" for size in sorted(crops)),
            f"{len(gates)} gated" if gates else "",
            *_cost_lines(cost),
            f"sees {size_text(node.field)}" if node.shape[-1] else "",
        ]
        if fit_text(node):
            labels[node.row, node.column].insert(2, f"up {fit_text(node)}")
    widest = _letters((line for lines in labels.values() for line in lines), _NUMBERS)
    pitch, fall = widest + scale.width + 0.35, 1.65

    def place(node: tuple[int, int]) -> tuple[float, float]:
        return (node[1] + node[0] / 2) * pitch, -node[0] * fall

    present = {key for key in labels if diagram.node(*key)}
    for row, column in sorted(present):
        node = diagram.node(row, column)
        if node is None:
            continue
        x, y = place((row, column))
        image = not node.shape[-1]
        wide, high = scale(diagram.image if image else node.shape)
        sheet.box(x, y, wide, high, "#eeeeee" if image else _FILL)
        if column:
            begin, at = x + wide / 2 + 0.05, "left"
        else:
            begin, at = x - wide / 2 - 0.07, "right"
        name = "image" if image else node_name(node)
        lines = labels[row, column]
        if image:  # a ResNet has no features of the full size
            lines = [size_text(diagram.image), *lines]
        below = y - 0.06 if column else y + (0.12 if row else 0.3)
        below = sheet.write(begin, below, [name], at=at)
        sheet.write(begin, below, lines, size=_NUMBERS, colour="#444444", at=at)
        for skip in node.skips:
            _draw_grid_skip(sheet, diagram, scale, place, node, skip)
        _draw_diagonal(sheet, diagram, scale, place, node)
    arcs = 0.35 + scale.height / 2 + 0.1 * diagram.depth
    for head in diagram.heads:
        node = diagram.node(0, head.column)
        if node is None:
            continue
        x, y = place((0, head.column))
        top = y + scale(node.shape)[1] / 2
        sheet.arrow([(x, top), (x, y + arcs + 0.25)], _HEAD)
        lines = [head.name, size_text(head.shape), *_cost_lines(head.cost)]
        sheet.write(x, y + arcs + 0.3, lines, size=_NUMBERS, above=True)
    return sheet


def _draw_grid_skip(
    sheet: _Sheet, diagram: Diagram, scale: _Scale, place: Any, node: Node, skip: Skip
) -> None:
    source = diagram.node(node.row, skip.column)
    if source is None or not skip.shape[-1]:
        return
    (x0, y), (x1, _) = place((node.row, skip.column)), place((node.row, node.column))
    (w0, h0), (w1, h1) = scale(source.shape), scale(node.shape)
    if node.column - skip.column == 1:
        sheet.arrow([(x0 + w0 / 2 + 0.03, y), (x1 - w1 / 2 - 0.03, y)], _COPY)
        return
    high = y + max(h0, h1) / 2 + 0.12 + 0.16 * (node.column - skip.column)
    start, end = (x0 + w0 / 4, y + h0 / 2 + 0.02), (x1 - w1 / 4, y + h1 / 2 + 0.02)
    curve = [start, (x0 + 0.35, high), (x1 - 0.35, high), end]
    sheet.arrow(curve, _COPY, 1.0)


def _draw_diagonal(
    sheet: _Sheet, diagram: Diagram, scale: _Scale, place: Any, node: Node
) -> None:
    """From where a node's map comes: down in the encoder, up in the decoder."""
    wide, high = scale(node.shape)
    x, y = place((node.row, node.column))
    if node.column:
        source = diagram.node(node.row + 1, node.column - 1)
        assert source is not None
        (x0, y0), (w0, h0) = place((source.row, source.column)), scale(source.shape)
        start, end = (x0 + w0 / 3, y0 + h0 / 2), (x - wide / 3, y - high / 2)
        sheet.arrow([start, end], _UP)
    elif node.row:
        source = diagram.encoder[node.row - 1]
        drawn = source.shape if source.shape[-1] else diagram.image
        (x0, y0), (w0, h0) = place((source.row, 0)), scale(drawn)
        start, end = (x0 + w0 / 3, y0 - h0 / 2), (x - wide / 3, y + high / 2)
        sheet.arrow([start, end], _DOWN)


def _draw_legend(sheet: _Sheet, diagram: Diagram) -> None:
    """What the arrows mean, and the totals, under everything else."""
    carried = [skip for node in diagram.decoder for skip in node.skips]
    words = [] if diagram.nested else [(_BLOCK, "block")]
    words += [(_DOWN, "down"), (_UP, "up")]
    if any(node.how != "no skip" for node in diagram.decoder):
        words.append((_COPY, "skip"))
    words.append((_HEAD, "head"))
    x, y = sheet.left, sheet.bottom - 0.25
    for colour, word in words:
        sheet.arrow([(x, y), (x + 0.3, y)], colour)
        sheet.write(x + 0.36, y + 0.06, [word], at="left")
        x += 0.36 + _letters([word], _NAMES) + 0.25
    if not diagram.nested and any(skip.gate for skip in carried):
        sheet.dot(x + 0.07, y)
        sheet.write(x + 0.2, y + 0.06, ["attention gate"], at="left")
    total = diagram.total
    field = size_text(diagram.field)
    lines = [
        f"{total.parameters:,} parameters, {flops_text(total.flops)}FLOPs for one image"
        f" of {size_text(diagram.image)}, receptive field of a logit {field}",
        *(f"and more: {note}" for note in diagram.notes),
    ]
    sheet.write(sheet.left, y - 0.15, lines, at="left")


def _sheet(diagram: Diagram) -> _Sheet:
    sheet = _draw_grid(diagram) if diagram.nested else _draw_u(diagram)
    _draw_legend(sheet, diagram)
    return sheet


def draw(diagram: Diagram, path: str | Path) -> None:
    """Draws a diagram: boxes as high as a map's size and as wide as its channels.

    Args:
        diagram: Of `describe`.
        path: A file that ends in ``.png`` or ``.svg``; one that exists is replaced.

    Raises:
        InputError: Another ending, or the disk is full.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise InputError(
            f"{path} cannot be drawn: give a file that ends in .png or .svg."
        )
    import matplotlib

    content = io.BytesIO()
    # The same net gives the same file.
    options: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "unet_jax"}):
        _sheet(diagram).figure().savefig(content, format=kind, dpi=200, **options)
    replace_file(path, content.getvalue())
