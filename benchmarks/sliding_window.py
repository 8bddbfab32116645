"""A window at every pixel against one pass, and how far a prediction follows its image.

    python benchmarks/sliding_window.py --root=DIR

The U-Net paper (section 1) begins with what it replaced: a net that is given a patch
and classifies the pixel in its middle (Ciresan et al. 2012, Deep neural networks
segment neuronal membranes in electron microscopy images, NIPS 25). DIR holds ISBI
2012's ``train-volume.tif`` and ``train-labels.tif``. Slices 0-19 train a small U-Net
and, for about as long, its encoder as such a classifier, with windows of two sizes;
both are timed side by side and measured at the same pixels of held-out slices. Then:
does moving the input move the prediction and nothing else, and what has augmentation to
do with it?

A net's figures are in ``sliding_window.json`` as soon as they are there, and the same
command goes on with the nets that are missing; it ends by writing the page and the
picture, which no hand has typed a number into.
"""

import argparse
import base64
import functools
import json
import logging
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.family import hardware, markdown, versions, wrapped
from unet_jax import data, metrics, models, pictures, report, run, sharding
from unet_jax.data import volumes
from unet_jax.decoders import Decoded
from unet_jax.layers import Factory, mirror
from unet_jax.log import replace_file
from unet_jax.predict import make_probability_fn
from unet_jax.training import TrainState
from unet_jax.types import Array, InputError, NumpyArray, PyTree, Shape, size_text

TURNS: dict[str, Any] = {"flip": True, "quarter_turns": True}
AUGMENTED: dict[str, Any] = TURNS | {
    "rotate": 180.0,
    "scale": 0.15,
    "elastic": 10.0,
    "brightness": 0.1,
    "contrast": 0.2,
    "gamma": 0.2,
    "noise": 0.03,
}
FEATURES = (8, 16, 32, 64)
CROP, CROPS = 160, 4  # pixels of the side and crops a step, of a U-Net
PATCHES = 256  # windows a step, and of a prediction run together
PASSES = 3  # passes over a slice before and after its windows are timed


class Net(NamedTuple):
    """A net of the comparison.

    Attributes:
        title: What the page calls it.
        augment: Keys of `unet_jax.augment.build`.
        window: Pixels of the window's side; 0 is the U-Net.
        placed: Of a window: whether the last layer knows where in the patch it is.
        pace: Steps for each step of the U-Net, so that training takes about as long.
    """

    title: str
    augment: dict[str, Any]
    window: int = 0
    placed: bool = False
    pace: float = 1.0


# The paces were measured on 2 CPU cores that were not idle: a step of the U-Net took
# 0.20 s, one of 256 windows of 32 x 32 0.18 s and of 64 x 64 0.76 s.
NETS = {
    "plain": Net("U-Net, random crops only", {}),
    "turned": Net("U-Net, flips and turns", TURNS),
    "augmented": Net("U-Net, augmented", AUGMENTED),
    "window32": Net("window 32 x 32, mean", TURNS, 32, False, 1.1),
    "window32_placed": Net("window 32 x 32, by place", TURNS, 32, True, 1.1),
    "window64": Net("window 64 x 64, mean", TURNS, 64, False, 0.25),
    "window64_placed": Net("window 64 x 64, by place", TURNS, 64, True, 0.25),
}


# --- The window ----------------------------------------------------------------------


class Middle(nn.Module):
    """What makes a classifier of a U-Net: in the decoder's place, one vector a patch.

    Of it the net's head, which is a dense layer, makes the logits of the patch's middle
    pixel, ``[B, 1, 1, K]``. To training that is a net which loses all of its border, so
    labels are cropped to the middle pixel (`unet_jax.layers.crop`: the first of the two
    middle ones of an even side).

    Attributes:
        features, blocks, ups, merges, fit, up_features, supervised: As every decoder
            has them (`unet_jax.decoders`); not read.
        placed: Whether the vector is the coarsest map, cell by cell, so that the dense
            layer knows the middle from the border as Ciresan et al.'s does; otherwise
            it is the map's mean.
    """

    features: tuple[int, ...]
    blocks: tuple[Factory, ...]
    ups: tuple[Factory, ...]
    merges: tuple[Factory, ...]
    fit: str = "zeros"
    up_features: str | tuple[int, ...] = "level"
    supervised: int = 1
    placed: bool = False
    nested: ClassVar[bool] = False

    @nn.compact
    def __call__(self, pyramid: tuple[Array, ...]) -> Decoded:
        """The encoder's maps, finest first -> `Decoded`."""
        x = pyramid[-1]
        if self.placed:
            x = x.reshape(x.shape[0], 1, 1, -1)
        else:
            x = jnp.mean(x, axis=(1, 2), keepdims=True)
        return Decoded({0: x}, {"decoder": (x,)})


def around(window: int) -> tuple[int, int]:
    """Pixels of a window before and after the one that it classifies."""
    return (window - 1) // 2, window // 2


def grid(size: Shape, stride: int) -> NumpyArray:
    """Every stride-th pixel of both axes from the first on: ``i32[N, 2]``, by rows."""
    places = np.mgrid[: size[0] : stride, : size[1] : stride]
    return places.reshape(2, -1).T.astype(np.int32)


def make_window_fn(
    probability: Callable[[PyTree, Array], Array], window: int
) -> Callable[[PyTree, Array, Array], Array]:
    """The pure function that classifies pixels by their windows, to be jitted.

    Args:
        probability: ``(variables, patches [B, P, P, C]) -> f32[B, 1, 1, K]``.
        window: P.

    Returns:
        ``(variables, mirrored [H + P - 1, W + P - 1, C], pixels i32[B, 2]) -> f32[B,
        K]``.
    """

    def classify(variables: PyTree, mirrored: Array, pixels: Array) -> Array:
        def cut(pixel: Array) -> Array:
            begin = (pixel[0], pixel[1], jnp.zeros((), jnp.int32))
            return jax.lax.dynamic_slice(
                mirrored, begin, (window, window, mirrored.shape[-1])
            )

        return probability(variables, jax.vmap(cut)(pixels))[:, 0, 0]

    return classify


def by_windows(
    classify: Callable[[PyTree, NumpyArray, NumpyArray], Array],
    variables: PyTree,
    image: NumpyArray,
    pixels: NumpyArray,
    *,
    window: int,
) -> NumpyArray:
    """Classifies some pixels of an image, `PATCHES` at a time.

    Args:
        classify: A jitted `make_window_fn`.
        variables: The net's.
        image: ``[H, W, C]``; beyond its border is its mirror image.
        pixels: ``i32[N, 2]``.
        window: Pixels of the window's side.

    Returns:
        ``f32[N, K]``.
    """
    mirrored = mirror(image, (around(window),) * 2, axis=0)
    found = []
    for begin in range(0, len(pixels), PATCHES):
        some = pixels[begin : begin + PATCHES]
        # The last ones are filled up, so that all run through one program.
        whole = np.pad(some, ((0, PATCHES - len(some)), (0, 0)), mode="edge")
        found.append(np.asarray(classify(variables, mirrored, whole))[: len(some)])
    return np.concatenate(found)


# --- Movements -----------------------------------------------------------------------

Move = Callable[[NumpyArray], NumpyArray]


def shifted(x: NumpyArray, *, by: int) -> NumpyArray:
    """``[H, W, C]`` moved down and to the right, its mirror image coming in."""
    return mirror(x, ((by, 0), (by, 0)), axis=0)[: x.shape[0], : x.shape[1]]


def rotated(x: NumpyArray, *, angle: float) -> NumpyArray:
    """``[H, W, C]`` turned about its middle by cubic splines, as f32.

    Splines and not lines, which would blur the image more than turning it. What they
    overshoot is cut off.
    """
    from scipy import ndimage

    turned = ndimage.rotate(
        x.astype(np.float32), angle, axes=(0, 1), reshape=False, mode="mirror"
    )
    return np.clip(turned, x.min(), x.max())


def _and_back(x: NumpyArray, *, angle: float) -> NumpyArray:
    return rotated(rotated(x, angle=angle), angle=-angle)


def _movements() -> dict[str, list[tuple[Move, Move]]]:
    """What is done to the image, and to its prediction, by the row of the table."""

    def both(*moves: Move) -> list[tuple[Move, Move]]:
        return [(move, move) for move in moves]

    rows = {
        f"shifted by {n} pixel{'s' * (n > 1)}": both(functools.partial(shifted, by=n))
        for n in SHIFTS
    }
    rows["flipped"] = both(lambda x: x[::-1], lambda x: x[:, ::-1])
    rows["turned by 90, 180, 270 degrees"] = both(
        *(functools.partial(np.rot90, k=k) for k in (1, 2, 3))
    )
    for angle in (15.0, 45.0):
        turn = functools.partial(rotated, angle=angle)
        rows[f"turned by {angle:g} degrees"] = both(turn)
    for angle in (15.0, 45.0):
        back = functools.partial(_and_back, angle=angle)
        rows[f"turned by {angle:g} degrees and back"] = [(back, lambda x: x)]
    return rows


SHIFTS = (1, 3, 8)
MOVEMENTS = _movements()


def interior(size: Shape, reach: int) -> NumpyArray:
    """Pixels whose logits no movement lets see what lies outside of the image.

    A disc about the middle: every turn maps it to itself. It ends so far from the
    border that the corner of a receptive field and the largest shift are inside.

    Args:
        size: (H, W).
        reach: How far a logit sees along an axis, to either side.

    Returns:
        ``bool[H, W]``.

    Raises:
        InputError: There is no such pixel.
    """
    radius = min(size) / 2 - math.ceil(reach * math.sqrt(2)) - max(SHIFTS)
    if radius <= 0:
        raise InputError(
            f"images of {size_text(size)} have no pixel so far inside that a net which"
            f" sees {reach} pixels to either side sees no border: use larger images."
        )
    y, x = (np.arange(n) - (n - 1) / 2 for n in size)
    return np.hypot(y[:, None], x[None]) <= radius


def reach_of(model: models.UNet, size: Shape) -> int:
    """How far a logit sees along an axis, to either side, in an image of this size."""
    reach = 0
    for axis, n in zip(models.axes(model, len(size)), size, strict=True):
        for pixel in range(n // 2, n // 2 + axis.step):
            first, last = axis.field(n, pixel)
            reach = max(reach, pixel - first, last - pixel)
    return reach


def changes(
    predict: Callable[[NumpyArray], NumpyArray], image: NumpyArray, inside: NumpyArray
) -> dict[str, list[float]]:
    """How far the prediction of a moved image is from the moved prediction.

    Args:
        predict: ``[H, W, C] -> f32[H, W]``, the probability of a class of two.
        image: ``[H, W, C]``.
        inside: ``bool[H, W]``, the pixels to compare.

    Returns:
        By the row of the table: the mean of the absolute difference of probabilities,
        and the part of the pixels whose class is another; of several movements their
        mean.
    """
    before = predict(image)[..., None]
    found = {}
    for name, moves in MOVEMENTS.items():
        each = []
        for of_image, of_prediction in moves:
            moved = predict(np.ascontiguousarray(of_image(image)))[inside]
            wanted = of_prediction(before)[..., 0][inside]
            differs = (moved > 0.5) != (wanted > 0.5)
            each.append([np.mean(np.abs(moved - wanted)), np.mean(differs)])
        found[name] = np.mean(each, axis=0, dtype=np.float64).tolist()
    return found


# --- One net -------------------------------------------------------------------------


def steps_of(net: Net, steps: int) -> int:
    """The steps of a net where the U-Net has ``steps``."""
    return max(round(net.pace * steps), 2)


def config(net: Net, options: argparse.Namespace) -> dict[str, Any]:
    """The run of a net, for `unet_jax.run.build`."""
    steps = steps_of(net, options.steps)
    model: dict[str, Any] = {"name": "unet", "features": FEATURES}
    if net.window:
        model["decoder"] = functools.partial(Middle, placed=net.placed)
    return {
        "seed": options.seed,
        "task": "classes",
        "data": {
            "source": "volumes",
            "root": options.root,
            "train": "all[:20]",
            "evaluation": "all[20:30]",
            "normalisation": "range",
            "volumes": {"slices": True, "label_names": ("membrane", "cell")},
        },
        "augment": net.augment,
        "model": model,
        # A Dice of one pixel is no Dice.
        "loss": {"cross_entropy": 1.0, "dice": 0.0 if net.window else 1.0},
        "optim": {
            "name": "adamw",
            "learning_rate": 3e-3,
            "schedule": "cosine",
            "warmup_steps": min(20, steps // 10),
            "weight_decay": 1e-4,
            "clip": 1.0,
            "freeze": (),
        },
        "plateau": {"monitor": "loss", "factor": 0.5, "patience": 10},
        "train": {
            "steps": steps,
            "batch_size": PATCHES if net.window else CROPS,
            "accumulate": 1,
            "crop": (net.window or CROP,) * 2,
            "ema": 0.98,
            "eval_batch_size": 1,
            "threshold": 0.5,
            "monitor": "dice",
            "patience": 0,
        },
    }


def train(wired: run.Run, window: int) -> tuple[TrainState, float]:
    """Trains a net from its start.

    Returns:
        The last state, and the seconds that the steps took without compilation.
    """
    train = wired.config["train"]
    batches = sharding.prefetch(
        data.train_batches(
            wired.dataset.train,
            seed=wired.config["seed"],
            batch_size=train["batch_size"],
            crop=train["crop"],
            # So that pixels at the border can be in the middle, too: all but the last
            # row and column, where the side is even.
            margin=around(window)[0] if window else 0,
        ),
        wired.mesh,
    )
    state, batch = wired.begin(), next(batches)
    step = wired.train_step.lower(state, batch).compile()
    begin = time.perf_counter()
    for _ in range(train["steps"]):
        state, _ = step(state, batch)
        batch = next(batches)
    jax.block_until_ready(state.params)
    return state, time.perf_counter() - begin


def one_pass(
    wired: run.Run, probability: Any, variables: PyTree, image: NumpyArray
) -> NumpyArray:
    """One fully convolutional pass: ``[H, W, C] -> f32[H, W, K]``."""
    size = image.shape[:-1]
    whole = mirror(image, models.pads(wired.model, size), axis=0)
    found = np.asarray(probability(variables, whole[None]))[0]
    return found[tuple(slice(n) for n in size)]


def dice(label: NumpyArray, probability: NumpyArray) -> list[float]:
    """The Dice of each class.

    Args:
        label: Class ids ``[N]``.
        probability: ``f32[N, K]``.
    """
    classes = probability.shape[-1]
    pairs = label.astype(np.int64) * classes + probability.argmax(-1)
    table = np.bincount(pairs, minlength=classes**2).reshape(1, classes, classes)
    names = tuple(map(str, range(classes)))
    return metrics.per_image(table, task="classes", label_names=names)[0].tolist()


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    begin = time.perf_counter()
    value = call()
    return value, time.perf_counter() - begin


def held_out(count: int, total: int) -> list[int]:
    """``count`` of ``total`` held-out slices, spread evenly."""
    return np.unique(np.linspace(0, total - 1, count).round().astype(int)).tolist()


def middle(size: Shape, side: int) -> tuple[slice, ...]:
    """The middle ``side`` x ``side`` pixels."""
    return tuple(slice((n - side) // 2, (n - side) // 2 + side) for n in size)


def packed(cell: NumpyArray) -> str:
    """A ``bool`` map as text, for JSON; `unpacked` undoes it."""
    return base64.b85encode(zlib.compress(np.packbits(cell).tobytes())).decode()


def unpacked(text: str, side: int) -> NumpyArray:
    """``bool[side, side]``."""
    bits = np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8)
    return np.unpackbits(bits, count=side**2).reshape(side, side).astype(bool)


def measure(net: Net, options: argparse.Namespace) -> dict[str, Any]:
    """Trains a net and measures everything that the page says of it.

    Returns:
        A record that JSON can hold.
    """
    wired = run.build(config(net, options), sharding.make_mesh(1))
    state, seconds = train(wired, net.window)
    variables = state.variables
    held = wired.dataset.evaluation
    size = held.size(0)
    slices = held_out(options.slices, len(held))
    record: dict[str, Any] = {
        "steps": wired.config["train"]["steps"],
        "seconds": seconds,
        "load": options.load,
        "parameters": sum(report.count_parameters(state.params, depth=1).values()),
        "slices": slices,
        "size": size,
        "hardware": hardware(),
        "versions": versions(),
    }
    return record | (
        _measure_window(net, wired, variables, slices, options)
        if net.window
        else _measure_pass(wired, variables, slices, options)
    )


def _probability(wired: run.Run) -> Any:
    return make_probability_fn(
        wired.model, task=wired.meta.task, stats=wired.meta.normalisation
    )


def _measure_window(
    net: Net,
    wired: run.Run,
    variables: PyTree,
    slices: Sequence[int],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Dice at the grid's pixels, and seconds beside those of a pass of the U-Net."""
    classify = jax.jit(make_window_fn(_probability(wired), net.window))
    predict = functools.partial(by_windows, classify, variables, window=net.window)
    # Seconds do not depend on the weights: the U-Net beside it is untrained.
    other = run.build(config(NETS["plain"], options), sharding.make_mesh(1))
    begun = other.begin().variables
    passing = functools.partial(one_pass, other, jax.jit(_probability(other)), begun)
    found: dict[str, Any] = {"dice": [], "window_seconds": [], "pass_seconds": []}
    first: Any = wired.dataset.evaluation[slices[0]]
    size = first["image"].shape[:-1]
    place = middle(size, options.side)
    corner = np.array([axis.start for axis in place], np.int32)
    pixels = grid((options.side,) * 2, 1) + corner
    region = predict(first["image"], pixels)  # compiles, too
    passing(first["image"])
    for i in slices:
        example: Any = wired.dataset.evaluation[i]
        image, pixels = example["image"], grid(size, options.stride)
        beside = [timed(lambda x=image: passing(x))[1] for _ in range(PASSES)]
        probability, seconds = timed(lambda x=image, p=pixels: predict(x, p))
        beside += [timed(lambda x=image: passing(x))[1] for _ in range(PASSES)]
        label = example["label"][pixels[:, 0], pixels[:, 1]]
        found["dice"].append(dice(label, probability))
        found["window_seconds"].append(seconds)
        found["pass_seconds"].append(float(np.median(beside)))
    cell = region[:, 1] > 0.5
    return found | {"picture": packed(cell.reshape(options.side, options.side))}


def _measure_pass(
    wired: run.Run,
    variables: PyTree,
    slices: Sequence[int],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Dice at the grid's pixels and at all, and what movements change."""
    run_net = jax.jit(_probability(wired))
    predict = functools.partial(one_pass, wired, run_net, variables)
    held = wired.dataset.evaluation
    size = held.size(0)
    inside = interior(size, reach_of(wired.model, size))
    found: dict[str, Any] = {"dice": [], "dice_all": [], "changes": []}
    found["field"] = models.axes(wired.model, len(size))[0].receptive_field
    found["inside"] = int(inside.sum())
    for i in range(len(held)):
        example: Any = held[i]
        image, label = example["image"], example["label"]
        probability = predict(image)
        found["dice_all"].append(dice(label.ravel(), probability.reshape(-1, 2)))
        found["changes"].append(changes(lambda x: predict(x)[..., 1], image, inside))
        if i in slices:
            y, x = grid(size, options.stride).T
            found["dice"].append(dice(label[y, x], probability[y, x]))
        if i == slices[0]:
            cell = probability[middle(size, options.side)][..., 1] > 0.5
            found["picture"] = packed(cell)
    return found


# --- The page ------------------------------------------------------------------------

CLASSES = ("membrane", "cell")


def _medians(record: Mapping[str, Any], key: str) -> NumpyArray:
    """Over slices."""
    return np.median(np.asarray(record[key], np.float64), axis=0)


def _number(value: float, digits: int = 2) -> str:
    """Two or more digits, without an exponent where none is needed."""
    return f"{value:#.{digits}g}" if abs(value) < 100 else f"{value:,.0f}"


def time_table(records: Mapping[str, Mapping[str, Any]], stride: int) -> str:
    """Seconds of the windows and of the pass beside them."""
    head = [
        "window",
        f"seconds, 1 of {stride**2} pixels",
        "seconds, all (extrapolated)",
    ]
    rows = [[*head, "seconds of the pass", "times as long, all pixels"]]
    for name, net in NETS.items():
        if not net.window:
            continue
        record = records[name]
        some = np.asarray(record["window_seconds"])
        whole = some * math.prod(record["size"]) / len(grid(record["size"], stride))
        ratio = np.median(whole / np.asarray(record["pass_seconds"]))
        seconds = (np.median(some), np.median(whole), _medians(record, "pass_seconds"))
        cells = [_number(float(s), 3) for s in seconds]
        rows.append([net.title, *cells, _number(float(ratio), 3)])
    return markdown(rows)


def dice_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Dice at the pixels of the grid, and of a pass at all."""
    rows = [["net", "parameters", "steps", "seconds of training"]]
    rows[0] += [f"Dice, {name}" for name in CLASSES]
    rows[0] += [f"{name}, all pixels" for name in CLASSES]
    for name, net in NETS.items():
        record = records[name]
        row = [net.title, f"{record['parameters']:,}", str(record["steps"])]
        row += [f"{record['seconds']:.0f}"]
        row += [f"{value:.3f}" for value in _medians(record, "dice")]
        some = (
            [record["dice_all"][i] for i in record["slices"]] if not net.window else 0
        )
        row += [f"{v:.3f}" for v in np.median(some, axis=0)] if some else ["", ""]
        rows.append(row)
    return markdown(rows)


def change_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """What movements of the input change, by what the net was trained on."""
    nets = [name for name, net in NETS.items() if not net.window]
    rows = [["the input is"]]
    for name in nets:
        rows[0] += [f"{NETS[name].title}: change", "classes changed"]
    for movement in MOVEMENTS:
        row = [movement]
        for name in nets:
            change, part = _change(records[name], movement)
            row += [_number(change), f"{100 * part:.2f} %"]
        rows.append(row)
    return markdown(rows)


def _change(record: Mapping[str, Any], movement: str) -> list[float]:
    found = [slices[movement] for slices in record["changes"]]
    return np.median(found, axis=0).tolist()


def summary(records: Mapping[str, Mapping[str, Any]]) -> str:
    """What the tables of Dice and of changes are for, whichever way it is."""

    def best(kind: Callable[[Net], bool]) -> str:
        names = [name for name, net in NETS.items() if kind(net)]
        found = {name: _medians(records[name], "dice")[0] for name in names}
        name = max(names, key=lambda name: found[name])
        return f'"{NETS[name].title}" ({found[name]:.3f})'

    window, net = best(lambda net: net.window > 0), best(lambda net: not net.window)
    same = best(lambda net: not net.window and net.augment == TURNS)
    return (
        f"Best at membranes, at the same pixels: of the windows {window}, of the U-Nets"
        f" {net}; trained with the windows' own augmentation {same}."
    )


def turning(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether augmentation makes turns change less."""
    names = [name for name in MOVEMENTS if name.startswith("turned")]
    names = [name for name in names if not name.endswith("back")]
    plain, augmented = (
        [_change(records[kind], name)[0] for name in names]
        for kind in ("plain", "augmented")
    )
    less = sum(b < a for a, b in zip(plain, augmented, strict=True))
    return (
        f"Counted: {less} of the {len(names)} rows of turns change the probabilities of"
        f' "{NETS["augmented"].title}" less than those of "{NETS["plain"].title}".'
    )


def document(
    records: Mapping[str, Mapping[str, Any]], options: argparse.Namespace
) -> str:
    """All tables, with what they were measured on and how."""
    plain = records["plain"]
    size, slices = plain["size"], plain["slices"]
    where = "; ".join(sorted({record["hardware"] for record in records.values()}))
    with_what = "; ".join(sorted({record["versions"] for record in records.values()}))
    loads = [record["load"] for record in records.values()]
    load = f"{min(loads):.1f}" + (f" to {max(loads):.1f}" * (max(loads) > min(loads)))
    busy = ", with other work beside it: ratios say more than seconds"
    command = "python benchmarks/sliding_window.py --root=DIR"
    command += " --out=runs/sliding_window"
    for key in ("steps", "stride", "slices", "side", "seed"):
        command += f" --{key}={getattr(options, key)}"
    numbers = ", ".join(str(20 + i) for i in slices)
    count = len(plain["changes"])
    text = f"""# A window at every pixel, or one pass

Written by `benchmarks/sliding_window.py`; run it again instead of editing this.

```
{command}
```

{where}; {with_what}. The load average before: {load}{busy if max(loads) > 2 else ""}.
Data: ISBI 2012, slices 0-19 to train on, 20-29 held out, {size_text(size)} pixels each.
One seed, {options.seed}.

## What the U-Net replaced

Ciresan et al. (2012, Deep neural networks segment neuronal membranes in electron
microscopy images, NIPS 25) gave a net a patch and asked for the class of the pixel in
its middle, for every pixel anew. The U-Net paper (arXiv 1505.04597, section 1) names
two costs: what neighbouring patches share is computed again for each, and a larger
patch sees more but says less well where. Here both have one encoder (features
{"-".join(map(str, FEATURES))}, batch norm, adamw): with a decoder and skips on it, it
is the U-Net, with one dense layer the window. "mean": that layer reads the mean of the
coarsest map over the patch. "by place": it reads every cell of that map, as fully
connected layers do, and can tell the middle from the border. It is neither their net
nor their training.

Windows are trained on {PATCHES} patches a step, drawn evenly from all pixels and so not
balanced, cross entropy, random flips and quarter turns, the image mirrored beyond its
border. U-Nets are trained on {CROPS} crops of {size_text((CROP, CROP))} a step, cross
entropy and Dice: one on random crops only, one with the windows' flips and quarter
turns, one ("augmented") with those, turns by any angle, scale, elastic deformation and
changes of grey value. Steps were chosen so that every training takes about as long;
what each took is in the table of Dice.

## Time

Seconds for one slice, medians over slices {numbers}. Windows were run for
every {options.stride}th pixel along both axes, {PATCHES} at a time; the
seconds for all pixels are those times {options.stride**2}. The pass is the U-Net's, all
pixels, timed just before and after the windows of the same slice.

{time_table(records, options.stride)}

## Dice

Medians over the same slices, at the same pixels (every {options.stride}th along both
axes), and for one pass also at all pixels of these slices.

{dice_table(records)}

{summary(records)}

The command also draws the middle {size_text((options.side,) * 2)} pixels of slice
{20 + slices[0]} as every net sees them. The picture is not here, because the
challenge's images are not free to be passed on.

## Does the prediction move with the input?

Mean absolute difference between the probability of a cell in the moved image and the
moved probability, and the pixels whose class is another; medians over {count} held-out
slices. Compared are the {plain["inside"]:,} pixels of a disc in the middle, from which
the U-Net never sees a border (a logit sees {plain["field"]} pixels along an axis).
Shifts go down and to the right at once; where a row has several movements it is their
mean. Turns by other than right angles resample image and prediction (cubic splines),
which by itself changes what the net sees: in the rows "and back" the image is turned,
turned back and predicted, and so resampled twice without being turned.

{change_table(records)}

{turning(records)}

A window run at every pixel moves with every shift, being the same function of every
patch. The U-Net pools {len(FEATURES) - 1} times by 2, and so moves with shifts by
multiples of {2 ** (len(FEATURES) - 1)} (to rounding); by others, other pixels are
pooled together.
"""
    blocks = [block.strip() for block in text.split("\n\n")]
    return "\n\n".join(wrapped(block) for block in blocks if block) + "\n"


def picture(
    records: Mapping[str, Mapping[str, Any]], options: argparse.Namespace
) -> bytes:
    """Image, truth and predictions side by side, a PNG."""
    import io

    from PIL import Image

    held = volumes.open(root=options.root, split="all[20:30]", label_names=CLASSES)
    example: Any = held[records["plain"]["slices"][0]]
    place = middle(example["label"].shape, options.side)
    image = np.repeat(example["image"][place][..., :1], 3, axis=-1)

    def painted(cell: NumpyArray) -> NumpyArray:
        return np.repeat((255 * cell.astype(np.uint8))[..., None], 3, axis=-1)

    panels = [("image", image), ("truth", painted(example["label"][place] == 1))]
    for name in sorted(NETS, key=lambda name: NETS[name].window > 0):
        cell = unpacked(records[name]["picture"], options.side)
        panels.append((NETS[name].title, painted(cell)))
    first = 2 + sum(not net.window for net in NETS.values())
    drawn = Image.fromarray(pictures.sheet([panels[:first], panels[first:]]))
    content = io.BytesIO()
    # 64 greys: a third of the bytes, and no difference to the eye.
    drawn.convert("L").quantize(64).save(content, "PNG", optimize=True)
    return content.getvalue()


# --- The command ---------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line.

    Raises:
        InputError: An option that cannot be.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--root", required=True, help="folder of train-volume.tif and train-labels.tif")
    add(
        "--out",
        default=Path("runs/sliding_window"),
        type=Path,
        help="where records, page and picture go (%(default)s)",
    )
    add("--steps", default=400, type=int, help="of a U-Net (%(default)s)")
    add("--stride", default=4, type=int, help="between windows (%(default)s)")
    add("--slices", default=3, type=int, help="that windows are run on (%(default)s)")
    add("--side", default=128, type=int, help="pixels of the picture (%(default)s)")
    add("--seed", default=0, type=int, help="of everything random (%(default)s)")
    options = parser.parse_args(argv)
    for key, least in (("steps", 2), ("stride", 1), ("slices", 1), ("side", 1)):
        value = getattr(options, key)
        if value < least:
            raise InputError(f"--{key} = {value} is too few: use {least} or more.")
    options.load = os.getloadavg()[0]  # nothing of ours is in it yet
    return options


def stored(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The records that are there.

    Raises:
        InputError: Those of another command, or a file that is none of ours.
    """
    path = options.out / "sliding_window.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kept, records = found["settings"], found["nets"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a record of this benchmark: remove it, or use another"
            " --out."
        ) from error
    for key, value in settings(options).items():
        if kept.get(key) != value:
            raise InputError(
                f"{path} was measured with {key} = {kept.get(key)!r} and not {value!r}:"
                " give that, or use another --out."
            )
    return records


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What records have to share to stand in one table."""
    keys = ("steps", "stride", "slices", "side", "seed")
    return {key: getattr(options, key) for key in keys}


def run_all(options: argparse.Namespace) -> str:
    """Measures the nets that are missing, and writes page and picture.

    Returns:
        The page.
    """
    records = stored(options)
    for name, net in NETS.items():
        if name in records:
            continue
        records[name], seconds = timed(lambda n=net: measure(n, options))
        text = json.dumps({"settings": settings(options), "nets": records}, indent=1)
        replace_file(options.out / "sliding_window.json", (text + "\n").encode())
        trained, score = records[name]["seconds"], _medians(records[name], "dice")
        print(
            f"{net.title}: trained for {trained:.0f} s, Dice {score[0]:.3f} and"
            f" {score[1]:.3f}, {seconds:.0f} s in all",
            flush=True,
        )
        jax.clear_caches()  # what one net compiled is of no use to the next
    text = document(records, options)
    replace_file(options.out / "sliding_window.png", picture(records, options))
    replace_file(options.out / "sliding_window.md", text.encode())
    print(text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; a user's mistake ends in one sentence and status 2."""
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        run_all(parse(argv))
    except InputError as error:
        print(f"sliding_window.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sliding_window.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
