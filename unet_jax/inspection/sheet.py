"""The contact sheet: a dozen examples with their labels, the doubtful ones first."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unet_jax import overlay, pictures
from unet_jax.data import images, stacks
from unet_jax.data.source import overlapping
from unet_jax.inspection.examples import Look, Opened
from unet_jax.inspection.findings import Finding
from unet_jax.inspection.listing import Listing
from unet_jax.types import InputError, NumpyArray, Task

EXAMPLES, COLUMNS = 12, 4
DOUBTFUL = 8  # of them at most
RED = (214, 39, 40)
LETTERS = 34  # of a caption over a panel


def draw(
    opened: Opened,
    looks: Sequence[Look],
    found: Sequence[Finding],
    listing: Listing | None,
    *,
    volumes: bool,
) -> NumpyArray | None:
    """Examples with the outlines of their labels, as one picture.

    Args:
        opened: the sources.
        looks: at their examples.
        found: what is odd, the worst first. Examples that are errors or warnings come
            first, in a red frame; those that cannot be had with a label are shown as
            the image alone.
        listing: of the files, for those.
        volumes: whether the files are stacks or volumes.

    Returns:
        ``u8[H, W, 3]``, or None where nothing can be shown.
    """
    by_name = {look.name: look for look in looks if not look.error}
    files = {pair.name: pair for pair in listing.pairs} if listing else {}
    panels: list[tuple[str, NumpyArray]] = []
    shown: set[str] = set()
    for name in _doubtful(found):
        if len(panels) == DOUBTFUL:
            break
        try:
            if name in by_name:
                panel = _example(opened, by_name[name])
            elif name in files:
                panel = _plain(files[name].image, volumes)
            else:
                continue
        except InputError:
            continue
        shown.add(name)
        panels.append((_caption(f"! {name}"), _framed(panel)))
    rest = [look for look in by_name.values() if look.name not in shown]
    if rest and (room := EXAMPLES - len(panels)):
        for i in sorted(set(np.linspace(0, len(rest) - 1, room).astype(int).tolist())):
            panels.append((_caption(rest[i].name), _example(opened, rest[i])))
    if not panels:
        return None
    rows = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    picture = pictures.sheet(rows)
    names = max(
        (tuple(s.label_names) for s in opened.sources.values()), key=len, default=()
    )
    return np.concatenate([picture, _legend(names, picture.shape[1])])


def _doubtful(found: Sequence[Finding]) -> list[str]:
    """Names of what findings are about: the first of each, then the second of each."""
    names = [finding.names for finding in found if finding.level != "note"]
    turns = itertools.zip_longest(*names)
    return list(dict.fromkeys(name for turn in turns for name in turn if name))


def _example(opened: Opened, look: Look) -> NumpyArray:
    """One example; of a volume the slice with most foreground."""
    source = opened.sources[look.part]
    example = source[look.number]
    image, label = np.asarray(example["image"]), np.asarray(example["label"])
    task: Task = "labels" if overlapping(source) else "classes"
    if image.ndim == 4:
        image, label = image[look.middle], label[look.middle]
    step = _step(image)
    return _enlarged(
        overlay.draw(
            image[::step, ::step],
            label[::step, ::step],
            task=task,
            label_names=source.label_names,
        )
    )


def _plain(path: Path, volumes: bool) -> NumpyArray:
    """An image without a label."""
    if volumes:
        image = stacks.read_volume(path)[0]
        image = image[len(image) // 2]
    else:
        image = images.read_image(path)
    step = _step(image)
    label = np.zeros(image[::step, ::step].shape[:2], np.uint8)
    return _enlarged(
        overlay.draw(image[::step, ::step], label, task="classes", label_names=())
    )


def _step(image: NumpyArray) -> int:
    """Every so many pixels are drawn: outlines would vanish in what is reduced more."""
    return max(max(image.shape[:2]) // (2 * pictures.SIDE), 1)


def _enlarged(panel: NumpyArray) -> NumpyArray:
    """Small images by a whole factor, so that a frame is equally wide on all."""
    factor = max(pictures.SIDE // max(panel.shape[:2]), 1)
    return panel.repeat(factor, 0).repeat(factor, 1)


def _framed(panel: NumpyArray) -> NumpyArray:
    panel = panel.copy()
    width = max(max(panel.shape[:2]) // 64, 1)
    for edge in (np.s_[:width], np.s_[-width:], np.s_[:, :width], np.s_[:, -width:]):
        panel[edge] = RED
    return panel


def _caption(name: str) -> str:
    """A name short enough to stand over a panel: its end tells more."""
    name = name.replace("\n", " ").encode("utf-8", "backslashreplace").decode()
    return name if len(name) <= LETTERS else f"...{name[3 - LETTERS :]}"


def _legend(label_names: Sequence[str], width: int) -> NumpyArray:
    """A line of the classes in their colours: ``u8[LINE, width, 3]``."""
    from PIL import Image, ImageDraw, ImageFont

    strip = Image.new("RGB", (width, pictures.LINE), (255, 255, 255))
    font, pen, x = ImageFont.load_default(size=12), ImageDraw.Draw(strip), pictures.GAP
    colours = pictures.class_colours(label_names)
    for name, colour in zip(label_names, colours, strict=True):
        if name != "background":
            box = (x, 3, x + 11, 14)
            pen.rectangle(box, fill=tuple(map(int, colour)), outline=(90, 90, 90))
            pen.text((x + pictures.LINE, 1), name, fill=(0, 0, 0), font=font)
            x += pictures.LINE + int(font.getlength(name)) + 2 * pictures.GAP
    return np.asarray(strip)
