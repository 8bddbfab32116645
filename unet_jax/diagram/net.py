"""What a net is: every node's shape, what skips carry, what each part costs.

Every number is read off the net's trace (shapes, FLOPs), its variables (parameters) or
its geometry (receptive fields). Nothing is compiled or run.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unet_jax import models
from unet_jax.decoders import UNetPlusPlusDecoder
from unet_jax.merges import Concat, Gated, NoSkip
from unet_jax.models import UNet
from unet_jax.report import count_flops, count_parameters
from unet_jax.types import Array, InputError, PyTree, Shape


@dataclass(frozen=True)
class Cost:
    """What a part owns and does for one image.

    Attributes:
        parameters: How many numbers it learns.
        flops: Of its convolutions and matrix products; a multiply-add counts as 2.
    """

    parameters: int = 0
    flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.parameters + other.parameters, self.flops + other.flops)


@dataclass(frozen=True)
class Skip:
    """What a skip carries. Shapes are ``(*S, C)``.

    Attributes:
        column: Of the node of the same row that it comes from; 0 is the encoder's.
        shape: Of that node's map.
        used: After cropping.
        gate: Of the attention gate that it goes through, or None.
    """

    column: int
    shape: Shape
    used: Shape
    gate: Shape | None = None


@dataclass(frozen=True)
class Node:
    """A level of the encoder or decoder, or a node of UNet++. Shapes are ``(*S, C)``.

    Attributes:
        row: Its level, 0 the finest.
        column: 0 in the encoder; UNet++'s j; of a U-Net's decoder depth - row.
        entering: What its block gets: pooled, or up-sampled map and skips merged.
        shape: What comes out of it.
        cost: Of its block.
        field: Pixels along each axis that a cell of it sees, in an image without
            borders (`unet_jax.geometry.Axis.receptive_field`).
        up: What the map of the level below was up-sampled to, None in the encoder.
        fitted: The same after zeros or cropping gave it the size of the skips.
        how: ``concat`` | ``gated`` | ``sum`` ...: how skips join it; none: ``no skip``.
        skips: What joins it, oldest first.
        up_cost: Of up-sampling.
        merge_cost: Of joining, such as by gates.
    """

    row: int
    column: int
    entering: Shape
    shape: Shape
    cost: Cost
    field: Shape
    up: Shape | None = None
    fitted: Shape | None = None
    how: str = ""
    skips: tuple[Skip, ...] = ()
    up_cost: Cost = Cost()
    merge_cost: Cost = Cost()


@dataclass(frozen=True)
class Part:
    """The bottleneck or a head.

    Attributes:
        name: As in the variables.
        column: Of the node that it comes after.
        shape: What comes out, ``(*S, C)``.
        cost: Of all of it.
    """

    name: str
    column: int
    shape: Shape
    cost: Cost


@dataclass(frozen=True)
class Diagram:
    """A net on an image of one size.

    Attributes:
        title: The net in words.
        image: ``(*S, C)``.
        logits: ``(*S', K)``.
        encoder: Its levels, finest first.
        decoder: Its nodes in the order in which they run.
        bottleneck: What stands between them, or None.
        heads: What makes the logits; their mean where there are several.
        nested: Whether the decoder is the grid of UNet++.
        field: Pixels along each axis that a logit sees, in an image without borders.
        total: Of the whole net.
        notes: What the receptive fields leave out.
    """

    title: str
    image: Shape
    logits: Shape
    encoder: tuple[Node, ...]
    decoder: tuple[Node, ...]
    bottleneck: Part | None
    heads: tuple[Part, ...]
    nested: bool
    field: Shape
    total: Cost
    notes: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        """How many levels there are below the finest."""
        return len(self.encoder) - 1

    def node(self, row: int, column: int) -> Node | None:
        """The node ``X[row, column]``, if there is one."""
        every = (*self.encoder, *self.decoder)
        found = (n for n in every if (n.row, n.column) == (row, column))
        return next(found, None)


@dataclass(frozen=True)
class _Call:
    """A module's call while it was traced, arrays as shapes without the batch axis."""

    module: nn.Module
    args: Any
    out: Any


def _traced(
    model: UNet, variables: PyTree, image: Any
) -> tuple[dict[str, _Call], dict[str, Cost]]:
    """Each module's call by its path, and what each part costs.

    Of several calls of a module the last; costs by the first two names of a path.
    """
    calls: dict[str, _Call] = {}

    def shapes(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: tuple(x.shape[1:]) if hasattr(x, "shape") else x, tree
        )

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if context.method_name == "__call__":
            path = "/".join(context.module.path)
            calls[path] = _Call(context.module, shapes(args), shapes(out))
        return out

    def forward(variables: PyTree, image: Array) -> Array:
        return model.apply(variables, image, train=False)[0]

    with nn.intercept_methods(watch):
        flops = count_flops(forward, variables, image, depth=3)
    costs: dict[str, Cost] = {}
    for path, count in count_parameters(variables["params"]).items():
        costs[path] = Cost(parameters=count)
    for path, count in flops.items():
        path = path.partition("/")[2]
        costs[path] = costs.get(path, Cost()) + Cost(flops=count)
    return calls, costs


def summed(costs: Iterable[Cost]) -> Cost:
    """The costs of several parts as one."""
    return sum(costs, Cost())


def _level_of(name: str, out: Any, pyramid: Sequence[Shape], last: int) -> int:
    """The encoder's level that a module of it works for.

    By its name where that has the level's number; else (a ResNet's stem) the level
    whose map has the shape that it gives out.
    """
    found = re.match(r"(?:level|dropout)(\d+)", name)
    if found:
        return int(found[1])
    levels = range(last, len(pyramid))
    return next((i for i in levels if pyramid[i] == out), last)


def _encoder(
    calls: Mapping[str, _Call], costs: Mapping[str, Cost], fields: Sequence[Shape]
) -> tuple[Node, ...]:
    pyramid: tuple[Shape, ...] = calls["encoder"].out
    # A ResNet has no module for the full size, whose map has no channels.
    entering: dict[int, Shape] = {0: calls["encoder"].args[0]}
    level, levels = 0, {}
    order = [path for path in calls if re.fullmatch(r"encoder/[^/]+", path)]
    for path in order:
        call, name = calls[path], path.partition("/")[2]
        level = levels[path] = _level_of(name, call.out, pyramid, level)
        entering.setdefault(level, call.args[0])  # of its first module
    return tuple(
        Node(
            row=row,
            column=0,
            entering=entering.get(row, shape),
            shape=shape,
            cost=summed(costs.get(p, Cost()) for p, i in levels.items() if i == row),
            field=fields[row],
        )
        for row, shape in enumerate(pyramid)
    )


def _how(call: _Call) -> str:
    """How a merge joins, in a word."""
    module, skips = call.module, call.args[0]
    if isinstance(module, NoSkip) or not any(shape[-1] for shape in skips):
        return "no skip"
    if isinstance(module, Gated):
        return "gated" if call.out[1] else "concat"
    return "concat" if isinstance(module, Concat) else type(module).__name__.lower()


def _decoder(
    calls: Mapping[str, _Call],
    costs: Mapping[str, Cost],
    encoder: Sequence[Node],
    fields: Mapping[tuple[int, int], Shape],
) -> tuple[Node, ...]:
    shapes = {(node.row, 0): node.shape for node in encoder}
    nodes: list[Node] = []
    for path in calls:
        found = re.fullmatch(r"decoder/(?:level|node)(\d+)(?:_(\d+))?", path)
        if not found:
            continue
        row = int(found[1])
        column = int(found[2]) if found[2] else len(encoder) - 1 - row
        end = f"{row}_{column}" if found[2] else f"{row}"
        up, merge = (calls[f"decoder/{name}{end}"] for name in ("up", "merge"))
        used, fitted, _ = merge.args
        gates = iter(merge.out[1])
        skips = []
        for earlier, shape in enumerate(used):
            if (row, earlier) in shapes:  # a ResNet has no map of the full size
                gate = next(gates, None) if shape[-1] else None
                skips.append(Skip(earlier, shapes[row, earlier], shape, gate))
        node = Node(
            row=row,
            column=column,
            entering=merge.out[0],
            shape=calls[path].out,
            cost=costs.get(path, Cost()),
            field=fields[row, column],
            up=up.out,
            fitted=fitted,
            how=_how(merge),
            skips=tuple(skips),
            up_cost=costs.get(f"decoder/up{end}", Cost()),
            merge_cost=costs.get(f"decoder/merge{end}", Cost()),
        )
        shapes[row, column] = node.shape
        nodes.append(node)
    return tuple(nodes)


def _notes(model: UNet) -> tuple[str, ...]:
    """What sees further than convolutions do."""
    notes = []
    if model.bottleneck != "none":
        notes.append("self-attention in the bottleneck sees the whole image")
    if model.excite != "none":
        notes.append("squeeze-and-excitation sees the mean of the whole map")
    if model.norm in ("instance", "group"):
        notes.append(f"{model.norm} norm sees the statistics of the whole map")
    return tuple(notes)


def describe(model: UNet, size: Sequence[int], channels: int) -> Diagram:
    """Traces a net and says what becomes of an image in it.

    Args:
        model: The net.
        size: The image's spatial size, two or three numbers.
        channels: The image's.

    Returns:
        The diagram. Nothing is compiled or run, so any size is quick.

    Raises:
        InputError: A size the net does not work at, or not one of an image.
    """
    if len(size) not in (2, 3) or min(size) < 1 or channels < 1:
        raise InputError(
            f"an image of size {tuple(size)} with {channels} channel(s) cannot be: give"
            " two or three numbers above 0, such as 572 572, and at least one channel."
        )
    models.check_joins(model)
    image = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    calls, costs = _traced(model, variables, image)
    axes = models.axes(model, len(size))
    grids = [along.seen_grid() for along in axes]
    fields = {
        (i, j): tuple(grid[i][j] for grid in grids)
        for i, row in enumerate(grids[0])
        for j in range(len(row))
    }
    encoder = _encoder(calls, costs, [fields[i, 0] for i in range(model.depth + 1)])
    bottleneck = None
    if "bottleneck" in calls:
        cost = summed(c for p, c in costs.items() if p.startswith("bottleneck"))
        bottleneck = Part("bottleneck", 0, calls["bottleneck"].out, cost)
    nested = isinstance(calls["decoder"].module, UNetPlusPlusDecoder)
    # Of heads on coarser levels, which help in training only, the finest is shown.
    name = r"head\d*" if nested else "head0?"
    heads = tuple(
        Part(
            path, int(path[4:]) if nested and path[4:] else model.depth, call.out, cost
        )
        for path, call in calls.items()
        if (cost := costs.get(path)) and re.fullmatch(name, path)
    )
    parts = (model.encoder, model.decoder, model.block)
    words = [p if isinstance(p, str) else "custom" for p in parts]
    return Diagram(
        title=f"encoder {words[0]}, decoder {words[1]}, block {words[2]},"
        f" padding {model.padding}",
        image=(*size, channels),
        logits=calls[""].out[0],
        encoder=encoder,
        decoder=_decoder(calls, costs, encoder, fields),
        bottleneck=bottleneck,
        heads=heads,
        nested=nested,
        field=tuple(along.receptive_field for along in axes),
        total=summed(costs.values()),
        notes=_notes(model),
    )
