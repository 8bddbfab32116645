"""Pictures of images, labels and predictions, in colours that all people tell apart."""

import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from unet_jax.log import replace_file
from unet_jax.types import NumpyArray

if TYPE_CHECKING:
    from PIL import Image as PilImage

# Okabe and Ito's colours, which the colour-blind tell apart; blue and orange first.
PALETTE = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (213, 94, 0),
    (0, 114, 178),
    (255, 255, 255),
)
BACKGROUND = (0, 0, 0)
SIDE = 256  # pixels that an image's longer side is brought to
GAP, LINE = 8, 18  # pixels between panels, and of a line of text


def class_colours(label_names: Sequence[str]) -> NumpyArray:
    """The colour of each class or label: ``u8[K, 3]``.

    ``background`` is black; the others take `PALETTE` in turn.
    """
    number = 0
    colours = []
    for name in label_names:
        if name == "background":
            colours.append(BACKGROUND)
            continue
        colours.append(PALETTE[number % len(PALETTE)])
        number += 1
    return np.array(colours, np.uint8).reshape(-1, 3)


def _middle(array: NumpyArray, rank: int) -> NumpyArray:
    """The middle slice of a volume; an image as it is."""
    return array[array.shape[0] // 2] if rank == 3 else array


def _grey_or_colour(image: NumpyArray) -> NumpyArray:
    """``[H, W, C]`` of any type -> ``u8[H, W, 3]`` from its darkest to its brightest.

    Three channels are red, green and blue; of any other number the first is shown.
    """
    pixels = np.asarray(image if image.shape[-1] == 3 else image[..., :1], np.float64)
    finite = np.isfinite(pixels)
    if not finite.any():
        return np.zeros((*pixels.shape[:2], 3), np.uint8)
    low, high = pixels[finite].min(), pixels[finite].max()
    pixels = np.where(finite, pixels, low)
    scaled = (pixels - low) * (255.0 / (high - low) if high > low else 0.0)
    return np.broadcast_to(scaled.round().astype(np.uint8), (*pixels.shape[:2], 3))


def colour_label(
    label: NumpyArray, colours: NumpyArray, weight: NumpyArray | None = None
) -> NumpyArray:
    """A label as a picture.

    Args:
        label: ``[H, W]`` class ids, or ``[H, W, K]`` zeros and ones, whose colours mix
            where labels overlap.
        colours: ``u8[K, 3]``.
        weight: Like ``label`` or None. Hatched in grey: where no weight is, and where
            a class id is none of the K.

    Returns:
        ``u8[H, W, 3]``.
    """
    label = np.asarray(label)
    if label.ndim == 3:
        present = (label > 0).astype(np.float64)
        counts = np.maximum(present.sum(-1, keepdims=True), 1.0)
        painted = (present @ colours.astype(np.float64) / counts).astype(np.uint8)
        void = np.zeros(label.shape[:2], bool)
    else:
        void = (label < 0) | (label >= len(colours))
        painted = colours[np.where(void, 0, label).astype(np.int64)]
    if weight is not None:
        some = np.asarray(weight) > 0
        void = void | ~(some.any(-1) if some.ndim == 3 else some)
    y, x = np.indices(void.shape)
    stripe = max(2, max(void.shape) // 64)
    hatch = np.where(((x + y) // stripe % 2 == 0)[..., None], 150, 90).astype(np.uint8)
    return np.where(void[..., None], hatch, painted).astype(np.uint8)


def _fitted(pixels: NumpyArray, *, smooth: bool) -> "PilImage.Image":
    """Enlarged by a whole factor, or reduced, towards a longer side of `SIDE`."""
    from PIL import Image

    height, width = pixels.shape[:2]
    longer = max(height, width)
    factor = max(SIDE // longer, 1) if longer <= SIDE else SIDE / longer
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    way = Image.Resampling.BOX if smooth and factor < 1 else Image.Resampling.NEAREST
    return Image.fromarray(np.ascontiguousarray(pixels)).resize(size, way)


def _panels(
    row: Mapping[str, NumpyArray], colours: NumpyArray
) -> "list[PilImage.Image]":
    """Image, truth and prediction of one example, all of one size."""
    rank = row["image"].ndim - 1
    image, label, prediction = (
        _middle(np.asarray(row[name]), rank)
        for name in ("image", "label", "prediction")
    )
    weight = row.get("weight")
    if weight is not None:
        weight = _middle(np.asarray(weight), rank)
    truth = colour_label(label, colours, weight)
    return [
        _fitted(_grey_or_colour(image), smooth=True),
        _fitted(truth, smooth=False),
        _fitted(colour_label(prediction, colours), smooth=False),
    ]


def _legend(label_names: Sequence[str], void: bool, width: int, font: Any) -> Any:
    """Lines of (x, name, number of the class or None for void) that fit the width."""
    lines: list[list[tuple[int, str, int | None]]] = [[]]
    x = GAP
    entries = [(name, k) for k, name in enumerate(label_names)]
    for name, k in [*entries, ("not counted", None)] if void else entries:
        length = LINE + int(font.getlength(name)) + 2 * GAP
        if lines[-1] and x + length > width:
            lines.append([])
            x = GAP
        lines[-1].append((x, name, k))
        x += length
    return lines


def picture(
    rows: Sequence[Mapping[str, NumpyArray]],
    path: str | os.PathLike[str],
    *,
    label_names: Sequence[str],
    limit: int = 4,
) -> None:
    """Writes a PNG of image | truth | prediction, an example a row.

    Intensities are stretched from the darkest to the brightest of each image; of a
    volume the middle slice is shown; small images are enlarged pixel by pixel.

    Args:
        rows: Of each example ``image [*S, C]``, ``label`` and ``prediction`` (``[*S]``
            class ids, or ``[*S, K]`` zeros and ones) and optionally ``weight`` like
            the label; pixels of weight 0 are hatched in the truth.
        path: The file; its folder is made.
        label_names: One a class or label, for the legend.
        limit: How many rows to draw at most.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=12)
    colours = class_colours(label_names)
    drawn = [_panels(row, colours) for row in rows[:limit]]
    void = any(np.any(np.asarray(r["weight"]) <= 0) for r in rows if "weight" in r)
    column = max([panels[0].width for panels in drawn] + [80])
    width = 3 * column + 4 * GAP
    legend = _legend(label_names, void, width, font)
    height = LINE + GAP + sum(p[0].height + GAP for p in drawn) + LINE * len(legend)
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(("image", "truth", "prediction")):
        draw.text((GAP + i * (column + GAP), 4), name, fill=(0, 0, 0), font=font)
    y = LINE + GAP // 2
    for panels in drawn:
        for i, panel in enumerate(panels):
            sheet.paste(panel, (GAP + i * (column + GAP), y))
        y += panels[0].height + GAP
    for line in legend:
        for x, name, k in line:
            colour = (120, 120, 120) if k is None else tuple(map(int, colours[k]))
            box = (x, y + 3, x + 11, y + 14)
            draw.rectangle(box, fill=colour, outline=(90, 90, 90))
            draw.text((x + LINE, y + 1), name, fill=(0, 0, 0), font=font)
        y += LINE
    content = io.BytesIO()
    sheet.save(content, "PNG")
    replace_file(path, content.getvalue())


def sheet(rows: Sequence[Sequence[tuple[str, NumpyArray]]]) -> NumpyArray:
    """Panels with a line of text over each, row by row, on one picture.

    Args:
        rows: Of each panel its caption and ``u8[H, W, 3]``, brought to `SIDE`.

    Returns:
        ``u8[H, W, 3]``.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=12)
    drawn = [[(text, _fitted(p, smooth=True)) for text, p in row] for row in rows]
    panels = [panel for row in drawn for _, panel in row]
    column = max([panel.width for panel in panels] + [80])
    heights = [max(panel.height for _, panel in row) + LINE + GAP for row in drawn]
    width = max(map(len, drawn)) * (column + GAP) + GAP
    picture = Image.new("RGB", (width, sum(heights) + GAP), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    y = GAP // 2
    for row, height in zip(drawn, heights, strict=True):
        for i, (text, panel) in enumerate(row):
            x = GAP + i * (column + GAP)
            draw.text((x, y), text, fill=(0, 0, 0), font=font)
            picture.paste(panel, (x, y + LINE))
        y += height
    return np.asarray(picture)
