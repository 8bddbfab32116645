"""A diagram for a terminal: the U, or the triangle of UNet++, in plain ASCII."""

from collections import Counter
from collections.abc import Sequence

from unet_jax.diagram.net import Cost, Diagram, Node, summed
from unet_jax.types import size_text

WIDTH = 100


def flops_text(count: int) -> str:
    """``24.16 G``; empty where there are none."""
    if not count:
        return ""
    unit, letter = next(
        (pair for pair in ((1e12, "T"), (1e9, "G")) if count >= pair[0]), (1e6, "M")
    )
    return f"{count / unit:.2f} {letter}"


def _cost(cost: Cost) -> str:
    """``37,568 params, 24.18 GFLOPs``; empty of what costs nothing."""
    parts = [f"{cost.parameters:,} params"] if cost.parameters else []
    parts += [f"{flops_text(cost.flops)}FLOPs"] if cost.flops else []
    return ", ".join(parts)


def fit_text(node: Node) -> str:
    """What was done to the up-sampled map to give it the size of the skip."""
    if node.up is None or node.fitted is None or node.up == node.fitted:
        return ""
    grows = any(a < b for a, b in zip(node.up, node.fitted, strict=True))
    return f"{'padded' if grows else 'cut'} to {size_text(node.fitted[:-1])}"


def _skip_lines(node: Node, width: int) -> list[str]:
    """The skip of a level of a U-Net as an arrow, with what it carries."""
    skip = node.skips[0]
    if node.how == "no skip":
        reason = "(no skip)" if skip.shape[-1] else "(nothing to skip: no channels)"
        return [reason if len(reason) < width else "(no skip)"]
    lines = [size_text(skip.shape), "-" * (width - 4) + ">"]
    if skip.used != skip.shape:
        lines.append(f"cropped to {size_text(skip.used[:-1])}")
    if skip.gate:
        lines.append(f"gate {size_text(skip.gate[:-1])}")
    return lines


def _left(node: Node) -> list[str]:
    if not node.shape[-1]:
        return [f"out {size_text(node.shape)}"]
    lines = [f"in  {size_text(node.entering)}", f"out {size_text(node.shape)}"]
    lines += [_cost(node.cost), f"sees {size_text(node.field)}"]
    return [line for line in lines if line]


def _right(node: Node) -> list[str]:
    lines = [f"up  {size_text(node.up or ())}", fit_text(node)]
    if node.how != "no skip":
        lines.append(f"{node.how} {size_text(node.entering)}")
    lines += [f"out {size_text(node.shape)}", _cost(node.cost)]
    for name, cost in (("up", node.up_cost), ("skip", node.merge_cost)):
        lines.append(f"{name}: {_cost(cost)}" if _cost(cost) else "")
    lines.append(f"sees {size_text(node.field)}")
    return [line for line in lines if line]


def _u_lines(diagram: Diagram) -> list[str]:
    """The U: down on the left, up on the right, skips between."""
    nodes = {node.row: node for node in diagram.decoder}
    sides = {row: (_left(diagram.encoder[row]), _right(nodes[row])) for row in nodes}
    left, right = (
        {row: max(map(len, pair[k])) for row, pair in sides.items()} for k in (0, 1)
    )
    # As steep as the page allows; what lies between has room for a few words.
    between = 22
    indent = next(
        (
            step
            for step in (4, 3, 2, 1)
            if all(
                2 * (3 + step * row) + left[row] + right[row] + between <= WIDTH
                for row in sides
            )
        ),
        0,
    )
    head = diagram.heads[-1]
    end = f"logits {size_text(diagram.logits)}"
    start = f"image {size_text(diagram.image)}"
    lines = [start.ljust(WIDTH - len(end)) + end]
    lines.append(_cost(head.cost).rjust(WIDTH - len("head: ")))
    lines[-1] = lines[-1].rstrip()
    lines[-1] = f"head: {_cost(head.cost)}".rjust(WIDTH)
    for row in sorted(sides):
        begin = indent * row
        column = WIDTH - begin - max(right.values())
        column = min(column, WIDTH - begin - right[row])
        lefts, rights = sides[row]
        room = column - begin - 3 - left[row]
        middle = _skip_lines(nodes[row], room)
        height = max(len(lefts), len(rights), len(middle))
        blocks = [block + [""] * (height - len(block)) for block in (lefts, rights)]
        middle = [""] * (len(lefts) > len(middle)) + middle
        middle += [""] * (height - len(middle))
        lines.append(" " * begin + "v" + "^".rjust(WIDTH - 1 - 2 * begin))
        for i, (a, m, b) in enumerate(zip(blocks[0], middle, blocks[1], strict=True)):
            label = f"{row}  " if i == 0 else "|  "
            line = " " * begin + label + a.ljust(left[row]) + m.center(room) + b
            lines.append(line.rstrip())
    begin = indent * len(sides)
    lines.append(" " * begin + "v" + "^".rjust(WIDTH - 1 - 2 * begin))
    bottom = _left(diagram.encoder[-1])
    if diagram.bottleneck:
        part = diagram.bottleneck
        bottom += [f"bottleneck {size_text(part.shape)}", _cost(part.cost)]
    for i, line in enumerate(bottom):
        label = f"{diagram.depth}  " if i == 0 else "   "
        dash = " ".ljust(WIDTH - 2 * begin - 4 - len(line), "-") + "+"
        lines.append(" " * begin + label + line + (dash if i == 1 else ""))
    return lines


def node_name(node: Node) -> str:
    """``X[row,column]``."""
    return f"X[{node.row},{node.column}]"


def inputs_text(node: Node) -> str:
    """The channels that go into a node: ``2 x 64 + 64 up``."""
    if node.up is None:
        return f"{node.entering[-1]}" if node.shape[-1] else ""
    carried = Counter(s.used[-1] for s in node.skips if s.used[-1])
    skips = [f"{n} x {width}" if n > 1 else f"{width}" for width, n in carried.items()]
    return " + ".join([*skips, f"{node.up[-1]} up"])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _grid_lines(diagram: Diagram) -> list[str]:
    """The triangle of UNet++: a row a level, the diagonals going up."""
    depth = diagram.depth
    cell = WIDTH // (depth + 1)
    lines = []
    for row in range(depth + 1):
        indent = row * cell // 2
        names, shapes = " " * indent, " " * indent
        for column in range(depth + 1 - row):
            node = diagram.node(row, column)
            name = node_name(node) if node else ""
            shape = "x".join(map(str, node.shape)) if node else ""
            after = diagram.node(row, column + 1)
            joined = node and after and node.shape[-1]
            dash = "-" * (cell - len(name) - 3) + "> " if joined else ""
            names += f"{name} {dash}".ljust(cell)
            shapes += shape.ljust(cell)
        lines += [names, shapes.rstrip()]
        if row < depth:
            arrows = "".join(r"\   / ".center(cell) for _ in range(depth - row))
            first = r"\   / ".center(cell)
            lines.append(" " * indent + first + arrows[cell:].replace("\\", " "))
    return [line.rstrip() for line in lines]


def _node_table(diagram: Diagram) -> list[str]:
    """A row a node: what goes in, what comes out, what it costs."""
    rows = [["node", "channels in", "merged", "out", "parameters", "FLOPs", "sees"]]
    for node in (*diagram.encoder, *diagram.decoder):
        cost = node.cost + node.up_cost + node.merge_cost
        rows.append(
            [
                node_name(node),
                inputs_text(node),
                "x".join(map(str, node.entering)) if node.up else "",
                "x".join(map(str, node.shape)),
                f"{cost.parameters:,}" if cost.parameters else "",
                flops_text(cost.flops),
                "x".join(map(str, node.field)) if node.shape[-1] else "",
            ]
        )
    lines = _aligned(rows)
    for node in diagram.decoder:
        carried = [size_text(s.shape[:-1]) for s in node.skips if s.used != s.shape]
        if carried:
            used = size_text(node.skips[0].used[:-1])
            lines.append(f"{node_name(node)}: {', '.join(carried)} cropped to {used}")
        gated = [f"X[{node.row},{skip.column}]" for skip in node.skips if skip.gate]
        if gated:
            lines.append(f"{node_name(node)}: gates for {', '.join(gated)}")
        if fit_text(node):
            lines.append(
                f"{node_name(node)}: up {size_text(node.up or ())} {fit_text(node)}"
            )
    return lines


def text(diagram: Diagram) -> str:
    """A diagram for a terminal, at most 100 columns of plain ASCII.

    Args:
        diagram: Of `describe`.

    Returns:
        Several lines: the U (for UNet++ its triangle and a table of its nodes), then
        the totals and the receptive field.
    """
    lines = [diagram.title, ""]
    if diagram.nested:
        lines.append(f"image {size_text(diagram.image)}")
        lines += ["", *_grid_lines(diagram), "", *_node_table(diagram)]
        if diagram.bottleneck:
            lines.append(f"bottleneck: {_cost(diagram.bottleneck.cost)}")
        lines += [
            f"{h.name} after X[0,{h.column}]: {size_text(h.shape)}, {_cost(h.cost)}"
            for h in diagram.heads
        ]
        mean = ", the mean of the heads'" if len(diagram.heads) > 1 else ""
        lines.append(f"logits {size_text(diagram.logits)}{mean}")
    else:
        lines += _u_lines(diagram)
    lines.append("")
    shares = {
        "encoder": summed(n.cost for n in diagram.encoder),
        "bottleneck": diagram.bottleneck.cost if diagram.bottleneck else Cost(),
        "decoder": summed(n.cost + n.up_cost + n.merge_cost for n in diagram.decoder),
        "head": summed(h.cost for h in diagram.heads),
    }
    for name, shown in (("parameters", "{:,}".format), ("flops", flops_text)):
        parts = " + ".join(
            f"{key} {shown(getattr(cost, name)).strip()}"
            for key, cost in shares.items()
            if getattr(cost, name)
        )
        label = "FLOPs" if name == "flops" else name
        lines.append(f"{label}: {shown(getattr(diagram.total, name))} = {parts}")
    lines.append(f"receptive field of a logit: {size_text(diagram.field)} pixels")
    lines += [f"  and more: {note}" for note in diagram.notes]
    lines.append("(a multiply-add counts as 2 FLOPs; a cell sees so much of the image)")
    return "\n".join(lines)
