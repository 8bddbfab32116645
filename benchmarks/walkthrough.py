"""Writes docs/walkthrough.md: one pixel through a whole U-Net, in a real run's numbers.

    python -m benchmarks.walkthrough --workdir=runs/walkthrough

Trains the paper's net (arXiv 1505.04597) with an eighth of its channels on the built-in
cells where the workdir has no finished run, about three minutes on two CPU cores. Then
takes an unseen picture of 572 x 572 and a pixel of the gap between two touching cells,
and writes the page and its pictures. No number in the page is typed by hand.
"""

import argparse
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SIZE = 572
CELLS = {"size": (SIZE, SIZE), "radius": (14.0, 26.0)}
LEVELS = 5


def config() -> dict[str, Any]:
    """The run: the paper's geometry and habits, narrow."""
    import train
    from configs.default import get_config

    made = get_config()
    made.data.cells.size, made.data.cells.radius = CELLS["size"], CELLS["radius"]
    made.data.cells.examples = 32
    made.data.cells.gap = True
    made.data.evaluation = "val[:2]"
    made.model.name = "unet_2015"
    made.model.features = (8, 16, 32, 64, 128)
    made.model.norm = "batch"
    made.model.dropout = 0.0
    # The gap is a few pixels in a hundred: a missed background pixel costs four times
    # as much, as the paper's weight map makes its gaps cost more.
    made.loss.class_weights = (4.0, 1.0)
    made.loss.dice = 0.0
    # One large tile a step rather than many small ones (the paper, section 3).
    made.train.crop = (SIZE, SIZE)
    made.train.batch_size = made.train.eval_batch_size = 1
    made.train.steps = 300
    made.train.eval_every = made.train.save_every = 1000
    made.train.log_every = 20
    made.mesh.data = 1
    return train.chosen(made)


# --- The pixel -----------------------------------------------------------------------


class Scene(NamedTuple):
    """The picture, what is in it and the two pixels that are followed."""

    image: Any
    instances: Any
    gap: Any
    pixel: tuple[int, int]
    inside: tuple[int, int]


def choose_pixels(maps: Any, image: Any, whole: Any, instances: Any) -> Scene:
    """The gap pixel nearest to the middle that the net gets right, and a neighbour.

    Around the pixel there is nothing but its two cells. The neighbour lies in one of
    them, is called cell, and at the bottom of the net is in the same cell of the map.
    """
    from unet_jax.features import visits

    gap = (whole > 0) & (instances == 0)
    label = np.full(gap.shape, -1)
    begin, shape = maps.begin, maps.logits.shape[:-1]
    label[tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))] = (
        maps.label
    )
    places = np.argwhere(gap & (label == 0))
    far = np.abs(places - SIZE / 2).sum(1)
    for pixel in places[np.argsort(far, kind="stable")]:
        y, x = pixel
        around = whole[y - 4 : y + 5, x - 4 : x + 5]
        if len(set(around.ravel().tolist())) != 2 or (around == 0).any():
            continue  # the end of a gap, or where three cells meet
        bottom = visits(maps, pixel)[LEVELS - 1].cell
        for other in sorted(
            np.ndindex(9, 9), key=lambda p: (p[0] - 4) ** 2 + (p[1] - 4) ** 2
        ):
            v, u = y + other[0] - 4, x + other[1] - 4
            near = abs(v - y) + abs(u - x)
            inner = instances[v - 1 : v + 2, u - 1 : u + 2]
            if near < 3 or (inner == 0).any() or label[v, u] != 1:
                continue
            if visits(maps, (v, u))[LEVELS - 1].cell == bottom:
                return Scene(image, instances, gap, (int(y), int(x)), (int(v), int(u)))
    raise SystemExit("the net gets no gap pixel right: train it for longer")


def shapes(predictor: Any) -> dict[str, tuple[int, ...]]:
    """What every module of the net makes of 572 x 572: path to shape."""
    found: dict[str, tuple[int, ...]] = {}

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if context.method_name == "__call__":
            leaves = jax.tree.leaves(out)
            found["/".join(context.module.path)] = leaves[0].shape[1:]
        return out

    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 1), jnp.float32)
    with nn.intercept_methods(watch):
        jax.eval_shape(predictor.model.apply, predictor.variables, image)
    return found


# --- Pictures ------------------------------------------------------------------------


def save(path: Path, pixels: Any, colours: int) -> None:
    """A PNG of few colours, which is several times smaller; 0 for all of them."""
    from PIL import Image

    image = Image.fromarray(pixels)
    if colours:
        # The method that does not drop the colour of a mark for being rare.
        way, dither = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
        image = image.quantize(colours, method=way, dither=dither)
    image.save(path, optimize=True)


def zoom(scene: Scene, maps: Any, path: Path) -> None:
    """Image, truth and prediction around the pixel."""
    from PIL import Image, ImageDraw, ImageFont

    from unet_jax import overlay
    from unet_jax.pictures import PALETTE

    half, factor = 20, 7
    y, x = scene.pixel
    box = slice(y - half, y + half + 1), slice(x - half, x + half + 1)
    image = scene.image[box].astype(np.float32)
    image = (255 * (image - image.min()) / np.ptp(image)).astype(np.uint8)
    grey = np.repeat(image, 3, -1)
    numbers = scene.instances[box]
    colours = np.array(PALETTE, np.float32)
    names = {n: i for i, n in enumerate(np.unique(numbers[numbers > 0]).tolist())}
    truth = grey.astype(np.float32)
    for number, i in names.items():
        where = numbers == number
        truth[where] = 0.5 * truth[where] + 0.5 * colours[i % len(colours)]
    truth[scene.gap[box]] = (0, 0, 0)
    inner = tuple(
        slice(s.start - b, s.stop - b) for s, b in zip(box, maps.begin, strict=True)
    )
    label = maps.label[inner]
    predicted = overlay.draw(
        image, label, task="classes", label_names=maps.meta.label_names
    )
    font = ImageFont.load_default(size=13)
    side = (2 * half + 1) * factor
    sheet = Image.new("RGB", (3 * side + 32, side + 34), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, (name, pixels) in enumerate(
        (
            ("the image", grey),
            ("the truth: a colour a cell, gap black", truth.astype(np.uint8)),
            ("what the net says", predicted),
        )
    ):
        left = 8 + i * (side + 8)
        panel = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
        draw.text((left, 6), name, fill=(0, 0, 0), font=font)
        sheet.paste(panel, (left, 26))
        scale = side / (2 * half + 1)
        for place, colour in ((scene.pixel, (213, 94, 0)), (scene.inside, (0, 255, 0))):
            v, u = place[0] - y + half, place[1] - x + half
            ends = [left + u * scale - 1, 26 + v * scale - 1]
            ends += [left + (u + 1) * scale, 26 + (v + 1) * scale]
            draw.rectangle(ends, outline=colour, width=2)
    save(path, np.asarray(sheet), 0)


def fields(scene: Scene, seen: Sequence[Any], answer: Any, path: Path) -> None:
    """The image with what the cells of each level see, one box in the other."""
    from PIL import Image, ImageDraw, ImageFont

    from unet_jax.feature_sheet import MARK

    (top, bottom), (left, right) = answer
    room = 12
    top, left = max(top - room, 0), max(left - room, 0)
    bottom, right = min(bottom + room, SIZE - 1), min(right + room, SIZE - 1)
    image = scene.image[top : bottom + 1, left : right + 1]
    low, high = int(image.min()), int(image.max())
    grey = ((image.astype(np.float32) - low) * (255 / (high - low))).astype(np.uint8)
    factor = 2
    sheet = Image.fromarray(np.repeat(grey, 3, -1))
    sheet = sheet.resize((sheet.width * factor, sheet.height * factor), 0)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    boxes = [(visit.map.name, visit.field) for visit in seen] + [("logits", answer)]
    for name, ((a, b), (c, d)) in boxes:
        ends = [(c - left) * factor, (a - top) * factor]
        ends += [(d + 1 - left) * factor - 1, (b + 1 - top) * factor - 1]
        draw.rectangle(ends, outline=MARK, width=2)
        if b - a > 25:
            for shift in (1, 0):
                at = (ends[0] + 4 + shift, ends[1] + 2 + shift)
                colour = (0, 0, 0) if shift else (255, 255, 255)
                draw.text(at, name, fill=colour, font=font)
    save(path, np.asarray(sheet), 64)


# --- The page ------------------------------------------------------------------------


def wrapped(block: str) -> str:
    """A paragraph in lines; tables, code, headings and pictures as they are."""
    if block.startswith(("|", "`" * 3, "#", "![")):
        return block
    for width in range(88, 60, -1):
        lines = textwrap.wrap(
            block, width, break_long_words=False, break_on_hyphens=False
        )
        # Not where Markdown would see a list begin.
        if not any(line.startswith(("+ ", "- ", "1. ")) for line in lines):
            return "\n".join(lines)
    raise ValueError(f"no width fits {block!r}")


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as Markdown, the first the head."""
    head, *others = rows
    lines = [head, ["---"] * len(head), *others]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def times(shape: Sequence[int]) -> str:
    """``568 x 568 x 8``."""
    return " x ".join(map(str, shape))


def place(index: Sequence[int]) -> str:
    """``(12, 34)``."""
    return f"({', '.join(map(str, index))})"


def span(field: Any) -> str:
    """``rows 3 to 7, columns 5 to 9``."""
    (a, b), (c, d) = field
    return f"rows {a} to {b}, columns {c} to {d}"


def wide(field: Any) -> str:
    """``5 x 5``."""
    return times([last - first + 1 for first, last in field])


def short(number: float) -> str:
    """Three decimals, and no minus before a zero."""
    return f"{round(float(number), 3) + 0.0:.3f}"


def alike(a: Any, b: Any) -> str:
    """The cosine between the activations of two squares."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return f"{float(a @ b) / norms:.2f}" if norms else "no activation"


def best(values: Any, count: int = 3) -> str:
    """The strongest channels of a square."""
    from unet_jax.features import strongest

    return ", ".join(f"#{k}: {values[k]:.2f}" for k in strongest(values, count))


class Story(NamedTuple):
    """What the page tells: the net, its maps and the way of the two pixels."""

    predictor: Any
    maps: Any
    scene: Scene
    name: str
    seen: Any  # what our pixel meets, a visit a map
    beside: Any  # likewise of the green pixel
    made: dict[str, tuple[int, ...]]
    answer: Any  # what our pixel's logits see

    @property
    def down(self) -> Any:
        """Our pixel on the way down."""
        return self.seen[:LEVELS]

    @property
    def up(self) -> Any:
        """And on the way up."""
        return self.seen[LEVELS:]

    def out(self, pixel: Sequence[int]) -> tuple[int, ...]:
        """Where a pixel is among the logits."""
        return tuple(p - b for p, b in zip(pixel, self.maps.begin, strict=True))


def tell(predictor: Any, maps: Any, scene: Scene, name: str) -> Story:
    """The two pixels, sent through the net."""
    from unet_jax import models
    from unet_jax.features import visits

    axis = models.axis(predictor.model, 0, 2)
    seen, beside = visits(maps, scene.pixel), visits(maps, scene.inside)
    out = [p - b for p, b in zip(scene.pixel, maps.begin, strict=True)]
    answer = tuple(axis.field(SIZE, o) for o in out)
    made = shapes(predictor)
    return Story(predictor, maps, scene, name, seen, beside, made, answer)


def paper() -> Any:
    """The net of the paper."""
    from unet_jax import models

    return models.build("unet_2015", num_classes=2)


def page(story: Story) -> Iterator[str]:
    """The page, a paragraph at a time."""
    for part in (introduction, question, down, bottom, up, glance, parting, decision):
        yield from part(story)
    yield from paper_sizes(story)


def introduction(story: Story) -> Iterator[str]:
    """What this is."""
    predictor, (y, x) = story.predictor, story.scene.pixel
    yield "# One pixel through a U-Net"
    yield (
        "What does a U-Net do with an image? This page follows one pixel of one image"
        " all the way through a trained net: down, along the bottom, up, to the"
        " decision. Every number comes from the run that wrote the page:"
    )
    yield "```\npython -m benchmarks.walkthrough --workdir=runs/walkthrough\n```"
    yield (
        "The net is that of the paper (Ronneberger, Fischer, Brox 2015, arXiv"
        " 1505.04597), with convolutions that do not pad, so that the sizes below are"
        f" the paper's. It has {predictor.model.features[0]} channels where the paper's"
        f" has {paper().features[0]}, and batch norm, so that it learns in minutes. It"
        f" was trained for {predictor.step} steps on the built-in pictures of touching"
        " cells, and finds the cells of pictures that it was not trained on with a Dice"
        f" of {predictor.meta.results['dice']:.3f} (1 is perfect). You can do the same"
        " with a net and an image of your own:"
    )
    yield f"```\nunet-jax features --workdir=runs/mine image.png --pixel={y},{x}\n```"


def question(story: Story) -> Iterator[str]:
    """The two pixels, and why one of them is hard."""
    maps, scene = story.maps, story.scene
    y, x = scene.pixel
    inner = tuple(
        slice(b, b + n) for b, n in zip(maps.begin, maps.label.shape, strict=True)
    )
    grey = int(scene.image[y, x, 0])
    such = scene.image[inner][..., 0] == grey
    called = float((maps.label[such] == 1).mean())
    yield "## The question"
    yield (
        "The net answers one question at every pixel: is this a cell, or background?"
        " The hard pixels are where two cells touch. In the truth one pixel of"
        " background keeps them apart; if the net misses it, two cells become one."
    )
    yield "![the pixel and around it](walkthrough/pixel.png)"
    yield (
        f"We follow the orange pixel: row {y}, column {x} (counted from 0) of"
        f" `{story.name}`, which the net has never seen. It lies in the gap between two"
        " cells, so the right answer is background. The green pixel, row"
        f" {scene.inside[0]}, column {scene.inside[1]}, lies inside one of the two"
        " cells. It comes along for comparison."
    )
    yield (
        f"The grey value of our pixel is {grey} of 255; the net is given"
        f" {float(maps.given[y, x, 0]):.4f}. Among the {such.size:,} pixels that the"
        f" net answers for, {int(such.sum()):,} have just this grey. The net calls"
        f" {called:.0%} of those cell and {1 - called:.0%} background. The grey value"
        " alone does not decide it: the net has to look around."
    )


def down(story: Story) -> Iterator[str]:
    """The encoder."""
    scene, (first, *_, last) = story.scene, story.down
    yield "## Down: see more, know less exactly where"
    yield (
        "A level of the way down is two 3 x 3 convolutions. Each output of a"
        " convolution is a weighted sum of 3 x 3 inputs, and a ReLU sets what is"
        " negative to 0. Without padding, the outermost pixels have no full 3 x 3"
        f" neighbourhood, so each convolution makes the map 2 smaller: {SIZE} becomes"
        f" {SIZE - 2}, then {first.map.value.shape[0]}. A channel is one such map with"
        " weights of its own; it has learnt to answer to one kind of pattern. So a map"
        " is a grid of *squares*, each with a number per channel."
    )
    yield (
        "Between two levels, max-pooling keeps the greatest of every 2 x 2 values. The"
        " map has half the size, and a square of it stands for twice as many pixels in"
        " each direction. The number of channels doubles."
    )
    head = ["map", "size", "our square", "stands for", "sees", "cells in sight"]
    rows: list[list[Any]] = [[*head, "strongest channels"]]
    for visit in story.down:
        (top, low), (left, high) = visit.field
        sight = np.unique(scene.instances[top : low + 1, left : high + 1])
        rows.append(
            [
                visit.map.name,
                times(visit.map.value.shape),
                place(visit.cell),
                f"{times((2**visit.map.level,) * 2)} px",
                f"{wide(visit.field)} px",
                int((sight > 0).sum()),
                best(visit.values),
            ]
        )
    yield table(rows)
    yield (
        "*Our square* is the one that lies over our pixel. *Sees* is its receptive"
        " field: the pixels that any of its numbers can depend on. In `down 0` that is"
        f" {span(first.field)}. *Cells in sight* counts the cells of the truth that"
        " have a pixel among these. The last column names the three channels with the"
        " greatest numbers. Our square in `down 0` is"
        f" {place(first.cell)} and the pixel {place(scene.pixel)}, because each of two"
        " convolutions has taken a row and a column off each side."
    )
    yield "![what our square sees at each level](walkthrough/fields.png)"
    across = int(2 * np.mean(CELLS["radius"]))
    enough = next(v for v in story.down if v.field[0][1] - v.field[0][0] >= across)
    yield (
        "The boxes are what our square sees at each level: the innermost"
        f" {wide(first.field)} pixels, `{last.map.name}` {wide(last.field)}, and the"
        f" answer at the end {wide(story.answer)}. The cells under the microscope are"
        f" about {across} pixels wide, so `{enough.map.name}` is the first map that can"
        " see a whole one. The maps before it see grain, edges and pieces of outlines."
    )


def bottom(story: Story) -> Iterator[str]:
    """The coarsest map."""
    last = story.down[-1]
    covers = times((2**last.map.level,) * 2)
    yield f"## The bottom: one vector for {covers} pixels"
    yield (
        f"`{last.map.name}` has {times(last.map.value.shape[:-1])} squares of"
        f" {last.map.value.shape[-1]} numbers. Ours, {place(last.cell)}, sees"
        f" {wide(last.field)} pixels, but it is one vector for all the {covers} pixels"
        " below it. The green pixel has the very same vector. What it says, it says of"
        " both: the net now knows *what* is around, and no longer exactly *where*."
    )


def up(story: Story) -> Iterator[str]:
    """The decoder."""
    maps, made, first, last = story.maps, story.made, story.down[0], story.up[-1]
    margin = maps.begin[0]
    yield "## Up: put the where back"
    yield (
        "Each level of the way up does four things. The *up-convolution* doubles the"
        " size: every square becomes 2 x 2, each with weights of its own, and the"
        " channels are halved. The *skip* brings the map of the same level from the way"
        " down, which is sharp. It is larger, because the way down has lost less of its"
        " border so far, so its middle is *cropped* out. Both are put beside each"
        " other (*concatenated*: the channels add up), and two convolutions make one of"
        " them."
    )
    head = ["to", "up-convolution", "skip", "the crop cuts", "concatenated"]
    rows = [[*head, "two convolutions"]]
    for visit in story.up:
        level = visit.map.level
        grown, skip = made[f"decoder/up{level}"], maps.encoder[level].shape
        rows.append(
            [
                visit.map.name,
                times(grown),
                times(skip),
                f"{(skip[0] - grown[0]) // 2} each side",
                times(made[f"decoder/merge{level}"]),
                times(visit.map.value.shape),
            ]
        )
    yield table(rows)
    cut = (first.map.value.shape[0] - made["decoder/up0"][0]) // 2
    yield (
        "The crop cuts what the way up has nothing to put beside: border that the"
        " unpadded convolutions have already lost further down. At"
        f" `{last.map.name}` it cuts {cut} rows and columns off each side of"
        f" `{first.map.name}`: our square {place(first.cell)} there is"
        f" {place([c - cut for c in first.cell])} after the crop, and after two more"
        f" convolutions {place(last.cell)}. In all {margin} pixels are lost at each"
        f" side: {SIZE} in, {maps.logits.shape[0]} out. (`unet-jax predict` first"
        f" mirrors the image by those {margin} pixels, so that every pixel gets an"
        " answer.)"
    )
    rows = [["map", "our square", "sees", "strongest channels"]]
    for v in story.up:
        rows.append([v.map.name, place(v.cell), f"{wide(v.field)} px", best(v.values)])
    yield table(rows)
    if any(wide(v.field) != wide((v.field[0],) * 2) for v in story.up):
        yield (
            "(What it sees is not the same in both directions everywhere: that depends"
            " on where our square lies in the coarser ones that it is made of.)"
        )


def glance(story: Story) -> Iterator[str]:
    """The picture of all maps."""
    yield "## All maps at a glance"
    yield "![the strongest channels of each level](walkthrough/maps.png)"
    yield (
        "A row is a level. First the image as coarse as the level's squares, or the"
        " prediction; then the level's strongest channels, each from its own dark (low)"
        " to its own bright (high). The circle is our pixel, the orange box what our"
        " square sees. All panels show the same piece of the image, and the empty"
        " border is what the convolutions have cost. In the first rows there are edges"
        " and bright spots, sharp; at the bottom a few blocks, some bright where cells"
        " are and some where none are. On the way up the two become one: whole cells"
        " with sharp borders. (Where there is a fine chequered pattern, it comes from"
        " the 2 x 2 weights of an up-convolution.)"
    )


def parting(story: Story) -> Iterator[str]:
    """How the two pixels become one and two again."""
    scene = story.scene
    yield "## Where two neighbours part"
    yield (
        "How alike are the numbers of our orange pixel in the gap and of the green one"
        f" in the cell, only {math.dist(scene.pixel, scene.inside):.1f} pixels apart?"
        " The cosine of their two vectors is 1 where they point the same way and 0"
        " where they have nothing in common:"
    )
    rows = [["map", "square of the gap", "square of the cell", "alike"]]
    for a, b in zip(story.seen, story.beside, strict=True):
        same = "the same" if a.cell == b.cell else place(b.cell)
        rows.append([a.map.name, place(a.cell), same, alike(a.values, b.values)])
    yield table(rows)
    yield (
        "At the bottom they share a square, so 1. On the way up they part again: the"
        " up-convolutions give each of the 2 x 2 squares weights of its own, and the"
        " skips bring what the way down saw just there. At the end each has numbers of"
        " its own, and is decided for itself."
    )


def decision(story: Story) -> Iterator[str]:
    """The head, the softmax and how often it is right."""
    from unet_jax.features import strongest

    maps, scene, meta = story.maps, story.scene, story.predictor.meta
    names, out = meta.label_names, story.out(scene.pixel)
    logits, probability = maps.logits[out], maps.probability[out]
    head = jax.device_get(story.predictor.variables["params"]["head"])
    kernel, bias, values = head["kernel"], head["bias"], story.up[-1].values
    products = values[:, None] * kernel
    np.testing.assert_allclose(products.sum(0) + bias, logits, rtol=1e-3, atol=1e-4)
    yield "## The answer: a sum, a softmax, a decision"
    yield (
        f"The last map has {len(values)} numbers at our pixel. The head, a 1 x 1"
        " convolution, has a weight for each of them, once for each class. The sums of"
        " the products, plus a bias, are the *logits*:"
    )
    rows = [["channel", "value", *(f"weight for {n}, product" for n in names)]]
    for k in sorted(strongest(values, len(values))):
        pairs = zip(kernel[k], products[k], strict=True)
        rows.append(
            [f"#{k}", short(values[k]), *(f"{short(w)}, {short(v)}" for w, v in pairs)]
        )
    rows.append(["bias", "", *(short(b) for b in bias)])
    rows.append(["**logit**", "", *(f"**{short(logit)}**" for logit in logits)])
    yield table(rows)
    powers = [math.exp(float(logit)) for logit in logits]
    sums = " + ".join(f"{p:.3f}" for p in powers)
    shares = ", ".join(
        f"{n}: `{p:.3f} / ({sums}) = {q:.3f}`"
        for n, p, q in zip(names, powers, probability, strict=True)
    )
    yield (
        "The *softmax* makes probabilities of them: e to the power of each logit, over"
        f" the sum of both. {shares[0].upper()}{shares[1:]}. The decision is the"
        f" greater: **{names[int(maps.label[out])]}**. These logits saw"
        f" {wide(story.answer)} pixels of the image, {span(story.answer)}."
    )
    there = story.out(scene.inside)
    pairs = zip(names, maps.probability[there], strict=True)
    yield (
        f"For the green pixel it is {', '.join(f'{n} {q:.3f}' for n, q in pairs)}:"
        f" {names[int(maps.label[there])]}."
    )
    inner = tuple(
        slice(b, b + n) for b, n in zip(maps.begin, maps.label.shape, strict=True)
    )
    gaps = scene.gap[inner]
    right, count = int((maps.label[gaps] == 0).sum()), int(gaps.sum())
    yield (
        f"Not every pixel goes as well. Of the {count:,} gap pixels among those that"
        f" the net answers for, it calls {right:,} background, {right / count:.0%};"
        " ours is one of these, near the middle of the picture. In training a missed"
        " pixel of background cost"
        f" {meta.config['loss']['class_weights'][0]:g} times as much as a missed pixel"
        " of a cell. The paper does more: its weights grow the nearer two cells are to"
        " each other."
    )


def paper_sizes(story: Story) -> Iterator[str]:
    """The table of sizes."""
    from unet_jax import models

    coarse, fine = models.axis(paper(), 0, 2).sizes(SIZE)
    maps, here = story.maps, story.predictor.model.features
    yield "## The paper's sizes"
    yield (
        "Those of the paper's figure 1, computed by `unet_jax.geometry.Axis`, which are"
        " the sizes of the maps of this run:"
    )
    rows: list[list[Any]] = [
        ["level", "down", "up", "channels in the paper", "channels here"]
    ]
    for level in range(LEVELS):
        ups = fine[level] if level < LEVELS - 1 else ""
        assert maps.encoder[level].shape[0] == coarse[level]
        assert ups == "" or maps.decoder[level].shape[0] == ups
        rows.append([level, coarse[level], ups, paper().features[level], here[level]])
    yield table(rows)
    yield (
        "Next: [prediction.md](prediction.md) for images of any size,"
        " [house.md](house.md) for where all this is in the code."
    )


def main() -> None:
    """Trains where needed, and writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workdir", required=True, help="where the run is kept")
    parser.add_argument("--out", default=str(ROOT / "docs"), help="folder to write to")
    arguments = parser.parse_args()
    import train

    train.train_and_evaluate(config(), arguments.workdir)
    from unet_jax import feature_sheet, features
    from unet_jax.data import cells
    from unet_jax.predict import Predictor

    predictor = Predictor(arguments.workdir)
    source = cells.open(split="test", gap=True, **CELLS)
    whole = cells.open(split="test", **CELLS).instances(0)
    image = source[0]["image"]
    maps = features.feature_maps(predictor, image, pads=((0, 0), (0, 0)))
    scene = choose_pixels(maps, image, whole, source.instances(0))
    out = Path(arguments.out)
    pictures = out / "walkthrough"
    pictures.mkdir(parents=True, exist_ok=True)
    story = tell(predictor, maps, scene, source.name(0))
    zoom(scene, maps, pictures / "pixel.png")
    fields(scene, story.down, story.answer, pictures / "fields.png")
    sheet = feature_sheet.picture(maps, channels=5, pixel=scene.pixel)
    save(pictures / "maps.png", sheet, 240)
    text = "\n\n".join(map(wrapped, page(story))) + "\n"
    (out / "walkthrough.md").write_text(text)
    print(features.trace(maps, scene.pixel))
    print(f"wrote {out / 'walkthrough.md'}")


if __name__ == "__main__":
    main()
