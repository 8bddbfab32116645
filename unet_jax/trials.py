"""What is tried before a long run: a learning rate, and one batch learned by heart.

Both take a run's config, change what stands in the way (`prepared`), and train on its
own data with its own net and loss for a minute.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unet_jax import metrics, report
from unet_jax.log import replace_file
from unet_jax.run import Run
from unet_jax.training import TrainState
from unet_jax.types import NumpyArray, choose

Say = Callable[[str], None]
"""prints a line for a person"""

LOWEST, HIGHEST, RATES = 1e-6, 10.0, 100
WORSE = 4.0  # times the lowest loss: from there on the rates are too high
STEPS, LOOK_EVERY = 300, 25
BY_HEART = 0.95  # Dice from which a batch counts as learned


def prepared(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config that a trial runs with.

    Args:
        name: ``find_lr`` or ``overfit_one_batch``.
        config: Of a run, plain data without the keys left at None.
    """
    choose(TRIALS, name, "the trial")
    train = {**config["train"], "steps_per_call": 1, "ema": 0.0, "steps": STEPS}
    optim = {**config["optim"], "schedule": "constant", "warmup_steps": 0}
    config = {**config, "mesh": {**config["mesh"], "pmap": False, "fsdp": False}}
    if name == "find_lr":
        # The state's scale is what is varied, so that the step is compiled once.
        return {**config, "train": train, "optim": {**optim, "learning_rate": 1.0}}
    train |= {"accumulate": 1, "foreground": 1.0}
    model = dict(config["model"])
    if "dropout" in model:
        model["dropout"] = 0.0
    optim["weight_decay"] = 0.0
    return {**config, "train": train, "optim": optim, "model": model, "augment": {}}


def find_lr(run: Run, workdir: Path | None, *, say: Say) -> int:
    """Trains with a rate that rises from step to step, and says which suits.

    The rate is a tenth of where the smoothed loss is lowest, or where it has fallen
    half way if that is lower.

    Args:
        run: Of a config that is `prepared`.
        workdir: Gets ``learning_rate.csv`` and ``.png``; None for neither.
        say: Is told.

    Returns:
        The exit status, 1 where no rate makes the loss fall.

    Reference: L. N. Smith 2017, arXiv 1506.01186, section 3.3.
    """
    rates = np.geomspace(LOWEST, HIGHEST, RATES)
    state, losses = run.begin(), []
    batches = run.placed_batches(0)
    say(f"trying {RATES} learning rates from {LOWEST:g} to {HIGHEST:g} ...")
    for rate in rates.tolist():
        state = _rescaled(state, rate)
        state, stats = run.train_step(state, next(batches))
        losses.append(float(stats["loss"]) / max(float(stats["count"]), 1.0))
        smooth = smoothed(losses)
        if not math.isfinite(losses[-1]) or smooth[-1] > WORSE * smooth.min():
            break
    rates = rates[: len(losses)]
    if workdir is not None:
        rows = [f"{r:.6g},{x:.6g}" for r, x in zip(rates, losses, strict=True)]
        text = "\n".join(["learning_rate,loss", *rows]) + "\n"
        replace_file(workdir / "learning_rate.csv", text.encode())
        report.rates(workdir / "learning_rate.png", rates, losses, smoothed(losses))
        say(f"the losses are in {workdir / 'learning_rate.png'} and .csv")
    found = suggested(rates, losses)
    if found is None:
        say(
            "no learning rate made the loss fall by a tenth: look at the data"
            " (unet-jax inspect) and try --overfit_one_batch"
        )
        return 1
    lowest = rates[int(np.nanargmin(smoothed(losses)))]
    say(
        f"the loss is lowest at {lowest:.1e}; a rate that suits:"
        f" --config.optim.learning_rate={found:.1e}"
    )
    return 0


def smoothed(losses: list[float]) -> NumpyArray:
    """The running mean of losses that forgets a fifth a step: ``f64[N]``."""
    out, mean = [], 0.0
    for i, loss in enumerate(losses, start=1):
        mean = 0.8 * mean + 0.2 * loss
        out.append(mean / (1 - 0.8**i))
    return np.asarray(out)


def suggested(rates: NumpyArray, losses: list[float]) -> float | None:
    """The rate to train with, or None where the loss never falls by a tenth.

    Args:
        rates: ``f64[N]``, rising.
        losses: At each of them; the last may be infinite or NaN.
    """
    smooth = smoothed(losses)
    smooth = smooth[np.isfinite(smooth)]
    if len(smooth) < 3:
        return None
    lowest = int(smooth.argmin())
    highest = smooth[: lowest + 1].max()
    if smooth[lowest] > 0.9 * highest:
        return None
    # Not where it falls fastest: between two steps that is mostly noise.
    half = smooth[: lowest + 1] > (highest + smooth[lowest]) / 2
    return float(min(rates[lowest] / 10, rates[int(np.flatnonzero(half)[-1])]))


def overfit(run: Run, workdir: Path | None, *, say: Say) -> int:
    """Trains on the first batch alone, until the net knows it by heart.

    A net that cannot has data, loss or rate that do not fit it, whatever else is tried.

    Args:
        run: Of a config that is `prepared`: without augmentation and dropout.
        workdir: Gets ``overfit.png``, image, truth and prediction; None for nothing.
        say: Is told.

    Returns:
        The exit status: 0 where the Dice of the batch reaches 0.95.
    """
    batch = next(run.placed_batches(0))
    state, dice, loss, step = run.begin(), math.nan, math.nan, 0
    meta, shown = run.meta, None
    say(f"learning one batch of {len(batch['index'])} crops by heart ...")
    while step < STEPS and not dice >= BY_HEART:
        for _ in range(LOOK_EVERY - 1):
            state, _ = run.train_step(state, batch)
        state, stats = run.train_step(state, batch)
        step += LOOK_EVERY
        loss = float(stats["loss"]) / max(float(stats["count"]), 1.0)
        out = run.eval_step(state.variables, batch)
        found = metrics.summarise(
            np.asarray(out["confusion"]), task=meta.task, label_names=meta.label_names
        )
        dice, shown = found["dice"], out["shown"]
        say(f"step {step}/{STEPS}: loss {loss:.4f}, Dice of the batch {dice:.4f}")
        if not math.isfinite(loss):
            break
    if workdir is not None and shown is not None:
        arrays = {name: np.asarray(x) for name, x in shown.items()}
        rows = [
            {k: x[i] for k, x in arrays.items()} for i in range(len(batch["index"]))
        ]
        path = workdir / "overfit.png"
        report.picture(rows[:4], path, label_names=meta.label_names)
        say(f"image | truth | prediction: {path}")
    if dice >= BY_HEART:
        say(f"passed: the net knows the batch by heart after {step} steps")
        return 0
    say(
        f"FAILED: after {step} steps the Dice of this one batch is {dice:.4f}, below"
        f" {BY_HEART}. Look whether the masks lie on their images and are read as"
        " meant (unet-jax inspect), try another learning rate (--find_lr), more"
        " model.features, or another loss"
    )
    return 1


def _rescaled(state: TrainState, scale: float) -> TrainState:
    here = jax.device_put(np.float32(scale), state.lr_scale.sharding)
    return dataclasses.replace(state, lr_scale=here)


TRIALS: dict[str, Callable[..., int]] = {
    "find_lr": find_lr,
    "overfit_one_batch": overfit,
}
"""(run, workdir, say) -> exit status, by the flag of train.py"""
