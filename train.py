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
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from unet_jax import normalisation, report, sharding
from unet_jax.checkpoint import Checkpoints, check_same_run, stored_meta
from unet_jax.evaluation import Progress, score_of
from unet_jax.log import Meter, RunLog, replace_file
from unet_jax.run import Run, build
from unet_jax.training import TrainState, is_due
from unet_jax.types import InputError, size_text

NOT_SCORED = -1e30  # of a checkpoint that is not the best so far


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


def announced(eval_step: Any) -> Any:
    """The evaluation step, saying so when a new image size has it compiled."""
    seen: set[tuple[int, ...]] = set()

    def step(variables: Any, batch: Any) -> Any:
        shape = batch["image"].shape
        if shape not in seen:
            seen.add(shape)
            say(f"compiling the evaluation of {size_text(shape[1:-1])} ...")
        return eval_step(variables, batch)

    return step


def describe(run: Run) -> None:
    """Prints what is trained on what."""
    dataset, train = run.dataset, run.config["train"]
    size = size_text(train["crop"])
    kind = run.meta.normalisation["kind"]
    if run.start is not None:
        say(run.start.text)
        theirs = run.start.normalisation.get("kind", kind)
        if theirs != kind:
            say(
                f"note: the weights were trained with data.normalisation={theirs}, and"
                f" this run has {kind}"
            )
    say(
        f"data: {len(dataset.train)} training and {len(dataset.evaluation)} evaluation"
        f" examples, {dataset.dtype}, {dataset.channels} channel(s);"
        f" {run.meta.task}: {', '.join(run.meta.label_names)}"
    )
    some = range(min(len(dataset.train), 16))
    images = (dataset.train[i]["image"] for i in some)
    if advice := normalisation.advice(run.meta.normalisation, images):
        say(f"note: {advice}")
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
    mesh = sharding.make_mesh(**config["mesh"])
    kind = mesh.devices.flat[0].device_kind
    say(f"{jax.default_backend()}: {kind}, {mesh.size} device(s) used")
    stored = None if workdir is None else stored_meta(workdir)
    run = build(config, mesh, stored)
    run = dataclasses.replace(run, eval_step=announced(run.eval_step))
    describe(run)
    whole = sharding.replicated(mesh)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        jax.eval_shape(run.init),
    )
    if workdir is None:
        batch = sharding.place(next(run.train_batches(0)), mesh)
        compile_step(run, shapes, batch)
        return {}
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the workdir {workdir} cannot be made ({error.strerror}): use another."
        ) from error
    with interruptible() as interrupted, Checkpoints(workdir) as checkpoints:
        start = checkpoints.latest_step() or 0
        progress, results = Progress(), {}
        if start:
            stored = checkpoints.read_meta(start)
            for change in check_same_run(stored, run.meta, workdir):
                say(f"changed since the checkpoint: {change}")
            progress, results = Progress(**stored.progress), stored.results
            state = checkpoints.restore(start, shapes)
            say(f"going on from step {start} of {workdir}")
        else:
            state = run.begin()
        text = json.dumps(run.meta.to_json()["config"], indent=2) + "\n"
        replace_file(workdir / "config.json", text.encode())
        log = RunLog(workdir, resume_step=start)
        try:
            results = loop(
                run, workdir, checkpoints, log, state, progress, results, interrupted
            )
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
    interrupted: list[str],
) -> dict[str, float]:
    """Steps, logs, evaluates, decides and saves, in this order, until the end."""
    train, total = run.config["train"], run.config["train"]["steps"]
    step, patience = int(state.step), train["patience"]
    stop = bool(patience) and progress.since_best >= patience
    if step >= total or stop:
        say(f"the run is finished at step {step}: {short(results)}")
        return results
    batches = sharding.prefetch(run.train_batches(step), run.mesh)
    batch = next(batches)
    step_fn = compile_step(run, state, batch)
    meter, clock, begin = Meter(workdir), time.perf_counter(), step
    bar = tqdm(total=total, initial=step, unit="step", disable=not sys.stderr.isatty())
    with bar:
        stop = bool(interrupted)
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
                if bar.disable:
                    left = (
                        (time.perf_counter() - clock) / (step - begin) * (total - step)
                    )
                    say(f"step {step}/{total}: {line}, {left:.0f} s left")
            score = NOT_SCORED
            if is_due(step, train["eval_every"], total):
                with meter.paused():
                    results, progress = assess(run, workdir, log, state, step, progress)
                scale = jax.device_put(
                    np.float32(progress.lr_scale), state.lr_scale.sharding
                )
                state = dataclasses.replace(state, lr_scale=scale)
                stop = bool(patience) and progress.since_best >= patience
                if progress.best_step == step and progress.best is not None:
                    score = progress.best
            stop = stop or bool(interrupted)
            if stop or score > NOT_SCORED or is_due(step, train["save_every"], total):
                meter.drain()
                meta = dataclasses.replace(
                    run.meta, progress=dataclasses.asdict(progress), results=results
                )
                checkpoints.save(state, meta, score=score)
        checkpoints.wait()
    if interrupted:
        at = checkpoints.latest_step()
        where = f"saved step {at}" if at else "stopped before the first step"
        say(f"{interrupted[0]}: {where}; the same command goes on from there")
        raise SystemExit(0)
    if step < total:
        say(f"stopped early: {patience} evaluations without a better one")
    sign = -1.0 if train["monitor"] == "loss" else 1.0
    say(
        f"finished at step {step}; best {train['monitor']}"
        f" {sign * (progress.best or 0.0):.4f} at step {progress.best_step};"
        f" checkpoints, logs and pictures are in {workdir}"
    )
    return results


def short(results: dict[str, float]) -> str:
    """The figures of an evaluation that belong on one line."""
    keys = [k for k in results if k in ("loss", "dice") or k.startswith("dice/")]
    return ", ".join(f"{k} {results[k]:.4f}" for k in keys)


def assess(
    run: Run,
    workdir: Path,
    log: RunLog,
    state: TrainState,
    step: int,
    progress: Progress,
) -> tuple[dict[str, float], Progress]:
    """Evaluates, logs it, draws a picture, and decides what follows from it."""
    begin = time.perf_counter()
    found = run.evaluate(state, keep=4)
    log.scalars("evaluation", step, found.results)
    path = workdir / "pictures" / f"step_{step:06d}.png"
    report.picture(found.kept, path, label_names=run.meta.label_names)
    log.image(step, path)
    seconds = time.perf_counter() - begin
    say(f"evaluation at step {step}: {short(found.results)} ({seconds:.1f} s)")
    plateau = run.config["plateau"]
    on = run.config["optim"]["schedule"] == "plateau"
    new = progress.after(
        step,
        score_of(found.results, run.config["train"]["monitor"]),
        watched=-score_of(found.results, plateau["monitor"]) if on else None,
        factor=plateau["factor"],
        patience=plateau["patience"],
    )
    if new.lr_scale != progress.lr_scale:
        say(f"plateau: the learning rate is now scaled by {new.lr_scale:g}")
    return found.results, new


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
    # The last one wins; two tuples for one key would otherwise be joined into one.
    last = {arg.split("=", 1)[0]: i for i, arg in enumerate(argv)}
    argv = [
        arg
        for i, arg in enumerate(argv)
        if not re.match(r"--config\.[^=]+=", arg) or last[arg.split("=", 1)[0]] == i
    ]
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
        train_and_evaluate(config, workdir)
    except InputError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
