"""The family side by side: one data set, one split, one seed, equally many steps.

    python -m benchmarks.family --root=DIR      # nuclei, as in configs/nuclei.py
    python -m benchmarks.family                 # the built-in cells

Every net is trained by the run that train.py trains, differs from the U-Net in the
named fields only, and is measured on whole images of the held-out part. A net's figures
are kept in the workdir as soon as it is done: the same command goes on with the nets
that are missing, and with ``--table`` only writes the tables again.

Beside the scores stand three things that write-ups of the family tend to claim and
seldom measure: what skips do for the encoder's gradients, what they do for the place of
outlines, and how alike the two maps are that a skip brings together.
"""

import argparse
import dataclasses
import json
import logging
import os
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import default, nuclei
from train import chosen, say
from unet_jax import augment, boundary, data, losses, metrics, models, report, sharding
from unet_jax.evaluation import jit_eval_step, make_eval_step
from unet_jax.log import replace_file
from unet_jax.normalisation import normalise
from unet_jax.run import Run, build
from unet_jax.training import TrainState, make_train_step
from unet_jax.types import Array, InputError, NumpyArray, PyTree, choose, size_text

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"nuclei": nuclei.get_config, "cells": default.get_config}
TOLERANCE = 1.0  # pixels that an outline may be off for the surface Dice
FLOPS_SIZE = (256, 256)
PIXELS = 4096  # that a linear CKA compares
IMAGES = 8  # that they are taken from
GRADIENT_BATCHES = 4


class Net(NamedTuple):
    """A row of the table: its name and the fields that make it another net."""

    title: str
    fields: dict[str, Any]


NETS = {
    "unet": Net("U-Net", {}),
    "no_skips": Net("U-Net without skips", {"merge": "none"}),
    "bilinear": Net("U-Net, bilinear up", {"up": "bilinear"}),
    "nearest": Net("U-Net, nearest up", {"up": "nearest"}),
    "pixel_shuffle": Net("U-Net, pixel shuffle up", {"up": "pixel_shuffle"}),
    "attention": Net("Attention U-Net", {"merge": "gated"}),
    "resunet": Net("ResUNet", {"block": "preactivation", "down": "strided"}),
    "wide": Net("U-Net as large as UNet++", {}),  # its features: `features_of`
    "unetpp": Net("UNet++", {"decoder": "unetpp"}),
    "unetpp_ds": Net(
        "UNet++, deep supervision", {"decoder": "unetpp", "deep_supervision": True}
    ),
}

PAIRS = (
    ("unetpp", "unet"),
    ("unetpp_ds", "unet"),
    ("unetpp", "wide"),
    ("unetpp_ds", "wide"),
    ("wide", "unet"),
    ("unetpp_ds", "unetpp"),
    ("no_skips", "unet"),
    ("bilinear", "unet"),
    ("nearest", "unet"),
    ("pixel_shuffle", "unet"),
    ("attention", "unet"),
    ("resunet", "unet"),
)


class Score(NamedTuple):
    """A score of an image: its heading, its decimals, whether more of it is better."""

    title: str
    digits: int
    more_is_better: bool


SCORES = {
    "dice": Score("Dice", 3, True),
    "iou": Score("IoU", 3, True),
    "hausdorff": Score("Hausdorff 95", 1, False),
    "surface_dice": Score("surface Dice", 3, True),
}


# --- What is trained -----------------------------------------------------------------


def count(model: models.UNet, channels: int) -> int:
    """The parameters of a 2-D net."""
    image = jax.ShapeDtypeStruct((1, *FLOPS_SIZE, channels), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return sum(report.count_parameters(variables["params"], depth=1).values())


def features_of(name: str, width: int, levels: int) -> tuple[int, ...]:
    """The channels of a net's levels.

    Args:
        name: A key of `NETS`. ``wide`` has the width with which a U-Net comes nearest
            to the parameters of a UNet++ of the given one, the others have it.
        width: Channels of the finest level; each of the others has twice as many as
            the one before.
        levels: How many there are.
    """

    def features(width: int) -> tuple[int, ...]:
        return tuple(width * 2**level for level in range(levels))

    if name != "wide":
        return features(width)
    nested = models.build("unet", features=features(width), num_classes=2)
    wanted = count(nested.clone(decoder="unetpp"), 1)
    # Parameters grow with the square of the width, so the nearest is one of two.
    nearest = int(width * (wanted / count(nested, 1)) ** 0.5)
    counts = {
        w: count(nested.clone(features=features(w)), 1) for w in (nearest, nearest + 1)
    }
    return features(min(counts, key=lambda w: abs(counts[w] - wanted)))


def configure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The config of one net: that of the data, and what the options say."""
    config = chosen(CONFIGS[options.data]())
    config["seed"] = options.seed
    if options.root:
        config["data"]["root"] = options.root
    config["mesh"]["data"] = 1
    config["model"] = {
        "name": "unet",
        "features": features_of(name, options.width, options.levels),
        **NETS[name].fields,
    }
    warmup = min(config["optim"]["warmup_steps"], options.steps // 10)
    config["optim"]["warmup_steps"] = warmup
    train = config["train"]
    train["steps"], train["batch_size"] = options.steps, options.batch
    train["crop"] = (options.crop, options.crop)
    return config


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all nets of a table must share, as it is kept with each."""
    config = chosen(CONFIGS[options.data]())
    return {
        "data": options.data,
        "train": config["data"]["train"],
        "evaluation": config["data"]["evaluation"],
        "seed": options.seed,
        "steps": options.steps,
        "batch": options.batch,
        "crop": options.crop,
        "width": options.width,
        "levels": options.levels,
    }


def train(
    run: Run,
    *,
    seconds: float | None,
    early: int,
    watch: Callable[[TrainState], None],
) -> tuple[TrainState, dict[str, Any]]:
    """Trains a net from its start.

    Args:
        run: The run.
        seconds: When to stop although there are steps left; None: never.
        early: The step after which ``watch`` is called, not counted in any time.
        watch: Called with the state, which it must not keep.

    Returns:
        The last state, and ``steps`` done, ``seconds`` they took and the last ``loss``.
    """
    state, total = run.init(), run.config["train"]["steps"]
    batches = sharding.prefetch(run.train_batches(0), run.mesh)
    batch = next(batches)
    step_fn = run.train_step.lower(state, batch).compile()
    taken, loss, spent, shown = 0, float("nan"), 0.0, 0.0
    while taken < total and not (seconds and spent >= seconds):
        begin = time.perf_counter()
        state, stats = step_fn(state, batch)
        batch = next(batches)
        loss = float(stats["loss"] / stats["count"])  # waits for the step
        spent += time.perf_counter() - begin
        taken += 1
        if taken == early:
            watch(state)
        if spent > shown + 20:
            shown = spent
            left = spent / taken * (total - taken)
            say(f"  step {taken}/{total}: loss {loss:.4f}, {left:.0f} s left")
    done = {"steps": taken, "seconds": spent, "loss": loss}
    return state, done


# --- Scores --------------------------------------------------------------------------


class Recorder:
    """An evaluation step that keeps what it predicted.

    Attributes:
        predictions: Each example's ``i32[*S]``, padded as in its batch.
    """

    def __init__(self, step: Any) -> None:
        self.step = step
        self.predictions: dict[int, NumpyArray] = {}

    def __call__(self, variables: PyTree, batch: Any) -> Mapping[str, Array]:
        out = self.step(variables, batch)
        predictions = np.asarray(out["shown"]["prediction"])
        for i, prediction in zip(np.asarray(out["index"]), predictions, strict=True):
            self.predictions[int(i)] = prediction
        return out


def assess(run: Run, state: TrainState) -> dict[str, Any]:
    """Evaluates a run of two classes, background and another, at full resolution.

    Returns:
        ``scores``, each a list with one entry an image; and ``pooled_dice``.
    """
    recorder = Recorder(run.eval_step)
    found = dataclasses.replace(run, eval_step=recorder).evaluate(state)
    names = run.meta.label_names
    dice = metrics.per_image(found.confusion, task=run.meta.task, label_names=names)
    scores: dict[str, list[float]] = {
        "dice": dice[:, 1].tolist(),
        "iou": (dice[:, 1] / (2 - dice[:, 1])).tolist(),  # the same counts
        "hausdorff": [],
        "surface_dice": [],
    }
    for i in found.index.tolist():
        example: Any = run.dataset.evaluation[i]
        counted = example["weight"] > 0
        size = tuple(slice(n) for n in counted.shape)
        label = (example["label"] == 1) & counted
        prediction = (recorder.predictions[i][size] == 1) & counted
        scores["hausdorff"].append(boundary.hausdorff(label, prediction))
        scores["surface_dice"].append(
            boundary.surface_dice(label, prediction, tolerance=TOLERANCE)
        )
    return {
        "scores": scores,
        "pooled_dice": found.results["dice"],
    }


def weigh(model: models.UNet, variables: PyTree, channels: int) -> dict[str, int]:
    """The parameters of a net, and the FLOPs of its forward pass of `FLOPS_SIZE`."""

    def forward(variables: PyTree, image: Array) -> Array:
        return model.apply(variables, image, train=False)[0]

    image = jax.ShapeDtypeStruct((1, *FLOPS_SIZE, channels), jnp.float32)
    owned = report.count_parameters(variables["params"], depth=1)
    flops = report.count_flops(forward, variables, image)
    return {"parameters": sum(owned.values()), "flops": sum(flops.values())}


def prunings(run: Run, state: TrainState) -> dict[str, dict[str, Any]]:
    """The net cut off at each of its levels, measured with the same variables."""
    found = {}
    for level in range(1, run.model.depth + 1):
        small, variables = models.prune(
            run.model,
            state.variables,
            level,
            channels=run.dataset.channels,
            rank=run.dataset.rank,
        )
        step = make_eval_step(
            small,
            losses.build(task=run.meta.task, **run.config["loss"]),
            task=run.meta.task,
            stats=run.meta.normalisation,
            threshold=run.meta.threshold,
        )
        cut = dataclasses.replace(
            run, model=small, eval_step=jit_eval_step(step, run.mesh)
        )
        found[str(level)] = {
            **weigh(small, variables, run.dataset.channels),
            **assess(cut, state),
        }
    return found


# --- What write-ups claim ------------------------------------------------------------


def gradient_meter(run: Run) -> Callable[[TrainState], list[float]]:
    """What measures the gradient that reaches each level of the encoder.

    Returns:
        ``state -> norms``, finest level first: the norm of the gradient of a level's
        parameters over the norm of the parameters, the mean over the same augmented
        batches each time. The gradient is that of the training step, before clipping.
    """
    # An optimizer that moves nothing and gives the gradient back as its state.
    keep = optax.GradientTransformation(
        lambda params: params,
        lambda updates, state, params=None: (optax.tree.zeros_like(updates), updates),
    )
    step = make_train_step(
        run.model,
        keep,
        losses.build(task=run.meta.task, **run.config["loss"]),
        augment.build(**run.config["augment"]),
        stats=run.meta.normalisation,
    )

    @jax.jit
    def norms(state: TrainState, batch: Any) -> dict[str, Array]:
        grads = step(state, batch)[0].opt_state
        levels = state.params["encoder"]
        return {
            name: optax.tree.norm(grads["encoder"][name]) / optax.tree.norm(params)
            for name, params in levels.items()
        }

    def measure(state: TrainState) -> list[float]:
        state = dataclasses.replace(
            state, step=jnp.zeros_like(state.step), opt_state=state.params, ema=None
        )
        batches = zip(range(GRADIENT_BATCHES), run.train_batches(0), strict=False)
        found = [norms(state, sharding.place(batch, run.mesh)) for _, batch in batches]
        return [
            float(np.mean([ratios[name] for ratios in found]))
            for name in sorted(found[0])
        ]

    return measure


def cka(first: NumpyArray, second: NumpyArray) -> float:
    """Linear CKA: how alike two sets of features are, up to rotation and scale.

    Args:
        first: ``[N, P]``, N examples of P features.
        second: ``[N, Q]``, of the same examples.

    Returns:
        Between 0 and 1; NaN if one of them is constant. Of independent features it is
        not 0 but about ``sqrt(P Q) / N``: N should be far more than P and Q.

    Reference: Kornblith et al. 2019, arXiv 1905.00414, section 3 (linear kernels, in
    the form over features).
    """
    x, y = (
        np.asarray(side, np.float64) - np.mean(side, axis=0, dtype=np.float64)
        for side in (first, second)
    )
    below = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(x.T @ y) ** 2 / below) if below > 0 else float("nan")


def _pairs_at_merges(model: models.UNet, variables: PyTree, image: Array) -> Any:
    """``{"row,column": (encoder's map, nearest node, up-sampled map)}``."""

    def of_ups(module: Any, method: str) -> bool:
        return method == "__call__" and (module.name or "").startswith("up")

    (_, aux), found = model.apply(
        variables, image, train=False, capture_intermediates=of_ups, mutable=True
    )
    maps = {}
    for name, (up,) in (
        (name, calls["__call__"])
        for name, calls in found["intermediates"]["decoder"].items()
    ):
        row, _, column = name.removeprefix("up").partition("_")
        i, j = int(row), int(column or model.depth - int(row))
        row_maps = aux["grid"][i] if "grid" in aux else (aux["encoder"][i],)
        maps[f"{i},{j}"] = (row_maps[0], row_maps[: j or 1][-1], up)
    return maps


def semantic_gap(run: Run, state: TrainState) -> dict[str, list[float]]:
    """How alike the inputs of each merge are, on held-out images of one size.

    Returns:
        By ``row,column`` of the node that follows (a U-Net's are those of the last
        column): the linear CKA of the encoder's map and the up-sampled map, and of the
        node before it in its row and the up-sampled map.
    """
    batches = data.eval_batches(
        run.dataset.evaluation,
        batch_size=run.config["train"]["eval_batch_size"],
        pads=lambda size: models.pads(run.model, size),
    )
    # Without a mirrored border where there are such images.
    images = [(np.all(b["weight"] > 0), b["image"]) for b in batches]
    inner = [image for whole, image in images if whole] or [i for _, i in images]
    same = [image for image in inner if image.shape == inner[0].shape]
    same = same[: -(-IMAGES // len(same[0]))]
    forward = jax.jit(
        lambda variables, image: _pairs_at_merges(
            run.model, variables, normalise(image, run.meta.normalisation)
        )
    )
    found = [jax.device_get(forward(state.variables, image)) for image in same]
    gaps = {}
    for node in sorted(found[0]):
        encoder, near, up = (
            np.concatenate([x.reshape(-1, x.shape[-1]) for x in maps])
            for maps in zip(*(nodes[node] for nodes in found), strict=True)
        )
        few = np.random.default_rng(0).permutation(len(up))[:PIXELS]
        gaps[node] = [cka(encoder[few], up[few]), cka(near[few], up[few])]
    return gaps


# --- One net -------------------------------------------------------------------------


def hardware() -> str:
    """Where this runs, in general words."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"one {device.device_kind}"
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return f"{cores} CPU cores"


def versions() -> str:
    """Of Python and of the packages that compute."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy")
    return ", ".join(
        [f"Python {platform.python_version()}"] + [f"{n} {version(n)}" for n in names]
    )


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one net and measures everything that the tables say of it.

    Args:
        name: A key of `NETS`.
        options: Of the command line.

    Returns:
        A record that JSON can hold.
    """
    run = build(configure(name, options), sharding.make_mesh(1))
    if len(run.meta.label_names) != 2:
        raise InputError(
            f"the data has the classes {', '.join(run.meta.label_names)}: use data of"
            " background and one other."
        )
    gradients: dict[str, Any] = {}
    early = max(options.steps // 20, 1)
    meter = gradient_meter(run) if name in ("unet", "no_skips") else None

    def watch(state: TrainState) -> None:
        if meter:
            gradients["early_step"], gradients["early"] = early, meter(state)

    state, done = train(run, seconds=options.seconds, early=early, watch=watch)
    if meter:
        gradients["end"] = meter(state)
    record: dict[str, Any] = {
        "settings": settings(options),
        "hardware": hardware(),
        "versions": versions(),
        "features": run.model.features,
        "images": [len(run.dataset.train), len(run.dataset.evaluation)],
        **done,
        **weigh(run.model, state.variables, run.dataset.channels),
        **assess(run, state),
    }
    if gradients:
        record["gradients"] = gradients
    if name in ("unet", "unetpp", "unetpp_ds"):
        record["cka"] = semantic_gap(run, state)
    if run.model.deep_supervision:
        record["levels"] = prunings(run, state)
    return record


# --- Tables --------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of images and its 95 % interval, by the bootstrap over images (BCa).

    Args:
        values: One an image; NaN is left out.

    Returns:
        ``(mean, low, high)``; NaN where there is nothing to tell them from.

    Reference: Efron 1987, doi 10.1080/01621459.1987.10478410.
    """
    from scipy import stats

    some = np.asarray(values, np.float64)
    some = some[~np.isnan(some)]
    if some.size < 2:
        return float(some[0]) if some.size else float("nan"), float("nan"), float("nan")
    mean = float(some.mean())
    if np.ptp(some) == 0:
        return mean, mean, mean
    bootstrap: Any = stats.bootstrap  # Any: it has had two names for its generator
    rng = np.random.default_rng(0)
    found = bootstrap((some,), np.mean, confidence_level=0.95, random_state=rng)
    low, high = found.confidence_interval
    return mean, float(low), float(high)


def difference(
    first: Mapping[str, Any], second: Mapping[str, Any], score: str
) -> tuple[float, float, float]:
    """`interval` of first minus second, image by image."""
    pair = (np.asarray(record["scores"][score], float) for record in (first, second))
    return interval(np.subtract(*pair).tolist())


def verdict(found: tuple[float, float, float], score: Score) -> str:
    """What an interval of differences says: ``better``, ``worse`` or ``not shown``."""
    _, low, high = found
    if not (low > 0 or high < 0):
        return "not shown"
    return "better" if (low > 0) == score.more_is_better else "worse"


def _cell(found: tuple[float, float, float], digits: int, *, sign: str = "") -> str:
    mean, low, high = found
    form = f"{sign}.{digits}f"
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first of them the heading, as a table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|---|" + "---:|" * (len(rows[0]) - 1)
    return "\n".join([lines[0], rule, *lines[1:]])


def _row(title: str, record: Mapping[str, Any], widths: str) -> list[str]:
    scores = (
        _cell(interval(record["scores"][key]), score.digits)
        for key, score in SCORES.items()
    )
    return [
        title,
        widths,
        f"{record['parameters']:,}",
        f"{record['flops'] / 1e9:.2f} G",
        *scores,
    ]


def main_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """All nets, and UNet++ cut off at each of its levels."""
    titles = [score.title for score in SCORES.values()]
    head = ["net", "widths", "parameters", "FLOPs", *titles]
    rows = [head]
    for name, record in records.items():
        title, total = NETS[name].title, record["settings"]["steps"]
        if record["steps"] < total:
            title += f" (stopped at step {record['steps']} of {total})"
        widths = "-".join(map(str, record["features"]))
        rows.append(_row(title, record, widths))
        for level, cut in record.get("levels", {}).items():
            widths = "-".join(map(str, record["features"][: int(level) + 1]))
            rows.append(_row(f"UNet++, cut off at L{level}", cut, widths))
    return markdown(rows)


def pair_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The differences of `PAIRS`, image by image."""
    rows = [["nets", *(score.title for score in SCORES.values())]]
    for first, second in PAIRS:
        if first not in records or second not in records:
            continue
        cells = []
        for key, score in SCORES.items():
            found = difference(records[first], records[second], key)
            says = verdict(found, score)
            text = _cell(found, score.digits, sign="+")
            cells.append(text if says == "not shown" else f"**{text}** {says}")
        rows.append([f"{NETS[first].title} against {NETS[second].title}", *cells])
    return markdown(rows)


def claim(
    records: Mapping[str, Mapping[str, Any]], first: str, second: str, *scores: str
) -> str:
    """One sentence on whether a net is better than another, whichever way it is."""
    if first not in records or second not in records:
        return f"{NETS[first].title} against {NETS[second].title}: not measured."
    parts = []
    for key in scores:
        found = difference(records[first], records[second], key)
        text = _cell(found, SCORES[key].digits, sign="+")
        parts.append(f"{SCORES[key].title} {text}, {verdict(found, SCORES[key])}")
    return f"{NETS[first].title} against {NETS[second].title}: {'; '.join(parts)}."


def gradient_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The gradients of the encoder's levels, with and without skips."""
    both = [records.get(n, {}).get("gradients", {}) for n in ("unet", "no_skips")]
    if not all("early" in found for found in both):
        return "Not measured."
    step = both[0]["early_step"]
    head = ["level of the encoder"]
    columns = []
    for when, words in (("early", f"after step {step}"), ("end", "at the end")):
        head += [f"{words}, with", "without", "with / without"]
        columns += [found[when] for found in both]
        columns.append([a / b for a, b in zip(*columns[-2:], strict=True)])
    rows = [head]
    for level, values in enumerate(zip(*columns, strict=True)):
        rows.append([str(level), *(f"{value:.3g}" for value in values)])
    text = []
    for when, k in (("early", 2), ("end", 5)):
        more = sum(ratio > 1 for ratio in columns[k])
        text.append(f"{when}, {more} of {len(columns[k])} levels get more with skips")
    return markdown(rows) + "\n\nCounted: " + "; ".join(text) + "."


def gap_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The linear CKA of the two sides of every merge."""
    names = [n for n in ("unet", "unetpp", "unetpp_ds") if "cka" in records.get(n, {})]
    if not names:
        return "Not measured."
    head, nodes = ["node X[row,column]"], set()
    for name in names:
        nested = name != "unet"
        title = NETS[name].title
        head += [f"{title}: encoder", "node before"] if nested else [title]
        nodes |= set(records[name]["cka"])
    rows = [head]
    for node in sorted(nodes):
        row = [f"X[{node}]"]
        for name in names:
            found = records[name]["cka"].get(node)
            sides = 1 if name == "unet" else 2
            row += [f"{v:.3f}" for v in found[:sides]] if found else [""] * sides
        rows.append(row)
    text = []
    for name in names[1:]:
        if "unet" not in names:
            break
        shared = records["unet"]["cka"].items()
        alike = sum(records[name]["cka"][node][1] > own[0] for node, own in shared)
        text.append(
            f"of the {len(shared)} last merges of {NETS[name].title}, {alike} join maps"
            " that are more alike (node before, up-sampled) than the U-Net's"
        )
    counted = "\n\nCounted: " + "; ".join(text) + "." if text else ""
    return markdown(rows) + counted


def command(options: argparse.Namespace) -> str:
    """The command of a table, without the folders of whoever gave it."""
    words = [f"--data={options.data}"] + ["--root=DIR"] * (options.data != "cells")
    for key in ("steps", "batch", "crop", "width", "levels", "seed"):
        words.append(f"--{key}={getattr(options, key)}")
    if options.seconds:
        words.append(f"--seconds={options.seconds:g}")
    return "python -m benchmarks.family " + " ".join(words)


def wrapped(block: str) -> str:
    """A paragraph or list entry in lines of 88; what is neither, as it is."""
    if block.startswith(("#", "|", "```")):
        return block
    indent = "  " if block.startswith("- ") else ""
    return textwrap.fill(
        " ".join(block.split()),
        width=88,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def document(
    records: Mapping[str, Mapping[str, Any]], options: argparse.Namespace
) -> str:
    """All tables, with what they were measured on and how."""
    some = list(records.values())
    missing = [NETS[name].title for name in NETS if name not in records]
    shared = some[0]["settings"]
    trained, held = some[0]["images"]
    where = "; ".join(sorted({record["hardware"] for record in some}))
    with_what = "; ".join(sorted({record["versions"] for record in some}))
    unfinished = f"Not measured: {'; '.join(missing)}." if missing else ""
    minutes = sum(record["seconds"] for record in some) / 60
    text = f"""# The family, side by side

Written by `benchmarks/family.py`; run it again instead of editing this.

```
{command(options)}
```

{where}; {with_what}. Data: `{shared["data"]}`, {trained} images to train on
(`{shared["train"]}`) and {held} held out (`{shared["evaluation"]}`), one split. Every
net: seed {shared["seed"]}, {shared["steps"]} steps of {shared["batch"]} crops of
{size_text((shared["crop"],) * 2)}, the same crops in the same order, and the optimizer,
schedule, loss and augmentation of the data's config. The {len(some)} trainings took
{minutes:.0f} minutes without compilation and evaluation.

## Scores

Means over the held-out images, at full resolution, with 95 % bootstrap intervals over
images. Hausdorff 95 is in pixels, less is better; the surface Dice lets an outline be
{TOLERANCE:g} pixel off. FLOPs: one forward pass of {size_text(FLOPS_SIZE)}, a
multiply-add counted as 2. A net differs from the U-Net in what its name says and in
nothing else; the wide U-Net has the width that brings its parameters nearest to those
of UNet++. "Cut off at L" is the deeply supervised UNet++ after training, with the same
variables, running no more than that level needs and answering with that level's head;
the row above it is the mean of all heads. (No times here: nets are trained one after
the other, and a machine is not equally busy all the while. `unet-jax prune` times its
levels in turns.)

{main_table(records)}

{unfinished}

## Differences

First minus second, image by image, with a paired bootstrap over images. Bold: the 95 %
interval does not contain 0. There are many comparisons and one seed: the intervals know
how images differ, not how another seed, another split or longer training would, and of
twenty comparisons of equal nets one would be bold.

{pair_table(records)}

Whether UNet++ is better than U-Net, and whether it still is than a U-Net of as many
parameters (it takes more FLOPs than either):

- {claim(records, "unetpp", "unet", "dice", "iou")}

- {claim(records, "unetpp_ds", "unet", "dice", "iou")}

- {claim(records, "unetpp", "wide", "dice", "iou")}

- {claim(records, "unetpp_ds", "wide", "dice", "iou")}

## Do skips let gradients reach the encoder?

The norm of the gradient of a level's parameters over the norm of the parameters, before
clipping; the mean of {GRADIENT_BATCHES} training batches, the same ones everywhere.
Level 0 is the finest, the last one the bottleneck. A net that fits better has smaller
gradients at the end: it is the early columns that tell how gradients flow.

{gradient_table(records)}

## Do skips put outlines in their place?

{claim(records, "no_skips", "unet", "hausdorff", "surface_dice", "dice")}

## Do dense skips close a semantic gap?

Linear CKA (Kornblith et al. 2019, arXiv 1905.00414) of the two sides of each merge:
what the skip brings and what was up-sampled; 1 is alike up to rotation and scale. On
{PIXELS} pixels of up to {IMAGES} held-out images. Row 0 has the full size. For UNet++
the up-sampled map is compared with the encoder's map of its row and with the node just
before it.

{gap_table(records)}
"""
    blocks = [block.strip() for block in text.split("\n\n")]
    return "\n\n".join(wrapped(block) for block in blocks if block) + "\n"


# --- The command ---------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line.

    Raises:
        InputError: An option that cannot be.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.family",
        description="Trains the family on the same data and compares it.",
    )
    add = parser.add_argument
    add("--data", help="nuclei or cells; by default nuclei where there is a --root")
    add("--root", default="", help="folder of the nuclei, as configs/nuclei.py says")
    add("--steps", type=int, default=700, help="of every net (%(default)s)")
    add("--batch", type=int, default=8, help="crops a step (%(default)s)")
    add("--crop", type=int, default=96, help="their side in pixels (%(default)s)")
    add("--width", type=int, default=16, help="of the finest level (%(default)s)")
    add("--levels", type=int, default=5, help="with the bottleneck (%(default)s)")
    add("--seed", type=int, default=0, help="of everything random (%(default)s)")
    add("--seconds", type=float, help="of training that a net may take at most")
    add("--only", help="names with commas: " + ",".join(NETS))
    add("--workdir", type=Path, default=Path("runs/family"), help="(%(default)s)")
    add("--out", type=Path, help="docs/family.md for the nuclei, else in the workdir")
    add("--table", action="store_true", help="write the tables, train nothing")
    options = parser.parse_args(argv)
    options.data = options.data or ("nuclei" if options.root else "cells")
    choose(CONFIGS, options.data, "--data =")
    if options.data == "nuclei" and not (options.root or options.table):
        raise InputError(
            "--data=nuclei needs a folder: add --root=DIR, laid out as"
            " configs/nuclei.py says."
        )
    for key, least in (("steps", 1), ("width", 1), ("levels", 3), ("crop", 1)):
        if getattr(options, key) < least:
            value = getattr(options, key)
            raise InputError(f"--{key} = {value} is too few: use {least} or more.")
    options.only = options.only.split(",") if options.only else list(NETS)
    for name in options.only:
        choose(NETS, name, "--only =")
    if options.out is None:
        docs = options.data == "nuclei"
        options.out = (ROOT / "docs" if docs else options.workdir) / "family.md"
    return options


def stored(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The records of the workdir, in the order of `NETS`.

    Raises:
        InputError: One of another table, or one that cannot be read.
    """
    records = {}
    for name in NETS:
        path = options.workdir / f"{name}.json"
        if not path.exists():
            continue
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            kept = record["settings"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(
                f"{path} is not a record of this benchmark: remove it, or use another"
                " --workdir."
            ) from error
        for key, value in settings(options).items():
            if kept.get(key) != value:
                raise InputError(
                    f"{path} was measured with {key} = {kept.get(key)!r} and not"
                    f" {value!r}: give that, or use another --workdir."
                )
        records[name] = record
    return records


def run_all(options: argparse.Namespace) -> str:
    """Measures the nets that are asked for and missing, and writes the tables.

    Args:
        options: Of `parse`.

    Returns:
        What was written to ``options.out``.
    """
    names = [name for name in NETS if name in options.only]
    records = stored(options)
    missing = [name for name in names if name not in records]
    for number, name in enumerate([] if options.table else missing, start=1):
        begin = time.perf_counter()
        say(f"[{number}/{len(missing)}] {NETS[name].title}")
        record = measure(name, options)
        text = json.dumps(record, indent=1) + "\n"
        replace_file(options.workdir / f"{name}.json", text.encode())
        dice = np.nanmean(record["scores"]["dice"])
        seconds = time.perf_counter() - begin
        say(f"  {record['steps']} steps, Dice {dice:.4f}, {seconds:.0f} s in all")
        jax.clear_caches()  # what one net compiled is of no use to the next
    records = {n: r for n, r in stored(options).items() if n in names}
    if not records:
        raise InputError(
            f"there is no record in {options.workdir}: leave out --table, or give the"
            " --workdir of a run."
        )
    text = document(records, options)
    replace_file(options.out, text.encode())
    say(text)
    say(f"written to {options.out}")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; a user's mistake ends in one sentence and status 2."""
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        run_all(parse(argv))
    except InputError as error:
        print(f"family.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("family.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
