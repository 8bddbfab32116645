"""Trains a net: flags, wiring and the loop.

    python train.py --config=configs/default.py --workdir=runs/cells

The same command again goes on where the run was stopped. ``--dry_run`` prints the model
and what its compiled step costs each device (memory, operations, communication) and
stops there; with ``--devices=8`` it does so for eight virtual devices of a CPU.
``--distributed`` starts one of several processes, and ``--config.members.folds=5``
trains the five nets of a cross-validation side by side (docs/scale.md).

Before a long run: ``--overfit_one_batch`` has the net learn one batch by heart, which
fails where data, loss or net do not fit each other, and ``--find_lr`` looks for the
learning rate. Neither needs a workdir; with one they leave a picture there.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from unet_jax import (
    advice,
    compiled,
    distributed,
    lock,
    members,
    normalisation,
    options,
    programs,
    report,
    sharding,
    trials,
)
from unet_jax.books import HELD_UP, Batches, Books, announced, opened, short
from unet_jax.checkpoint import stored_meta
from unet_jax.cli.arguments import load, one_line
from unet_jax.log import load_events
from unet_jax.run import Run, build
from unet_jax.training import TrainState
from unet_jax.types import InputError, size_text

ASK_EVERY = 10  # steps after which processes ask each other whether to stop, at most


def say(text: str) -> None:
    """Prints a line without breaking the progress bar; of several processes, one."""
    if not distributed.is_main():
        return
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


def describe(run: Run, *, trial: bool = False) -> None:
    """Prints what is trained on what; of a `trial` it says itself for how long."""
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
    first = advice.first(dataset.train)
    images = (example["image"] for example in first)
    if note := normalisation.advice(run.meta.normalisation, images):
        say(f"note: {note}")
    epochs = train["steps"] * train["batch_size"] / len(dataset.train)
    if not trial:
        say(
            f"training: {train['steps']} steps of {train['batch_size']} crops of"
            f" {size}, {epochs:.1f} times through the data"
        )
    for note in (advice.rare(run, first), advice.many(run, first)):
        if note:
            say(f"note: {note}")
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
    """The training step as a program, ahead of time; prints what it costs."""
    say("compiling the training step ...")
    program = programs.compiled(run.train_step, state, batch)
    say(program.text())
    say(compiled.text(compiled.costs(program.call), devices=run.mesh.size))
    distributed.wait("compiled")
    return program.call


def early(run: Run) -> tuple[Run, Callable[[Any], None]]:
    """The run, its training step being compiled from now on in a thread.

    Returns:
        The run, and what is to be told of the statistics of the first step, so that
        the evaluation is compiled, in a thread too, from when they are there.
    """
    pmap = run.config["mesh"].get("pmap", False)
    if pmap or jax.process_count() > 1:
        # Processes take their turns in one order, and threads have none.
        eval_step = announced(run.eval_step, say)
        return dataclasses.replace(run, eval_step=eval_step), lambda _: None
    training = programs.Early(run.train_step)
    evaluation = programs.Early(run.eval_step)
    training.begin(run.shapes, run.batch_shapes())

    def shapes() -> tuple[Any, Any]:
        load_events()
        return run.shapes.variables, run.evaluation_shapes()

    def meanwhile(stats: Any) -> None:
        evaluation.begin_after(stats, shapes)

    eval_step = announced(evaluation, say)
    run = dataclasses.replace(run, train_step=training, eval_step=eval_step)
    return run, meanwhile


def train_and_evaluate(
    config: dict[str, Any], workdir: str | os.PathLike[str] | None
) -> dict[str, float]:
    """A whole run, from where ``workdir`` stands; without a workdir a dry run.

    Args:
        config: Plain data, see `chosen`.
        workdir: Where the run is kept, or None to stop before the first step.

    Returns:
        The figures of the last evaluation; of members see `train_members`.
    """
    asked = {"config": config, "workdir": workdir and os.fspath(workdir)}
    distributed.check_same(json.dumps(asked, sort_keys=True), "command")
    if members.asked(config):
        return train_members(config, workdir)
    if workdir is not None:
        _check_workdir(workdir)
        members.check_workdir(workdir, None)
    mesh = sharding.make_mesh(config["mesh"]["data"], config["mesh"]["space"])
    kind = mesh.devices.flat[0].device_kind
    lie = " x ".join(f"{name} {n}" for name, n in mesh.shape.items())
    lie = f", {lie}" if mesh.size > 1 else ""
    some = jax.process_count()
    those = f" of {some} processes" if some > 1 else ""
    say(f"{jax.default_backend()}: {kind}, {mesh.size} device(s){those} used{lie}")
    if workdir is not None and jax.process_count() > 1:
        distributed.check_shared(_made(workdir))
    stored = None if workdir is None else stored_meta(workdir)
    run = build(config, mesh, stored, say=say)
    _say_found(config, run.config)
    run, meanwhile = early(run)
    describe(run)
    if workdir is None:
        compile_step(run, run.shapes, run.batch_shapes())
        return {}
    workdir = _made(workdir)
    with (
        lock.hold(workdir, say=say),
        interruptible() as interrupted,
        opened(run, workdir, say=say) as (books, state),
    ):
        if books.start:
            say(f"going on from step {books.start} of {workdir}")
        loop(books, state, interrupted, meanwhile)
    if distributed.is_main():
        say(f"curves: {report.curves(workdir)}")
    return books.results


def trial(
    name: str, config: dict[str, Any], workdir: str | os.PathLike[str] | None
) -> int:
    """What is tried before a run, see `unet_jax.trials`; the exit status."""
    if members.asked(config):
        raise InputError(
            f"--{name} is for one net: leave out members.folds and members.seeds."
        )
    where = None if workdir is None else _made(workdir)
    run = build(trials.prepared(name, config), sharding.make_mesh(1, 1), say=say)
    describe(run, trial=True)
    return trials.TRIALS[name](run, where, say=say)


def train_members(
    config: dict[str, Any], workdir: str | os.PathLike[str] | None
) -> dict[str, float]:
    """The members of a cross-validation or an ensemble, side by side.

    Args:
        config, workdir: As for `train_and_evaluate`.

    Returns:
        Of folds the figures out of fold, of seeds the means of the members' best.
    """
    if workdir is not None:
        _check_workdir(workdir)
    team = members.build(config, workdir, say=say)
    say(f"what follows is of {team.names[0]}, the others are like it:")
    describe(team.runs[0])
    if workdir is None:
        members.compile_step(team, say=say)
        return {}
    workdir = _made(workdir)
    with contextlib.ExitStack() as held:
        # Each member too: train.py goes on with it as with any other run.
        for folder in (workdir, *(workdir / name for name in team.names)):
            held.enter_context(lock.hold(_made(folder), say=say))
        with interruptible() as interrupted:
            members.train(team, workdir, say=say, interrupted=interrupted)
        for name in team.names:
            report.curves(workdir / name)
        return members.conclude(team, workdir, say=say)


def _made(workdir: str | os.PathLike[str]) -> Path:
    """The folder of a run, there from now on."""
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the workdir {workdir} cannot be made ({error.strerror}): use another."
        ) from error
    return workdir


def _check_workdir(workdir: str | os.PathLike[str]) -> None:
    """Refuses, before any data is read, a workdir that cannot be one."""
    folders = {"checkpoints": True, "train.csv": False, "evaluation.csv": False}
    for name, folder in folders.items():
        path = Path(workdir) / name
        try:
            found = stat.S_ISDIR(path.stat().st_mode)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InputError(
                f"the workdir {workdir} cannot be used ({error.strerror}): use another."
            ) from error
        if found != folder:
            what = "a file" if folder else "a folder"
            raise InputError(
                f"{path} is {what}, and a run would keep something else there: use"
                " another --workdir."
            )


def _say_found(asked: dict[str, Any], run: dict[str, Any]) -> None:
    """Says which numbers were found rather than given."""
    if not asked["train"]["batch_size"]:
        say(f"train.batch_size = {run['train']['batch_size']}")
    if asked["model"].get("remat", 0) < 0:
        say(f"model.remat = {run['model']['remat']}")


def loop(
    books: Books,
    state: TrainState,
    interrupted: list[str],
    meanwhile: Callable[[Any], None],
) -> None:
    """Steps, logs, evaluates, decides and saves, in this order, until the end.

    Args:
        books: Of the run.
        state: Where it stands.
        interrupted: Gets the name of a signal that is to stop it.
        meanwhile: Is told of the first step's statistics.
    """
    run, workdir = books.run, books.workdir
    train, total = run.config["train"], run.config["train"]["steps"]
    step = begin = int(state.step)
    if books.progress.owed:  # a file of it could not be read, perhaps it now can
        state = books.evaluated(step, state)
        books.save(step, state, again=True)
    if step >= total or books.impatient:
        say(f"the run is finished at step {step}: {short(books.results)}")
        return
    if (total - step) % run.steps_per_call:
        raise InputError(
            f"train.steps_per_call = {run.steps_per_call} does not divide the"
            f" {total - step} steps from step {step}, where {workdir} stands, to"
            f" train.steps = {total}: use train.steps_per_call=1."
        )
    batches = Batches(run.placed_batches(step))
    with programs.waited("reading the first batch", say):
        batch = next(batches)
    step_fn = compile_step(run, state, batch)
    books.begin()
    ask = max(min(train["log_every"] or ASK_EVERY, ASK_EVERY), 1)
    clock = time.perf_counter()
    shown = sys.stderr.isatty() and distributed.is_main()
    bar = tqdm(total=total, initial=step, unit="step", disable=not shown)
    with bar:
        stop = distributed.agreed(bool(interrupted))
        while step < total and not stop:
            state, stats = step_fn(state, batch)
            if step == begin:
                meanwhile(stats)
            batch = next(batches)
            step += run.steps_per_call
            bar.update(run.steps_per_call)
            if means := books.add(step, stats, waited=batches.waited):
                line = f"epoch {means['epoch']:.1f}, loss {means['loss']:.4f}"
                line += f", {means['images_per_second']:.1f} images/s"
                if means["input_wait"] > HELD_UP:
                    line += f", {means['input_wait']:.0%} waiting for images"
                bar.set_postfix_str(line)
                if bar.disable:
                    left = (
                        (time.perf_counter() - clock) / (step - begin) * (total - step)
                    )
                    say(f"step {step}/{total}: {line}, {left:.0f} s left")
            # Processes stop together, so they ask each other, but not at every step.
            turn = step // ask != (step - run.steps_per_call) // ask
            if turn or jax.process_count() == 1:
                stop = distributed.agreed(bool(interrupted))
            state = books.evaluated(step, state)
            stop |= books.impatient or batches.failed is not None
            if stop or books.saves(step):
                books.save(step, state)
        books.checkpoints.wait()
    if batches.failed is not None and step < total:
        say(f"saved step {step}; the same command goes on from there")
        raise batches.failed
    if distributed.agreed(bool(interrupted)):
        at = books.checkpoints.latest_step()
        where = f"saved step {at}" if at else "stopped before the first step"
        by = interrupted[0] if interrupted else "another process was stopped"
        say(f"{by}: {where}; the same command goes on from there")
        raise SystemExit(0)
    if step < total:
        say(f"stopped early: {train['patience']} evaluations without a better one")
    say(books.closing(step))


class Command(NamedTuple):
    """What a command line asks for.

    Attributes:
        config: Plain data, see `chosen`.
        workdir: Where the run is kept; None for a dry run.
        devices: Virtual devices of the CPU to use instead of the real ones; 0 for none.
        processes: For `unet_jax.distributed.start`.
        trial: ``find_lr`` or ``overfit_one_batch`` instead of a run, or "".
    """

    config: dict[str, Any]
    workdir: str | None
    devices: int
    processes: dict[str, Any]
    trial: str


def parse(argv: list[str]) -> Command:
    """Reads a command line.

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
    find_lr = flags.DEFINE_bool(
        "find_lr", False, "Look for the learning rate.", flag_values=values
    )
    overfit = flags.DEFINE_bool(
        "overfit_one_batch",
        False,
        "See whether the net can learn one batch by heart.",
        flag_values=values,
    )
    devices = flags.DEFINE_integer(
        "devices",
        0,
        "Use so many virtual devices of the CPU instead of the real ones.",
        lower_bound=0,
        flag_values=values,
    )
    several = flags.DEFINE_bool(
        "distributed",
        None,
        "One of several processes; without the flag, where SLURM or MPI say so.",
        flag_values=values,
    )
    coordinator = flags.DEFINE_string(
        "coordinator", "", "HOST:PORT of process 0.", flag_values=values
    )
    processes = flags.DEFINE_integer(
        "processes", 0, "How many there are.", lower_bound=0, flag_values=values
    )
    process = flags.DEFINE_integer(
        "process", -1, "Which of them this is, from 0.", flag_values=values
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
    for arg in argv:
        if re.match(r"--?config\.(=|\.|$)", arg):
            raise InputError(f"{arg} names no key: write --config.KEY=VALUE.")
    for name in files:
        if not Path(name).is_file():
            near = f"{name}.py" if Path(f"{name}.py").is_file() else ""
            place = Path(__file__).resolve().parent / "configs"
            raise InputError(
                f"there is no config file {name}: {near and f'use {near}, or '}look"
                f" into {place}."
            )
        load(name)  # for a sentence where it does not work
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
    asked = {
        "dry_run": dry_run.value,
        "find_lr": find_lr.value,
        "overfit_one_batch": overfit.value,
    }
    asked = [name for name, value in asked.items() if value]
    if len(asked) > 1:
        raise InputError(f"--{asked[0]} and --{asked[1]} exclude each other: give one.")
    if not workdir.value and not asked:
        raise InputError("say where the run should be kept: --workdir=DIR.")
    plain = chosen(config.value)
    options.check(plain)
    return Command(
        config=plain,
        workdir=None if dry_run.value else workdir.value,
        devices=devices.value,
        trial="" if dry_run.value else "".join(asked),
        processes={
            "wanted": several.value,
            "coordinator": coordinator.value,
            "processes": processes.value,
            "process": process.value,
        },
    )


def main() -> int:
    """Runs a command line; a user's mistake ends in one sentence and status 2."""
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        command = parse(sys.argv)
        if command.devices:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", command.devices)

        def job() -> int:
            distributed.start(**command.processes)
            if jax.process_count() == 1 or jax.default_backend() == "cpu":
                # Processes with GPUs tune together, and one that found its program in
                # a folder that the others do not see would have them wait for ever.
                programs.keep()
            if command.trial:
                return trial(command.trial, command.config, command.workdir)
            train_and_evaluate(command.config, command.workdir)
            return 0

        return distributed.guarded(job)
    except InputError as error:
        print(f"train.py: error: {one_line(error)}", file=sys.stderr)
        return 2
    except MemoryError as error:
        why = one_line(error) or "no more to be had"
        print(
            f"train.py: error: this needs more memory than there is ({why}): make"
            " images, crops or batches smaller.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("train.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    programs.leave(main())
