"""The picture of a net at work, and the files it is made from and written to.

A row of panels for each of the maps of `unet_jax.features`, all of one piece of the
image: first the image or the prediction, then the strongest channels, then the gates.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from unet_jax import overlay
from unet_jax.data import formats, images, stacks
from unet_jax.features import (
    FeatureMaps,
    Field,
    Visit,
    check_pixel,
    feature_maps,
    strongest,
    trace,
    visits,
)
from unet_jax.pictures import class_colours
from unet_jax.predict import Predictor
from unet_jax.predict_files import find_inputs
from unet_jax.types import InputError, NumpyArray, Shape, size_text

if TYPE_CHECKING:
    from PIL import Image as PilImage

SIDE = 144  # pixels that the image's longer side is brought to
GAP, LINE, MARGIN = 8, 14, 116  # between panels; of a line of text; left of a row
EMPTY = (232, 232, 232)  # where a map has nothing
MARK = (213, 94, 0)  # of the pixel and of what is seen of the image


class _Panel(NamedTuple):
    """A picture ``u8[h, w, 3]``, where it lies on the image, and its caption."""

    caption: str
    pixels: NumpyArray
    begin: Sequence[int]
    jump: Sequence[int]
    field: Field | None = None


class _Row(NamedTuple):
    lines: tuple[str, ...]
    panels: tuple[_Panel, ...]


def picture(
    maps: FeatureMaps, *, channels: int = 8, pixel: Sequence[int] | None = None
) -> NumpyArray:
    """The strongest channels and the gates of every level as one picture.

    A row a level, down and up again (UNet++: a row a node, column by column), and the
    answer. First the image as coarse as the level's cells, or the prediction; then the
    strongest channels, each in colours from its own low (dark) to its own high values
    (bright) with its number and its range; then the gates as heat over the image. Of
    a volume the middle slice is shown, or that of the pixel.

    Args:
        maps: What `feature_maps` returned.
        channels: How many channels of each level.
        pixel: One to mark in every panel, with what its cells see.

    Returns:
        ``u8[H, W, 3]``.

    Raises:
        InputError: No channels, or no pixel of the image.
    """
    if channels < 1:
        raise InputError(f"channels = {channels} shows nothing: use 1 or more.")
    shape = maps.logits.shape[:-1]
    middle = [b + n // 2 for b, n in zip(maps.begin, shape, strict=True)]
    at = check_pixel(maps, middle if pixel is None else pixel)
    rows = [_given_row(maps, at)]
    for visit in visits(maps, at):
        rows.append(_map_row(maps, visit, at, channels, boxed=pixel is not None))
    rows.append(_answer_row(maps, at, channels))
    return _sheet(maps, rows, at, marked=pixel is not None)


def _flat(array: NumpyArray, at: Shape, place: tuple[Shape, Shape]) -> NumpyArray:
    """The slice of a map that lies at the pixel; of an image all of it."""
    if len(at) == 2:
        return array
    (begin, *_), (jump, *_) = place
    return array[min(max((at[0] - begin) // jump, 0), len(array) - 1)]


def _grey(image: NumpyArray) -> NumpyArray:
    """``[H, W, C]`` in grey or colour, from its least to its greatest value."""
    nothing = np.zeros(image.shape[:-1], np.uint8)
    return overlay.draw(image, nothing, task="classes", label_names=())


def _heat(
    values: NumpyArray, name: str, ends: tuple[float, float] | None = None
) -> NumpyArray:
    """``[H, W]`` in the colours of one of matplotlib's maps: ``u8[H, W, 3]``.

    Args:
        values: What to show.
        name: Of the map of colours.
        ends: The values of its ends; None: the least and the greatest value, but that
            one pixel in a hundred may lie beyond each, else a few glints leave the
            rest of a map of thousands of pixels dark.
    """
    from matplotlib import colormaps

    values = values.astype(np.float64)
    if ends is None:
        low, high = np.percentile(values, (1, 99)).tolist()
        # Of a map that is nearly all zeros the glints are what there is to see.
        low, high = (low, high) if high > low else (values.min(), values.max())
    else:
        low, high = ends
    scaled = (values - low) / (high - low if high > low else 1.0)
    return colormaps[name](scaled, bytes=True)[..., :3]


def _range(values: NumpyArray) -> str:
    return f"{float(values.min()):.3g} to {float(values.max()):.3g}"


def _given_row(maps: FeatureMaps, at: Shape) -> _Row:
    """The image, and each of its channels as the net is given it."""
    size, given = maps.size, maps.given
    place = tuple(-before for before, _ in maps.pads), (1,) * len(size)
    image = _flat(maps.image, at, ((0,) * len(size), place[1]))
    panels = [_Panel("image", _grey(image), (0, 0), (1, 1))]
    lines = ["image", size_text(size)]
    if given.shape[:-1] != size:
        lines += ["mirrored to", size_text(given.shape[:-1])]
    shown = _flat(given, at, place)
    for k in range(given.shape[-1] if given.shape[-1] > 1 else 0):
        colours, text = _heat(shown[..., k], "gray"), _range(shown[..., k])
        panels.append(_Panel(f"#{k}  {text}", colours, place[0][-2:], (1, 1)))
    return _Row(tuple(lines), tuple(panels))


def _map_row(
    maps: FeatureMaps, visit: Visit, at: Shape, channels: int, *, boxed: bool
) -> _Row:
    m = visit.map
    place = maps.place(m.value.shape[:-1], m.level)
    begin, jump = place[0][-2:], place[1][-2:]
    inner = zip(visit.field, maps.pads, strict=True)
    field = tuple((first - pad, last - pad) for (first, last), (pad, _) in inner)
    box = field[-2:] if boxed else None
    coarse = _coarse(maps, at, m.level)
    if m.up:
        panels = [_prediction(maps, at)._replace(field=box)]
    else:
        caption = f"image by {size_text(place[1])}" if max(place[1]) > 1 else "image"
        panels = [_Panel(caption, coarse[0], coarse[1], jump, box)]
    for k in strongest(m.value, channels):
        values = _flat(m.value[..., k], at, place)
        colours, text = _heat(values, "viridis"), _range(values)
        panels.append(_Panel(f"#{k}  {text}", colours, begin, jump))
    for i, gate in enumerate(m.gates):
        place = maps.place(gate.shape, m.level)
        values = _flat(gate, at, place)
        heat, text = _heat(values, "inferno").astype(np.float32), _range(values)
        # The image in as many cells, below the heat.
        first = [g - c for g, c in zip(place[0][-2:], coarse[1], strict=True)]
        first = [f // j for f, j in zip(first, place[1][-2:], strict=True)]
        below = coarse[0][first[0] :, first[1] :][: heat.shape[0], : heat.shape[1]]
        mixed = (0.35 * below.astype(np.float32) + 0.65 * heat).astype(np.uint8)
        name = "gate" if len(m.gates) == 1 else f"gate {i}"
        panels.append(_Panel(f"{name}  {text}", mixed, place[0][-2:], place[1][-2:]))
    sees = size_text([last - first + 1 for first, last in visit.field])
    lines = (
        m.name,
        size_text(m.value.shape[:-1]),
        f"{m.value.shape[-1]} channels",
        f"stands for {size_text(place[1])}",
        f"sees {sees}",
    )
    return _Row(lines, tuple(panels))


def _coarse(maps: FeatureMaps, at: Shape, level: int) -> tuple[NumpyArray, Shape]:
    """What the net is given, a mean for each cell of the encoder, and its place."""
    value = maps.encoder[level]
    begin, jump = maps.place(value.shape[:-1], level)
    no_pads = tuple(-before for before, _ in maps.pads), (1,) * len(jump)
    image = _flat(maps.given, at, no_pads)
    (y, x), (dy, dx) = begin[-2:], jump[-2:]
    height, width = value.shape[-3:-1]
    y, x = y + maps.pads[-2][0], x + maps.pads[-1][0]
    piece = image[y : y + height * dy, x : x + width * dx]
    # Where a size does not divide, a strided convolution rounds up.
    missing = [(0, height * dy - piece.shape[0]), (0, width * dx - piece.shape[1])]
    piece = np.pad(piece, (*missing, (0, 0)), mode="edge")
    cells = piece.reshape(height, dy, width, dx, -1).mean((1, 3), dtype=np.float32)
    return _grey(cells), begin[-2:]


def _prediction(maps: FeatureMaps, at: Shape) -> _Panel:
    """The label drawn on the piece of the image that it is about."""
    rank, meta = len(at), maps.meta
    shape = maps.logits.shape[:-1]
    box = tuple(slice(b, b + n) for b, n in zip(maps.begin, shape, strict=True))
    place = maps.begin, (1,) * rank
    image, label = (_flat(x, at, place) for x in (maps.image[box], maps.label))
    drawn = overlay.draw(image, label, task=meta.task, label_names=meta.label_names)
    return _Panel("prediction", drawn, maps.begin[-2:], (1, 1))


def _answer_row(maps: FeatureMaps, at: Shape, channels: int) -> _Row:
    """The prediction, the probabilities, and what each head says by itself."""
    meta, shape = maps.meta, maps.logits.shape
    place = maps.begin, (1,) * len(at)
    panels = [_prediction(maps, at)]
    many = shape[-1] > channels
    order = strongest(maps.probability, channels) if many else range(shape[-1])
    for k in order:
        values = _flat(maps.probability[..., k], at, place)
        colours = _heat(values, "magma", (0.0, 1.0))
        caption = f"P({meta.label_names[k]})"
        panels.append(_Panel(caption, colours, maps.begin[-2:], (1, 1)))
    for i, head in enumerate(maps.heads):
        # The probability is monotonous in the logit: of two classes their difference.
        logits = _flat(head, at, place)
        values = logits[..., -1] - (logits[..., 0] if logits.shape[-1] == 2 else 0)
        colours, text = _heat(values, "viridis"), _range(values)
        panels.append(_Panel(f"head {i + 1}  {text}", colours, maps.begin[-2:], (1, 1)))
    squash = "softmax" if meta.task == "classes" else "sigmoid"
    lines = ("answer", size_text(shape[:-1]), f"{squash} of {shape[-1]}")
    return _Row(lines, tuple(panels))


def _drawn(panel: _Panel, size: Shape) -> "PilImage.Image":
    """A panel on the image's frame, enlarged or reduced to `SIDE`."""
    from PIL import Image, ImageDraw

    frame = np.full((*size, 3), EMPTY, np.uint8)
    pixels, inside = panel.pixels, []
    for axis in (0, 1):
        begin, jump = panel.begin[axis], panel.jump[axis]
        cell = (np.arange(size[axis]) - begin) // jump
        there = np.flatnonzero((cell >= 0) & (cell < pixels.shape[axis]))
        pixels = pixels.take(cell[there], axis=axis)
        inside.append(slice(there[0], there[-1] + 1))
    frame[tuple(inside)] = pixels
    scale = SIDE / max(size)
    height, width = (max(round(n * scale), 1) for n in size)
    way = Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
    drawn = Image.fromarray(frame).resize((width, height), way)
    if panel.field is not None:
        (top, bottom), (left, right) = panel.field
        corners = (left * scale, top * scale)
        corners += ((right + 1) * scale - 1, (bottom + 1) * scale - 1)
        ImageDraw.Draw(drawn).rectangle(corners, outline=MARK, width=2)
    return drawn


def _sheet(
    maps: FeatureMaps, rows: Sequence[_Row], at: Shape, *, marked: bool
) -> NumpyArray:
    """Rows of panels below one another, with their captions and a legend."""
    from PIL import Image, ImageDraw, ImageFont

    small, bold = (ImageFont.load_default(size=n) for n in (10, 13))
    size = maps.size[-2:]
    scale = SIDE / max(size)
    height, width = (max(round(n * scale), 1) for n in size)
    column = max(width, 96) + GAP
    heights = [max(height + LINE, LINE * len(r.lines) + 4) + GAP for r in rows]
    legend = _legend(maps, at)
    across = MARGIN + max(len(r.panels) for r in rows) * column + GAP
    down = sum(heights) + 2 * GAP + LINE * (len(legend) + 1)
    sheet = Image.new("RGB", (across, down), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    black = (0, 0, 0)
    y = GAP
    for row, high in zip(rows, heights, strict=True):
        for i, line in enumerate(row.lines):
            font, below = (small, 4) if i else (bold, 0)
            draw.text((GAP, y + i * LINE + below), line, fill=black, font=font)
        for i, panel in enumerate(row.panels):
            x = MARGIN + i * column
            draw.text((x, y), panel.caption, fill=black, font=small)
            sheet.paste(_drawn(panel, size), (x, y + LINE))
            if marked:
                v = y + LINE + (at[-2] + 0.5) * scale
                u = x + (at[-1] + 0.5) * scale
                for radius, colour in ((5, (255, 255, 255)), (4, MARK)):
                    ends = (u - radius, v - radius, u + radius, v + radius)
                    draw.ellipse(ends, outline=colour, width=1)
        y += high
    x = GAP
    colours = class_colours(maps.meta.label_names)
    for name, colour in zip(maps.meta.label_names, colours, strict=True):
        if name == "background":
            continue
        fill = tuple(map(int, colour))
        draw.rectangle((x, y + 2, x + 9, y + 11), fill=fill, outline=(90, 90, 90))
        draw.text((x + LINE, y), name, fill=black, font=small)
        x += LINE + int(small.getlength(name)) + 2 * GAP
    for i, line in enumerate(legend, start=1):
        draw.text((GAP, y + i * LINE), line, fill=black, font=small)
    return np.asarray(sheet)


def _legend(maps: FeatureMaps, at: Shape) -> list[str]:
    lines = [
        "#channel, strongest first by mean |activation|, with its least and greatest"
        " value; dark is low and bright is high, each panel by itself. P: from 0"
        " (black) to 1.",
    ]
    if any(m.gates for m in maps.maps):
        lines.append("gate: what the skip is multiplied by, as heat over the image.")
    if maps.heads:
        lines.append(
            "head: of each by itself, the last class's logit (of two, less the first)."
        )
    if len(maps.size) == 3:
        lines.append(f"Of the volume slice {at[0]} is shown.")
    return lines


# --- Files ---------------------------------------------------------------------------


def read(predictor: Predictor, path: str | os.PathLike[str]) -> NumpyArray:
    """One image or volume as a predictor takes it.

    Args:
        predictor: The net, which says how many axes it takes.
        path: A file as for ``unet-jax predict``. Of a stack, a 2-D net gets the middle
            page. A volume is resampled where the run resampled its own.

    Raises:
        InputError: Not one file, one that cannot be read, or one of other axes.
    """
    meta = predictor.meta
    paths = find_inputs([path])
    if len(paths) != 1:
        raise InputError(f"{path} holds {len(paths)} images: give one of them.")
    (file,) = paths
    name = file.name.lower()
    stack = name.endswith(stacks.SUFFIXES)
    if meta.rank == 2:
        if name.endswith(stacks.NIFTI) or (
            name.endswith((".tif", ".tiff")) and stacks.volume_size(file)[0][0] > 1
        ):
            pages = stacks.volume_size(file)[0][0]
            return stacks.read_volume(file, page=pages // 2)[0]
        return images.read_image(file)
    if not stack:
        raise InputError(
            f"{file} is a 2-D image and this net takes volumes: give a TIFF stack, a"
            " NIfTI volume or a 3-D npy array."
        )
    volume, geometry = stacks.read_volume(file)
    if not meta.spacing:
        return volume
    if geometry is None or min(geometry.spacing) <= 0:
        raise InputError(
            f"{file} does not say its voxel size, and this run resamples volumes to"
            f" {tuple(meta.spacing)}: save the volume as NIfTI."
        )
    volume = images.to_channels(volume, meta.channels, name=str(file))
    return stacks.resample(volume, geometry.spacing, meta.spacing, order=1)


def write(
    predictor: Predictor,
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    channels: int = 8,
    pixel: Sequence[int] | None = None,
) -> str:
    """Writes the picture of one file.

    Args:
        predictor: The net.
        path: The image, see `read`.
        out: The PNG; its folder is made.
        channels: How many channels of each level.
        pixel: One to follow and to mark.

    Returns:
        The `trace` of the pixel, or nothing without one.

    Raises:
        InputError: As for `read`, `picture` and `trace`, or a file that cannot be
            written.
    """
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise InputError(f"{out} is no PNG: let the name of the picture end in .png.")
    if out.exists() and out.samefile(path):
        raise InputError(f"{out} is the image itself: write to another file.")
    maps = feature_maps(predictor, read(predictor, path), name=str(path))
    drawn = picture(maps, channels=channels, pixel=pixel)
    with formats.writable(str(out)):
        out.parent.mkdir(parents=True, exist_ok=True)
    overlay.write(out, drawn)
    return "" if pixel is None else trace(maps, pixel, name=str(path))


def parse_pixel(text: str) -> Shape:
    """The pixel that ``--pixel=Y,X`` names, or ``Z,Y,X``.

    Raises:
        InputError: Not whole numbers with commas between.
    """
    parts = text.replace(" ", "").split(",")
    if not all(part.isdecimal() for part in parts):
        raise InputError(
            f"--pixel={text} is no pixel: give its row and column from 0, such as"
            " --pixel=40,57."
        )
    return tuple(map(int, parts))
