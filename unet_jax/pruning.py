"""UNet++ cut off at each level: what it costs, what it scores, and the smaller net.

A net with deep supervision has a head at every level. Cut off at level l it runs the
triangle ``i + j <= l`` of its grid only (`unet_jax.models.prune`), so it is smaller and
faster; how much worse it is, the data says.

Reference: Zhou et al. 2018, arXiv 1807.10165, section 2.2 and figure 3.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from unet_jax import models
from unet_jax.checkpoint import Checkpoints, Meta
from unet_jax.layers import mirror
from unet_jax.models import UNet
from unet_jax.normalisation import Stats, normalise
from unet_jax.report import count_flops, count_parameters
from unet_jax.types import Array, InputError, NumpyArray, PyTree


@dataclasses.dataclass(frozen=True)
class Level:
    """A net cut off at one level, and what was measured of it.

    Attributes:
        level: Where, or None for the whole net with the mean of its heads.
        model: The net.
        variables: What it needs.
        parameters: How many it has.
        flops: Of a forward pass of one image, a multiply-add counted as 2.
        seconds: Of a forward pass of that image, the median.
        results: The figures of an evaluation.
    """

    level: int | None
    model: UNet
    variables: PyTree
    parameters: int
    flops: int
    seconds: float
    results: Mapping[str, float]


def check(model: UNet, where: str | os.PathLike[str]) -> None:
    """Refuses a net that has nothing to cut off.

    Raises:
        InputError: Not a UNet++ with deep supervision, or cut off already.
    """
    if model.nested and model.deep_supervision and model.level is None:
        return
    if model.level is not None:
        raise InputError(
            f"the net of {os.fspath(where)} is already cut off at level {model.level}:"
            " give the --workdir of the whole net."
        )
    raise InputError(
        f"the net of {os.fspath(where)} cannot be cut off, because only a UNet++ with"
        " deep supervision has a head at every level: train one with"
        " --config=configs/unetpp.py."
    )


def measure(
    model: UNet,
    variables: PyTree,
    *,
    image: NumpyArray,
    stats: Stats,
    evaluate: Callable[[UNet, PyTree], Mapping[str, float]],
    repeats: int = 20,
) -> list[Level]:
    """Measures the net cut off at each level, and whole.

    Args:
        model: A UNet++ with deep supervision.
        variables: Its variables.
        image: ``[*S, C]`` as stored, whose forward pass is counted and timed.
        stats: The normalisation.
        evaluate: Gives the figures of a net.
        repeats: Timed passes of each; they take turns, so that a machine that is busy
            for a while slows all alike.

    Returns:
        Levels 1 to the depth, then the whole net with the mean of its heads.
    """
    rank, channels = image.ndim - 1, image.shape[-1]
    padded = mirror(image, models.pads(model, image.shape[:-1]), axis=0)[None]
    found: list[Level] = []
    runs: list[Callable[[], Array]] = []
    for level in (*range(1, model.depth + 1), None):
        small, needed = model, variables
        if level is not None:
            small, needed = models.prune(
                model, variables, level, channels=channels, rank=rank
            )

        def forward(variables: PyTree, image: Array, small: UNet = small) -> Array:
            return small.apply(variables, normalise(image, stats), train=False)[0]

        # A valid net of fewer levels needs less of a margin, and works at other sizes.
        size = image.shape[:-1]
        own = padded
        if models.pads(small, size) != models.pads(model, size):
            own = mirror(image, models.pads(small, size), axis=0)[None]
        run = partial(jax.jit(forward), jax.device_put(needed), jnp.asarray(own))
        run().block_until_ready()  # compiles
        runs.append(run)
        found.append(
            Level(
                level=level,
                model=small,
                variables=needed,
                parameters=sum(count_parameters(needed["params"]).values()),
                flops=sum(count_flops(forward, needed, own).values()),
                seconds=float("nan"),
                results=evaluate(small, needed),
            )
        )
    times = np.zeros((repeats, len(runs)))
    for turn in times:
        for i, run in enumerate(runs):
            begin = time.perf_counter()
            run().block_until_ready()
            turn[i] = time.perf_counter() - begin
    return [
        dataclasses.replace(level, seconds=float(seconds))
        for level, seconds in zip(found, np.median(times, axis=0), strict=True)
    ]


def table(levels: Sequence[Level]) -> str:
    """The levels as text, a row each, and what the last column but one compares."""
    whole = levels[-1]
    rows = [["level", "parameters", "FLOPs", "latency", "of whole", "Dice", "IoU"]]
    for row in levels:
        rows.append(
            [
                "all heads" if row.level is None else str(row.level),
                f"{row.parameters:,}",
                f"{row.flops / 1e9:.3f} G",
                f"{row.seconds * 1e3:.2f} ms",
                f"{row.seconds / whole.seconds:.2f}",
                f"{row.results['dice']:.4f}",
                f"{row.results['iou']:.4f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def write(level: Level, meta: Meta, step: int, out: str | os.PathLike[str]) -> Path:
    """Writes a net that was cut off as a workdir to predict and evaluate with.

    Args:
        level: What to write.
        meta: Of the run it comes from.
        step: The training step of its weights.
        out: The folder; it must have no checkpoints yet.

    Returns:
        ``out``.

    Raises:
        InputError: There are checkpoints already.
    """
    folder = Path(out)
    if (folder / "checkpoints").exists():
        raise InputError(
            f"{folder} already holds checkpoints: give another folder to --out."
        )
    name = meta.model["name"]
    smaller = dataclasses.replace(
        meta,
        model={"name": name, **models.fields(level.model)},
        results=dict(level.results),
    )
    with Checkpoints(folder) as checkpoints:
        checkpoints.save_variables(step, level.variables, smaller)
    return folder
