"""The loop of all members: steps, logs, evaluates, decides and saves for each."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from unet_jax import compiled
from unet_jax.books import Batches, Books, opened
from unet_jax.checkpoint import check_same_run
from unet_jax.members.roster import (
    Say,
    common,
    drop_later,
    stored_at,
    stored_members,
)
from unet_jax.members.team import Team, write
from unet_jax.members.ways import InTurn
from unet_jax.training import TrainState
from unet_jax.types import InputError


def compile_step(
    team: Team, states: Any = None, batches: Any = None, *, say: Say
) -> None:
    """Compiles the step ahead of time and prints what it costs.

    Args:
        team: Whose.
        states, batches: What it will take; None to go by shapes and the first batch.
        say: Is told.
    """
    begin = time.perf_counter()
    say("compiling the training step ...")
    if states is None:
        states, batches = team.way.shapes(team.runs[0].shapes), next(team.batches(0))
    program = team.way.compile(states, batches)
    say(f"compiled in {time.perf_counter() - begin:.1f} s")
    say(compiled.text(compiled.costs(program), devices=team.mesh.size))
    if isinstance(team.way, InTurn):
        say(f"that is of one member; {len(team.names)} take turns")


def train(team: Team, workdir: Path, *, say: Say, interrupted: list[str]) -> None:
    """Trains all members, each into its own workdir, from where they stand.

    A member is evaluated when it would be alone. It is saved when it would be alone,
    and whenever another is, so that there is a step that all can go on from.

    Args:
        team: The members.
        workdir: Of all; there is a folder.
        say: Is told what a person should see.
        interrupted: Gets the name of a signal that is to stop the run.

    Raises:
        SystemExit: Of status 0, after a signal; all members are saved.
        InputError: The loss of one is not finite, a disk is full, or an example cannot
            be read; of the last, all members are saved.
    """
    if common(workdir, team.names) != team.start:
        raise InputError(
            f"{workdir} has been trained on meanwhile: run the same command again."
        )
    if team.start >= team.runs[0].config["train"]["steps"] and _done(team, workdir):
        if stored_members(workdir) is None:
            write(team, workdir, {})
        say(f"the members are finished at step {team.start}")
        return
    write(team, workdir, {})
    drop_later(workdir, team.names, team.start, say)
    heard: set[str] = set()

    def told(name: str, text: str) -> None:
        # An evaluation is one member's; what changed in the config is the same for all.
        if not text.startswith("changed"):
            say(f"{name}: {text}")
        elif text not in heard:
            heard.add(text)
            say(text)

    with contextlib.ExitStack() as stack:
        books: list[Books] = []

        def states() -> Iterator[TrainState]:
            for name, one in zip(team.names, team.runs, strict=True):
                folder = workdir / name
                folder.mkdir(exist_ok=True)
                book, state = stack.enter_context(
                    opened(one, folder, say=partial(told, name), start=team.start)
                )
                books.append(book)
                yield state

        gathered = team.way.gather(states())
        if team.start:
            say(f"going on from step {team.start} of {workdir}")
        _loop(team, books, gathered, say=say, interrupted=interrupted)


def _done(team: Team, workdir: Path) -> bool:
    """Whether no member owes an evaluation of the step that they stand at."""
    done = True
    for name, one in zip(team.names, team.runs, strict=True):
        stored = stored_at(workdir / name, team.start)
        check_same_run(stored, one.meta, workdir / name)
        done &= not stored.progress.get("owed", False)
    return done


def _loop(
    team: Team,
    books: Sequence[Books],
    states: Any,
    *,
    say: Say,
    interrupted: list[str],
) -> None:
    """Steps, logs, evaluates, decides and saves, in this order, until the end."""
    from tqdm import tqdm

    way, names = team.way, team.names
    step, total = team.start, team.runs[0].config["train"]["steps"]
    # A file of the evaluation could not be read, perhaps it now can.
    states = _made_up(team, books, states, step)
    if step >= total:
        say(f"the members are finished at step {step}")
        return
    batches = Batches(team.batches(step))
    batch = next(batches)
    compile_step(team, states, batch, say=say)
    for book in books:
        book.begin()
    clock = time.perf_counter()
    bar = tqdm(total=total, initial=step, unit="step", disable=not sys.stderr.isatty())
    with bar:
        stop = bool(interrupted)
        while step < total and not stop:
            states, stats = way.step(states, batch)
            batch = next(batches)
            step += 1
            bar.update()
            means = [
                book.add(step, own, waited=batches.waited)
                for book, own in zip(books, stats, strict=True)
            ]
            if all(means):
                line = _progress(names, means)
                bar.set_postfix_str(line)
                if bar.disable:
                    rate = (time.perf_counter() - clock) / (step - team.start)
                    left = rate * (total - step)
                    say(f"step {step}/{total}: {line}, {left:.0f} s left")
            stop = bool(interrupted) or batches.failed is not None
            if books[0].evaluates(step):
                states = _evaluated(team, books, states, step, say=say)
            if stop or any(book.saves(step) for book in books):
                for i, book in enumerate(books):
                    book.save(step, way.take(states, i))
        for book in books:
            book.checkpoints.wait()
    if batches.failed is not None and step < total:
        say(f"saved step {step} of all members; the same command goes on from there")
        raise batches.failed
    if interrupted:
        at = books[0].checkpoints.latest_step()
        where = f"saved step {at} of all members" if at else "stopped before a step"
        say(f"{interrupted[0]}: {where}; the same command goes on from there")
        raise SystemExit(0)
    for name, book in zip(names, books, strict=True):
        for line in book.closing(step).splitlines():
            say(f"{name}: {line}")


def _progress(names: Sequence[str], means: Sequence[Mapping[str, float]]) -> str:
    pairs = zip(names, means, strict=True)
    shown = ", ".join(f"{name} {own['loss']:.4f}" for name, own in pairs)
    speed = sum(own["images_per_second"] for own in means)
    return f"loss {shown}; {speed:.1f} images/s"


def _evaluated(
    team: Team, books: Sequence[Books], states: Any, step: int, *, say: Say
) -> Any:
    """Evaluates every member; the states with what has been decided.

    Raises:
        InputError: An example cannot be read; all members are saved.
    """
    way, failed = team.way, None
    for i in range(len(books)):
        try:
            _evaluate(team, books, states, step, i)
        except InputError as error:
            failed = failed or error  # the others' examples may be sound
    states = way.rescaled(states, [book.progress.lr_scale for book in books])
    if failed is None:
        return states
    for i, book in enumerate(books):
        book.save(step, way.take(states, i))
    pairs = zip(team.names, books, strict=True)
    owing = ", ".join(name for name, book in pairs if book.progress.owed)
    say(f"saved step {step} of all members, of which the evaluation of {owing} failed")
    raise failed


def _made_up(team: Team, books: Sequence[Books], states: Any, step: int) -> Any:
    """Evaluates the members that owe it, and saves them again.

    Raises:
        InputError: An example can still not be read.
    """
    for i, book in enumerate(books):
        if book.progress.owed:
            book.save(step, _evaluate(team, books, states, step, i), again=True)
    return team.way.rescaled(states, [book.progress.lr_scale for book in books])


def _evaluate(
    team: Team, books: Sequence[Books], states: Any, step: int, i: int
) -> TrainState:
    """One member's state, evaluated while the clocks of the others stand still."""
    with contextlib.ExitStack() as others:
        for other in books:
            if other is not books[i]:
                others.enter_context(other.meter.paused())
        return books[i].evaluated(step, team.way.take(states, i), save=False)
