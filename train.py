"""Trains a net: flags, wiring and the loop.

    python train.py --config=configs/default.py --workdir=runs/cells

The same command again goes on where the run was stopped. ``--dry_run`` prints the model
and the memory of its compiled step and stops there.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from unet_jax import (
    augment,
    data,
    losses,
    models,
    normalisation,
    optim,
    report,
    sharding,
)
from unet_jax.checkpoint import Checkpoints, Meta, check_same_run
from unet_jax.evaluation import Evaluation, Progress, evaluate, make_eval_step, score_of
from unet_jax.log import Meter, RunLog
from unet_jax.training import TrainState, init_state, is_due, make_train_step
from unet_jax.types import InputError

NOT_SCORED = -1e30  # the score of a checkpoint between evaluations: never the best


def say(text: str) -> None:
    """Prints a line without breaking the progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def chosen(section: Any) -> Any:
    """A config as plain data, without the keys left at None."""
    if isinstance(section, ConfigDict):
        section = section.to_dict()
    if isinstance(section, dict):
        return {k: chosen(v) for k, v in section.items() if v is not None}
    if isinstance(section, list | tuple):
        return tuple(chosen(v) for v in section)
    return section


@dataclasses.dataclass
class Run:
    """The parts of a run, wired: what `build` makes of a config."""

    config: dict[str, Any]
    mesh: jax.sharding.Mesh
    dataset: data.Dataset
    model: models.UNet
    schedule: Any
    meta: Meta
    init: Any  # () -> TrainState
    train_step: Any  # (state, batch) -> (state, stats), jitted
    eval_step: Any  # (variables, batch) -> stats, jitted

    def train_batches(self, start: int) -> Iterator[Any]:
        """Host batches from step ``start`` on."""
        train = self.config["train"]
        return data.train_batches(
            self.dataset.train,
            seed=self.config["seed"],
            batch_size=train["batch_size"],
            crop=train["crop"],
            margin=models.margin(self.model),
            start=start,
        )

    def evaluate(self, state: TrainState, *, keep: int = 0) -> Evaluation:
        """Evaluates the evaluation split, whole images."""
        batches = data.eval_batches(
            self.dataset.evaluation,
            batch_size=self.config["train"]["eval_batch_size"],
            pads=partial(models.pads, self.model),
        )
        return evaluate(
            self.eval_step,
            state.variables,
            batches,
            mesh=self.mesh,
            task=self.meta.task,
            label_names=self.meta.label_names,
            keep=keep,
        )


def build(config: dict[str, Any]) -> Run:
    """Wires a run from a config; reads the data, compiles nothing."""
    train = config["train"]
    mesh = sharding.make_mesh(**config["mesh"])
    sharding.check_batch(mesh, train["batch_size"], "train.batch_size")
    sharding.check_batch(mesh, train["eval_batch_size"], "train.eval_batch_size")
    if train["batch_size"] % train["accumulate"]:
        raise InputError(
            f"train.accumulate = {train['accumulate']} does not divide"
            f" train.batch_size = {train['batch_size']}: use a divisor of it."
        )
    for key, value in (("over", "batch"), ("normalise", "weights")):
        if train["accumulate"] > 1 and config["loss"].get(key) == value:
            raise InputError(
                f"loss.{key} = {value!r} needs the whole batch at once, and"
                f" train.accumulate = {train['accumulate']} splits it: use"
                f" train.accumulate=1 or leave out loss.{key}."
            )
    task = config["task"]
    loss_fn = losses.build(task=task, **config["loss"])
    augment_fn = augment.build(**config["augment"])
    dataset = data.build(task=task, **config["data"])
    if len(train["crop"]) != dataset.rank:
        raise InputError(
            f"train.crop = {train['crop']} has {len(train['crop'])} axes and the images"
            f" have {dataset.rank}: give one size an axis."
        )
    names = dataset.label_names
    volumes = config["data"]["volumes"] if config["data"]["source"] == "volumes" else {}
    model = models.build(**config["model"], num_classes=len(names))
    models.output_size(model, train["crop"])
    stats = normalisation.measure(
        config["data"]["normalisation"],
        (dataset.train[i]["image"] for i in range(len(dataset.train))),
    )
    tx, schedule = optim.build(total_steps=train["steps"], **config["optim"])
    meta = Meta(
        model={"name": config["model"]["name"], **models.fields(model)},
        task=task,
        label_names=names,
        normalisation=stats,
        channels=dataset.channels,
        rank=dataset.rank,
        spacing=volumes.get("spacing", ()),
        threshold=train["threshold"],
        config=config,
    )
    whole, rows = sharding.replicated(mesh), sharding.split(mesh)
    shape = (train["batch_size"], *train["crop"], dataset.channels)
    init = partial(
        init_state,
        model,
        tx,
        seed=config["seed"],
        image_shape=shape,
        ema=train["ema"] > 0,
    )
    train_step = make_train_step(
        model,
        tx,
        loss_fn,
        augment_fn,
        stats=stats,
        accumulate=train["accumulate"],
        ema_decay=train["ema"],
    )
    eval_step = make_eval_step(
        model, loss_fn, task=task, stats=stats, threshold=train["threshold"]
    )
    return Run(
        config=config,
        mesh=mesh,
        dataset=dataset,
        model=model,
        schedule=schedule,
        meta=meta,
        init=jax.jit(init, out_shardings=whole),
        train_step=jax.jit(
            train_step,
            in_shardings=(whole, rows),
            out_shardings=(whole, whole),
            donate_argnums=0,
        ),
        eval_step=jax.jit(eval_step, in_shardings=(whole, rows), out_shardings=whole),
    )


def describe(run: Run) -> None:
    """Prints what is trained on what."""
    dataset, train = run.dataset, run.config["train"]
    size = " x ".join(map(str, train["crop"]))
    say(
        f"data: {len(dataset.train)} training and {len(dataset.evaluation)} evaluation"
        f" examples, {dataset.dtype}, {dataset.channels} channel(s);"
        f" {run.meta.task}: {', '.join(run.meta.label_names)}"
    )
    epochs = train["steps"] * train["batch_size"] / len(dataset.train)
    say(
        f"training: {train['steps']} steps of {train['batch_size']} crops of {size},"
        f" {epochs:.1f} times through the data"
    )
    shape = (1, *train["crop"], dataset.channels)
    say(report.model_table(run.model, shape, freeze=run.config["optim"]["freeze"]))


@contextlib.contextmanager
def interruptible() -> Iterator[list[str]]:
    """A list that gets the name of the first SIGTERM or SIGINT to arrive.

    A second one acts as it always does.
    """
    seen: list[str] = []
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, _: Any) -> None:
        seen.append(signal.Signals(number).name)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def compile_step(run: Run, state: Any, batch: Any) -> Any:
    """Compiles the training step ahead of time and prints its memory."""
    begin = time.perf_counter()
    say("compiling the training step ...")
    compiled = run.train_step.lower(state, batch).compile()
    say(f"compiled in {time.perf_counter() - begin:.1f} s")
    say(report.memory_line(compiled))
    return compiled


def train_and_evaluate(
    config: dict[str, Any], workdir: str | os.PathLike[str] | None
) -> dict[str, float]:
    """A whole run, from where ``workdir`` stands; without a workdir a dry run.

    Args:
        config: Plain data, see `chosen`.
        workdir: Where the run is kept, or None to stop before the first step.

    Returns:
        The figures of the last evaluation.
    """
    run = build(config)
    describe(run)
    shapes = jax.eval_shape(run.init)
    whole = sharding.replicated(run.mesh)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes
    )
    if workdir is None:
        batch = sharding.place(next(run.train_batches(0)), run.mesh)
        compile_step(run, shapes, batch)
        return {}
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with Checkpoints(workdir) as checkpoints:
        start = checkpoints.latest_step() or 0
        progress, results = Progress(), {}
        if start:
            stored = checkpoints.read_meta(start)
            check_same_run(stored, run.meta, workdir)
            progress, results = Progress(**stored.progress), stored.results
            state = checkpoints.restore(start, shapes)
            say(f"going on from step {start} of {workdir}")
        else:
            state = run.init()
        text = json.dumps(run.meta.to_json()["config"], indent=2)
        (workdir / "config.json").write_text(text + "\n")
        log = RunLog(workdir, resume_step=start)
        try:
            results = loop(run, workdir, checkpoints, log, state, progress, results)
        finally:
            log.close()
    say(f"curves: {report.curves(workdir)}")
    return results


def loop(
    run: Run,
    workdir: Path,
    checkpoints: Checkpoints,
    log: RunLog,
    state: TrainState,
    progress: Progress,
    results: dict[str, float],
) -> dict[str, float]:
    """Steps, logs, evaluates, decides and saves, in this order, until the end."""
    train, total = run.config["train"], run.config["train"]["steps"]
    step, patience = int(state.step), train["patience"]
    stop = bool(patience) and progress.since_best >= patience
    if step >= total or stop:
        say(f"the run is finished at step {step}: {figures(results)}")
        return results
    batches = sharding.prefetch(run.train_batches(step), run.mesh)
    batch = next(batches)
    step_fn = compile_step(run, state, batch)
    meter = Meter(workdir)
    bar = tqdm(total=total, initial=step, unit="step", disable=not sys.stderr.isatty())
    with interruptible() as interrupted, bar:
        while step < total and not stop:
            state, stats = step_fn(state, batch)
            batch = next(batches)
            step += 1
            meter.add(step, stats)
            bar.update()
            if is_due(step, train["log_every"], total):
                means = meter.take()
                rate = float(run.schedule(step - 1)) * progress.lr_scale
                log.scalars("train", step, {**means, "learning_rate": rate})
                line = f"loss {means['loss']:.4f}"
                line += f", {means['images_per_second']:.1f} images/s"
                bar.set_postfix_str(line)
                if not sys.stderr.isatty():
                    say(f"step {step}/{total}: {line}")
            score = NOT_SCORED
            if is_due(step, train["eval_every"], total):
                meter.drain()
                results, score = assess(run, workdir, log, state, step)
                progress = decide(run, progress, step, score, results)
                state = dataclasses.replace(
                    state,
                    lr_scale=jax.device_put(
                        np.float32(progress.lr_scale), state.lr_scale.sharding
                    ),
                )
                stop = bool(patience) and progress.since_best >= patience
                meter.restart()
            stop = stop or bool(interrupted)
            if stop or is_due(step, train["save_every"], total):
                meter.drain()
                meta = dataclasses.replace(
                    run.meta, progress=dataclasses.asdict(progress), results=results
                )
                checkpoints.save(state, meta, score=score)
        checkpoints.wait()
    if interrupted:
        say(f"{interrupted[0]}: saved step {step}; the same command goes on from it")
        raise SystemExit(0)
    if step < total:
        say(f"stopped early: {patience} evaluations without a better one")
    say(
        f"finished at step {step}; best {train['monitor']}"
        f" {abs(progress.best or 0.0):.4f} at step {progress.best_step};"
        f" checkpoints, logs and pictures are in {workdir}"
    )
    return results


def figures(results: dict[str, float]) -> str:
    """The figures of an evaluation that belong on one line."""
    short = [k for k in results if k in ("loss", "dice") or k.startswith("dice/")]
    return ", ".join(f"{k} {results[k]:.4f}" for k in short)


def assess(
    run: Run, workdir: Path, log: RunLog, state: TrainState, step: int
) -> tuple[dict[str, float], float]:
    """Evaluates, logs it and draws a picture; returns the figures and the score."""
    begin = time.perf_counter()
    found = run.evaluate(state, keep=4)
    log.scalars("evaluation", step, found.results)
    path = workdir / "pictures" / f"step_{step:06d}.png"
    report.picture(found.kept, path, label_names=run.meta.label_names)
    log.image(step, path)
    seconds = time.perf_counter() - begin
    say(f"evaluation at step {step}: {figures(found.results)} ({seconds:.1f} s)")
    return found.results, score_of(found.results, run.config["train"]["monitor"])


def decide(
    run: Run, progress: Progress, step: int, score: float, results: dict[str, float]
) -> Progress:
    """The loop's decisions after an evaluation."""
    plateau = run.config["plateau"]
    on = run.config["optim"]["schedule"] == "plateau"
    watched = -score_of(results, plateau["monitor"]) if on else None
    new = progress.after(
        step,
        score,
        watched=watched,
        factor=plateau["factor"],
        patience=plateau["patience"],
    )
    if new.lr_scale != progress.lr_scale:
        say(f"plateau: the learning rate is now scaled by {new.lr_scale:g}")
    return new


def parse(argv: list[str]) -> tuple[dict[str, Any], str | None]:
    """The config and the workdir that a command line asks for; no workdir: a dry run.

    Raises:
        InputError: A flag, a file or a key that is wrong.
    """
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file(
        "config", None, "The config file.", flag_values=values
    )
    workdir = flags.DEFINE_string(
        "workdir", None, "Where the run is kept.", flag_values=values
    )
    dry_run = flags.DEFINE_bool(
        "dry_run", False, "Stop before the first step.", flag_values=values
    )
    show = flags.DEFINE_bool("help", False, "Show this help.", flag_values=values)
    files = [arg.split("=", 1)[1] for arg in argv if re.match("--?config=", arg)]
    if not files and "--config" not in argv:
        default = Path(__file__).parent / "configs" / "default.py"
        argv = [argv[0], f"--config={default}", *argv[1:]]
    for name in files:
        if not Path(name).is_file():
            raise InputError(f"there is no config file {name}: look into configs/.")
    wrong = (flags.Error, AttributeError, KeyError, TypeError, OSError, ValueError)
    try:
        rest = values(argv)
        config.value["train"]  # a file that did not load says so when it is used
    except wrong as error:
        text = str(error).replace("\\n", " ").replace("\\'", "").strip("'\"")
        text = " ".join(text.split())
        raise InputError(f"the command line does not work: {text}") from error
    if show.value:
        print(__doc__, values.main_module_help())
        raise SystemExit(0)
    if len(rest) > 1:
        raise InputError(f"{rest[1]!r} is no flag: write --config=FILE --workdir=DIR.")
    if not workdir.value and not dry_run.value:
        raise InputError("say where the run should be kept: --workdir=DIR.")
    return chosen(config.value), None if dry_run.value else workdir.value


def main() -> int:
    """Runs a command line; a user's mistake ends in one sentence and status 2."""
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        config, workdir = parse(sys.argv)
        devices = jax.devices()
        say(f"{jax.default_backend()}: {devices[0].device_kind}, {len(devices)} found")
        train_and_evaluate(config, workdir)
    except InputError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
