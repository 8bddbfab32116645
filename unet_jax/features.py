"""Seeing a net at work: its maps and gates as one picture, one pixel down and up it.

    predictor = unet_jax.Predictor("runs/cells")
    maps = features.feature_maps(predictor, image)
    print(features.trace(maps, (40, 57)))  # what became of that pixel
    feature_sheet.picture(maps)  # u8[H, W, 3]: a row a level, its strongest channels

The image is mirrored, run and cut as in `unet_jax.predict`, whole and never in tiles.
All panels of a picture show the same piece of the image, so that a place in one is the
same place in all; what a net without padding has lost at the border stays empty there.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unet_jax import models
from unet_jax.checkpoint import Meta
from unet_jax.geometry import Axis, Span
from unet_jax.layers import crop, mirror
from unet_jax.models import UNet
from unet_jax.normalisation import normalise
from unet_jax.predict import Predictor, decide
from unet_jax.types import Array, InputError, NumpyArray, Pads, PyTree, Shape, size_text

if TYPE_CHECKING:
    pass

Field = tuple[Span, ...]
"""The first and the last pixel along each axis"""

_AXES = {2: ("rows", "columns"), 3: ("slices", "rows", "columns")}
_WHOLE = {"instance": "instance norm", "group": "group norm"}


class Map(NamedTuple):
    """One feature map of a net.

    Attributes:
        name: ``down 0`` is the finest of the encoder, ``up 0`` of the decoder; a node
            of UNet++ is ``X[row,column]``.
        level: 0 is the finest.
        up: Whether the decoder made it.
        value: ``f32[*S, C]``.
        gates: The attention gates of the skips that went into it, ``f32[*S]`` each.
        axes: The net along each axis, ending at this map.
    """

    name: str
    level: int
    up: bool
    value: NumpyArray
    gates: tuple[NumpyArray, ...]
    axes: tuple[Axis, ...]


@dataclasses.dataclass(frozen=True)
class FeatureMaps:
    """All that a net computed on the way from one image to its answer.

    Attributes:
        model, meta: Of the predictor.
        image: ``[*S, C]`` as it was given.
        given: ``f32[*P, C]``: normalised and mirrored, what the net saw.
        pads: By how many pixels it was mirrored.
        encoder: The encoder's maps ``f32[*S, C]``, finest first; the last is the
            bottleneck.
        decoder: The last map of each level of the decoder, finest first.
        grid: UNet++: the nodes, ``grid[row][column]``; else empty.
        gates: As in the net's ``aux``, without the batch; empty where it has none.
        heads: Deep supervision: the logits of each head.
        logits: ``f32[*S', K]``.
        probability: Likewise.
        label: As in `unet_jax.predict.Prediction`.
        begin: The pixel of the image that the first pixel of ``logits`` is about; not
            0 only where a valid net was given less than `unet_jax.models.pads`.
    """

    model: UNet
    meta: Meta
    image: NumpyArray
    given: NumpyArray
    pads: Pads
    encoder: tuple[NumpyArray, ...]
    decoder: tuple[NumpyArray, ...]
    grid: tuple[tuple[NumpyArray, ...], ...]
    gates: tuple[Any, ...]
    heads: tuple[NumpyArray, ...]
    logits: NumpyArray
    probability: NumpyArray
    label: NumpyArray
    begin: Shape

    @property
    def size(self) -> Shape:
        """The image's spatial size."""
        return self.image.shape[:-1]

    @property
    def maps(self) -> tuple[Map, ...]:
        """Every map that has channels, in the order in which the net makes them."""
        model, rank, found = self.model, len(self.size), []
        axes = models.axes(model, rank)
        for level, value in enumerate(self.encoder):
            name = f"X[{level},0]" if self.grid else f"down {level}"
            found.append(Map(name, level, False, value, (), axes))
        if not self.grid:
            for level in reversed(range(len(self.decoder))):
                gates = self.gates[level] if self.gates else ()
                value = self.decoder[level]
                found.append(Map(f"up {level}", level, True, value, gates, axes))
        for column in range(1, len(self.grid)):
            for row in range(len(self.grid) - column):
                # A node ends a smaller net of its own.
                axes = models.axes(model.clone(level=row + column), rank)
                gates = self.gates[row][column] if self.gates else ()
                value, name = self.grid[row][column], f"X[{row},{column}]"
                found.append(Map(name, row, True, value, gates, axes))
        return tuple(m for m in found if m.value.shape[-1])

    def place(self, size: Sequence[int], level: int) -> tuple[Shape, Shape]:
        """Where the cells of a map lie on the image.

        Args:
            size: The map's spatial size.
            level: 0 is the finest.

        Returns:
            The pixel at which the first cell begins, which is below 0 where it is a
            mirrored one, and the pixels from one cell to the next, along each axis.
        """
        begin, jump = [], []
        axes = models.axes(self.model, len(self.size))
        for i, (axis, n) in enumerate(zip(axes, size, strict=True)):
            cell = int(np.prod(axis.strides[:level]))
            # What convolutions without padding lose, they lose at both sides alike.
            lost = (self.given.shape[i] - n * cell) // 2 if axis.valid else 0
            begin.append(lost - self.pads[i][0])
            jump.append(cell)
        return tuple(begin), tuple(jump)


def feature_maps(
    predictor: Predictor,
    image: Any,
    *,
    pads: Pads | None = None,
    name: str = "the image",
) -> FeatureMaps:
    """Runs a net on a whole image and keeps everything on the way.

    Args:
        predictor: The net.
        image: As for a call of the predictor.
        pads: Pixels to mirror around the image; None: those of `unet_jax.models.pads`,
            as in prediction. None at all, ``((0, 0), (0, 0))``, gives a valid net what
            the paper's figure 1 shows: 572 in, the middle 388 out.
        name: What messages call the image.

    Returns:
        The maps as NumPy arrays. Those of a net that pads are cut to the cells that
        the image has pixels in.

    Raises:
        InputError: As for a call of the predictor, or pads with which a valid net does
            not work.
    """
    model, meta = predictor.model, predictor.meta
    pixels = predictor.prepare(image, name=name)
    size = pixels.shape[:-1]
    pads = models.pads(model, size) if pads is None else pads
    squash = jax.nn.softmax if meta.task == "classes" else jax.nn.sigmoid

    def run(variables: PyTree, image: Array) -> Any:
        given = normalise(image, meta.normalisation)
        logits, aux = model.apply(variables, given, train=False)
        logits = logits.astype(jnp.float32)
        aux = jax.tree.map(lambda x: x.astype(jnp.float32), aux)
        return given, logits, squash(logits), aux

    models.check_joins(model)
    padded = mirror(pixels, pads, axis=0)
    try:
        out = jax.device_get(jax.jit(run)(predictor.variables, padded[None]))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"all the maps of {name} of size {size_text(size)} do not fit into memory"
            " at once: give a smaller piece of it."
        ) from error
    given, logits, probability, aux = jax.tree.map(lambda x: x[0], out)
    axes = models.axes(model, len(size))

    def cut(x: NumpyArray, level: int) -> NumpyArray:
        """Without what is only beyond the image."""
        if model.padding == "valid":
            return x
        cells = [int(np.prod(axis.strides[:level])) for axis in axes]
        pairs = zip(size, cells, strict=True)
        return x[tuple(slice(0, -(-n // cell)) for n, cell in pairs)]

    def cut_all(levels: Any) -> tuple[Any, ...]:
        return tuple(
            jax.tree.map(lambda x, level=level: cut(x, level), tree)
            for level, tree in enumerate(levels)
        )

    margin = models.margin(model, len(size))
    first = [m - before for m, (before, _) in zip(margin, pads, strict=True)]
    covered = tuple(slice(max(-f, 0), n - f) for n, f in zip(size, first, strict=True))
    heads = aux.get("heads", ()) if model.nested else ()  # others are coarser
    smallest = logits.shape[:-1]  # deeper heads of a valid net answer for less
    logits, probability = logits[covered], probability[covered]
    array = np.asarray(image)
    gates = jax.tree.map(lambda gate: gate[..., 0], aux.get("gates", ()))
    return FeatureMaps(
        model=model,
        meta=meta,
        image=array if array.ndim > meta.rank else array[..., None],
        given=given,
        pads=pads,
        encoder=cut_all(aux["encoder"]),
        decoder=cut_all(aux["decoder"]),
        grid=cut_all(aux.get("grid", ())),
        gates=cut_all(gates),
        heads=tuple(crop(head, smallest, axis=0)[covered] for head in heads),
        logits=logits,
        probability=probability,
        label=decide(probability, task=meta.task, threshold=meta.threshold),
        begin=tuple(max(f, 0) for f in first),
    )


# --- One pixel -----------------------------------------------------------------------


class Visit(NamedTuple):
    """What a map has for one pixel of the image.

    Attributes:
        map: The map.
        cell: The index of the cell that the pixel lies in.
        field: What the cell sees of `FeatureMaps.given`, mirrored pixels included.
        values: ``f32[C]``, the activations of the cell.
        gates: The gates' values there.
    """

    map: Map
    cell: Shape
    field: Field
    values: NumpyArray
    gates: tuple[float, ...]


def visits(maps: FeatureMaps, pixel: Sequence[int]) -> tuple[Visit, ...]:
    """Follows one pixel through every map of a net.

    Args:
        maps: What `feature_maps` returned.
        pixel: Its index along each axis of the image.

    Raises:
        InputError: No pixel of the image.
    """
    return tuple(_visit(maps, m, check_pixel(maps, pixel)) for m in maps.maps)


def check_pixel(maps: FeatureMaps, pixel: Sequence[int]) -> Shape:
    """The pixel as whole numbers.

    Args:
        maps: What `feature_maps` returned.
        pixel: An index along each axis of the image.

    Raises:
        InputError: Another number of numbers, or outside the image or outside what the
            net answers for.
    """
    size, pixel = maps.size, tuple(int(p) for p in pixel)
    given = ",".join(map(str, pixel))
    if len(pixel) != len(size):
        example = ",".join(str(n // 2) for n in size)
        raise InputError(
            f"the pixel {given} has {len(pixel)} numbers and the image {len(size)}"
            f" axes, {' and '.join(_AXES[len(size)])}: give one an axis, such as"
            f" {example}."
        )
    ends = zip(pixel, maps.begin, maps.logits.shape[:-1], strict=True)
    if not all(begin <= p < begin + n for p, begin, n in ends):
        shape = maps.logits.shape[:-1]
        pairs = zip(maps.begin, shape, strict=True)
        ranges = " and ".join(
            f"{name} {begin} to {begin + n - 1}"
            for name, (begin, n) in zip(_AXES[len(size)], pairs, strict=True)
        )
        raise InputError(
            f"the pixel {given} is outside the image of {size_text(size)}"
            + (f", of which the net answers for {ranges}" * (shape != size))
            + f": choose one in {ranges}."
        )
    return pixel


def _visit(maps: FeatureMaps, m: Map, pixel: Shape) -> Visit:
    cell, field = [], []
    for i, axis in enumerate(m.axes):
        size = maps.given.shape[i]
        at = pixel[i] + maps.pads[i][0]
        cells = axis.cell_up(size, at) if m.up else axis.cell_down(size, at)
        cell.append(cells[m.level])
        see = axis.field_up if m.up else axis.field_down
        field.append(tuple(see(size, m.level, cells[m.level])))
    gates = []
    for gate in m.gates:
        # A gate has the size of the merge, before the block of a valid net cuts it.
        begin, jump = maps.place(gate.shape, m.level)
        there = zip(pixel, begin, jump, gate.shape, strict=True)
        index = tuple(min((p - b) // j, n - 1) for p, b, j, n in there)
        gates.append(float(gate[index]))
    return Visit(m, tuple(cell), tuple(field), m.value[tuple(cell)], tuple(gates))


def strongest(values: NumpyArray, count: int) -> list[int]:
    """The channels of greatest mean absolute activation, the greatest first.

    Args:
        values: ``[*S, C]``, or ``[C]``.
        count: How many at most.
    """
    axes = tuple(range(values.ndim - 1))
    mean = np.abs(values).mean(axes, dtype=np.float64)
    return np.argsort(-mean, kind="stable")[:count].tolist()


def trace(
    maps: FeatureMaps, pixel: Sequence[int], *, channels: int = 4, name: str = ""
) -> str:
    """What becomes of one pixel, down the net and up again, as text.

    Args:
        maps: What `feature_maps` returned.
        pixel: Its index along each axis of the image, from 0.
        channels: How many of each cell's channels to tell, the strongest first.
        name: Of the image.

    Returns:
        Lines: the pixel's value; of each map the cell over the pixel, what it sees and
        its strongest channels; the logits, the probabilities and the decision.

    Raises:
        InputError: No pixel of the image.
    """
    pixel = check_pixel(maps, pixel)
    at = tuple(p + before for p, (before, _) in zip(pixel, maps.pads, strict=True))
    size, given = maps.size, maps.given.shape[:-1]
    lines = [
        f"pixel {_index(pixel)} of {name or 'the image'}, {size_text(size)}:"
        f" {_numbers(maps.image[pixel])} as stored, {_numbers(maps.given[at])}"
        " normalised"
    ]
    if given != size:
        there = f", where the pixel is {_index(at)}" * (at != pixel)
        below = "below 0 or " * (at != pixel)
        lines.append(
            f"the image is mirrored beyond its border to {size_text(given)}{there};"
            f" what is {below}beyond {_index([n - 1 for n in size])} is the mirror"
        )
    if beyond := _beyond_field(maps.model):
        lines.append(f"what is seen does not count {beyond}, which see everything")
    for visit in visits(maps, pixel):
        lines += ["", *_visit_lines(maps, visit, channels)]
    lines += ["", *_answer_lines(maps, pixel)]
    return "\n".join(lines)


def _visit_lines(maps: FeatureMaps, visit: Visit, channels: int) -> list[str]:
    value = visit.map.value
    best = strongest(visit.values, channels)
    lines = [
        f"{visit.map.name}: {size_text(value.shape[:-1])}, {value.shape[-1]} channels;"
        f" at {_index(visit.cell)}",
        f"    sees {_seen(maps, visit.field)}",
        "    strongest: " + ", ".join(f"#{k} {visit.values[k]:.3f}" for k in best),
    ]
    if visit.gates:
        text = ", ".join(f"{gate:.3f}" for gate in visit.gates)
        lines.append(f"    gate of the skip: {text}")
    return lines


def _seen(maps: FeatureMaps, field: Field) -> str:
    """A field in pixels of the image."""
    names, spans = _AXES[len(maps.size)], []
    for name, (first, last), (before, _) in zip(names, field, maps.pads, strict=True):
        spans.append(f"{name} {first - before} to {last - before}")
    wide = size_text([last - first + 1 for first, last in field])
    return f"{wide}: {', '.join(spans)}"


def _answer_lines(maps: FeatureMaps, pixel: Shape) -> list[str]:
    meta = maps.meta
    there = tuple(p - b for p, b in zip(pixel, maps.begin, strict=True))
    logits, probability = maps.logits[there], maps.probability[there]
    order = range(len(logits))
    if len(logits) > 8:
        order = np.argsort(-probability, kind="stable")[:8].tolist()

    def named(values: NumpyArray) -> str:
        return ", ".join(f"{meta.label_names[k]} {values[k]:.4f}" for k in order)

    lines = []
    for i, head in enumerate(maps.heads):
        lines.append(f"logits of head {i + 1}: {named(head[there])}")
    axes = models.axes(maps.model, len(pixel))
    field = tuple(
        axis.field(n, p + before - axis.margin)
        for axis, n, p, (before, _) in zip(
            axes, maps.given.shape, pixel, maps.pads, strict=False
        )
    )
    lines.append(f"logits: {named(logits)}")
    lines.append(f"    see {_seen(maps, field)}")
    if meta.task == "classes":
        chosen = meta.label_names[int(maps.label[there])]
        lines.append(f"softmax: {named(probability)}")
        return [*lines, f"decision: {chosen}, the most probable"]
    label = np.atleast_1d(maps.label[there])
    yes = [n for n, on in zip(meta.label_names, label, strict=True) if on]
    lines.append(f"sigmoid: {named(probability)}")
    return [
        *lines,
        f"decision: {', '.join(yes) or 'none'}, above {meta.threshold:g}",
    ]


def _beyond_field(model: UNet) -> str:
    """What in a net sees more than the kernels reach, in words."""
    parts = [_WHOLE.get(model.norm, "")]
    if model.excite != "none":
        parts.append("the weights of the channels")
    if model.bottleneck != "none":
        parts.append("the bottleneck's attention")
    return " and ".join(part for part in parts if part)


def _index(index: Sequence[int]) -> str:
    return f"({', '.join(map(str, index))})"


def _numbers(values: NumpyArray) -> str:
    return ", ".join(f"{float(v):.4g}" for v in values)
