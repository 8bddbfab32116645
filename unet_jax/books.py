"""The books of a run: what is measured after a step, written down and decided.

`Books` is told of every step. Where something is due it logs, evaluates, draws, decides
(`unet_jax.evaluation.Progress`) and saves, in this order, so that what is decided is in
the checkpoint of the same step, and a run that goes on neither repeats nor skips it.
Whoever has the loop, of one run or of several side by side, has one `Books` for each.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unet_jax import distributed, report
from unet_jax.checkpoint import Checkpoints, check_same_run
from unet_jax.data import plan, skipped
from unet_jax.evaluation import Progress, collapsed, score_of
from unet_jax.log import Meter, RunLog, replace_file
from unet_jax.programs import Early
from unet_jax.run import Run
from unet_jax.training import TrainState, is_due
from unet_jax.types import InputError, size_text

NOT_SCORED = -1e30  # of a checkpoint that is not the best so far
# Of the time spent waiting for images, from which the input is said to hold up the run.
HELD_UP = 0.1

Say = Callable[[str], None]
"""prints a line for a person"""


def short(results: dict[str, float]) -> str:
    """The figures of an evaluation that belong on one line."""
    keys = [k for k in results if k in ("loss", "dice") or k.startswith("dice/")]
    return ", ".join(f"{k} {results[k]:.4f}" for k in keys)


def announced(eval_step: Callable[[Any, Any], Any], say: Say) -> Any:
    """The evaluation step, saying so when a new image size has it compiled."""
    seen: set[tuple[int, ...]] = set()

    def step(variables: Any, batch: Any) -> Any:
        shape = batch["image"].shape
        if shape not in seen:
            seen.add(shape)
            there = isinstance(eval_step, Early) and eval_step.ready(variables, batch)
            if not there:
                say(f"compiling the evaluation of {size_text(shape[1:-1])} ...")
        return eval_step(variables, batch)

    return step


class Batches:
    """Batches of a run that say how long they were waited for, and why they end.

    Args:
        batches: Endless, but for what cannot be read.

    Attributes:
        waited: Seconds that the last one took.
        failed: What is wrong with the data of the next one, of which the steps before
            should not suffer: they are saved first.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self.waited = 0.0
        self.failed: InputError | None = None

    def __next__(self) -> Any:
        begin = time.perf_counter()
        try:
            return next(self._batches)
        except InputError as error:
            # Of several processes the others cannot know: all end without saving.
            if not self.waited or jax.process_count() > 1:
                raise
            self.failed = error
        finally:
            self.waited = time.perf_counter() - begin


class Books:
    """What a run writes down and decides; `opened` makes one.

    Args:
        run: What is trained.
        workdir: Where it is kept.
        checkpoints: Of the workdir.
        log: Likewise.
        start: The step that the run goes on from.
        progress: What has been decided up to there.
        results: The figures of the last evaluation before it.
        say: Is told what a person should see.

    Attributes:
        meter: The sums of the steps since the last row of ``train.csv``.
        progress, results: As they are now.
    """

    def __init__(
        self,
        run: Run,
        workdir: Path,
        checkpoints: Checkpoints,
        log: RunLog,
        *,
        start: int,
        progress: Progress,
        results: dict[str, float],
        say: Say,
    ) -> None:
        self.run, self.workdir, self.start = run, workdir, start
        self.progress, self.results = progress, results
        self.checkpoints, self._log, self._say = checkpoints, log, say
        self._train = run.config["train"]
        self._waited = self._rows = 0.0
        self.begin()

    def begin(self) -> None:
        """Starts the clock of the images per second; all that is before is no step."""
        self.meter = Meter(self.workdir, self._images_of)

    def _images_of(self, step: int) -> str:
        """The names of the first images of a step's batch."""
        source, size = self.run.dataset.train, self._train["batch_size"]
        index, _ = plan(
            self.run.config["seed"],
            step - 1,
            examples=len(source),
            batch_size=size,
            rank=1,
        )
        names = ", ".join(source.name(i) for i in index[:3].tolist())
        return f"of {names}" + (f" and {size - 3} more" if size > 3 else "")

    def epoch(self, step: int) -> float:
        """How many times through the training data a number of steps is."""
        return step * self._train["batch_size"] / len(self.run.dataset.train)

    @property
    def impatient(self) -> bool:
        """Whether ``train.patience`` evaluations have gone by without a better one."""
        patience = self._train["patience"]
        return bool(patience) and self.progress.since_best >= patience

    def add(self, step: int, stats: Any, *, waited: float = 0.0) -> dict[str, float]:
        """Takes what the step has measured; logs a row where one is due.

        Args:
            step: Updates done.
            stats: Of the training step, ``loss``, ``count`` and ``grad_norm``.
            waited: Seconds that were spent waiting for the batch.

        Returns:
            The row, `unet_jax.log.Meter.take`'s means and ``epoch``; empty where none
            is due.

        Raises:
            InputError: The loss is not finite, or the last save has failed.
        """
        self.checkpoints.check()
        self.meter.add(step, stats, waited=waited)
        if not is_due(step, self._train["log_every"], self._train["steps"]):
            return {}
        means = {**self.meter.take(), "epoch": self.epoch(step)}
        self._waited += means["input_wait"]
        self._rows += 1
        rate = float(self.run.schedule(step - 1)) * self.progress.lr_scale
        self._log.scalars("train", step, {**means, "learning_rate": rate})
        return means

    def _bottleneck(self) -> str:
        """A sentence on what the run waited for, if it did anything."""
        if not self._rows:
            return ""
        wait = self._waited / self._rows
        if wait < HELD_UP:
            return f"bottleneck: compute; {wait:.0%} of the time was waiting for images"
        return (
            f"bottleneck: input; {wait:.0%} of the time was waiting for images:"
            " more train.threads, or a larger data.cache_mb, or a data.cache_dir, which"
            " decodes each image once, may help"
        )

    def evaluated(
        self, step: int, state: TrainState, *, save: bool = True
    ) -> TrainState:
        """The state after a step, with what follows from an evaluation if one is due.

        Args:
            step: Updates done.
            state: After them.
            save: Whether to save the state where the evaluation fails. Of several side
                by side all have to be saved then, by whoever has the loop.

        Returns:
            The state, with the learning rate's scale as it is now decided.

        Raises:
            InputError: An example cannot be read; the evaluation is owed.
        """
        if not (self.evaluates(step) or self.progress.owed):
            return state
        try:
            with self.meter.paused():
                self.assess(state, step)
        except InputError:
            # A damaged image of the evaluation must not cost the steps before it.
            if jax.process_count() == 1 and not self.progress.owed:
                self.progress = dataclasses.replace(self.progress, owed=True)
                if save:
                    self.save(step, state)
                    self._say(f"saved step {step}, of which the evaluation failed")
            raise
        scale = jax.device_put(
            np.float32(self.progress.lr_scale), state.lr_scale.sharding
        )
        return dataclasses.replace(state, lr_scale=scale)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after a step."""
        return is_due(step, self._train["eval_every"], self._train["steps"])

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after a step: every so many, and the best yet."""
        due = is_due(step, self._train["save_every"], self._train["steps"])
        return due or self._score(step) > NOT_SCORED

    def _score(self, step: int) -> float:
        best = self.progress.best
        return (
            best if self.progress.best_step == step and best is not None else NOT_SCORED
        )

    def save(self, step: int, state: TrainState, *, again: bool = False) -> None:
        """Saves the state with all that has been decided; the step's last entry.

        Args:
            step: Updates done.
            state: After them.
            again: Replace what has been saved of this step.
        """
        self.meter.drain()
        meta = dataclasses.replace(
            self.run.meta,
            progress=dataclasses.asdict(self.progress),
            results=self.results,
        )
        self.checkpoints.save(state, meta, score=self._score(step), again=again)

    def assess(self, state: TrainState, step: int) -> None:
        """Evaluates, logs it, draws a picture, and decides what follows from it."""
        begin = time.perf_counter()
        found, names = self.run.evaluate(state, keep=4), self.run.meta.label_names
        self._log.scalars("evaluation", step, found.results)
        if distributed.is_main():
            path = self.workdir / "pictures" / f"step_{step:06d}.png"
            report.picture(found.kept, path, label_names=names)
            self._log.image(step, path)
        seconds = time.perf_counter() - begin
        self._say(
            f"evaluation at step {step}: {short(found.results)} ({seconds:.1f} s)"
        )
        one = collapsed(found.confusion, task=self.run.meta.task, label_names=names)
        plateau = self.run.config["plateau"]
        on = self.run.config["optim"]["schedule"] == "plateau"
        new = self.progress.after(
            step,
            score_of(found.results, self._train["monitor"]),
            collapsed=one is not None,
            watched=-score_of(found.results, plateau["monitor"]) if on else None,
            factor=plateau["factor"],
            patience=plateau["patience"],
        )
        if new.lr_scale != self.progress.lr_scale:
            self._say(f"plateau: the learning rate is now scaled by {new.lr_scale:g}")
        self.results, self.progress = found.results, new
        alarm = self._train.get("alarm", 0)
        if one is not None and alarm and new.collapsed % alarm == 0:
            self._say(_alarm(new.collapsed, *one))

    def _left_out(self) -> str:
        """A sentence on the examples that could not be read; empty if all could."""
        dataset = self.run.dataset
        some = [*skipped(dataset.train), *skipped(dataset.evaluation)]
        if not some:
            return ""
        count = f"{len(some)} example{'s' * (len(some) > 1)}"
        return f"{count} could not be read and counted nowhere: {some[0]}"

    def closing(self, step: int) -> str:
        """The last lines about a run that is done."""
        monitor, best = self._train["monitor"], self.progress.best or 0.0
        lines = [
            self._left_out(),
            self._bottleneck(),
            f"finished at step {step}; best {monitor}"
            f" {-best if monitor == 'loss' else best:.4f} at step"
            f" {self.progress.best_step}; checkpoints, logs and pictures are in"
            f" {self.workdir}",
        ]
        return "\n".join(line for line in lines if line)


def _alarm(evaluations: int, name: str, others: float) -> str:
    return (
        f"ALARM: {evaluations} evaluations in a row found {name!r} predicted nearly"
        f" everywhere, while {others:.2%} of the truth is something else. Look at how"
        " the masks are read (unet-jax inspect), whether the net can learn one batch"
        " by heart (train.py --overfit_one_batch) and which learning rate suits it"
        " (train.py --find_lr); for what is rare try --config.train.foreground=0.33"
        " and --config.loss.dice=1"
    )


@contextmanager
def opened(
    run: Run, workdir: str | os.PathLike[str], *, say: Say, start: int | None = None
) -> Iterator[tuple[Books, TrainState]]:
    """The books of a workdir and the state that they stand at.

    Args:
        run: What is trained.
        workdir: Where it is kept; there is a folder.
        say: Is told what a person should see.
        start: The step of the checkpoint to go on from, 0 to begin anew; None for the
            latest there is.

    Raises:
        InputError: The workdir holds another run.
    """
    workdir = Path(workdir)
    with Checkpoints(workdir, say=say) as checkpoints:
        if start is None:
            start = checkpoints.latest_step() or 0
        progress, results = Progress(), {}
        if start:
            stored = checkpoints.read_meta(start)
            for change in check_same_run(stored, run.meta, workdir):
                say(f"changed since the checkpoint: {change}")
            progress, results = Progress(**stored.progress), stored.results
            best = progress.best_step
            if progress.best is not None and best not in checkpoints.steps():
                say(
                    f"the best checkpoint, of step {best}, is no longer there: the best"
                    " from here on is kept"
                )
                progress = dataclasses.replace(progress, best=None, best_step=0)
            state = checkpoints.restore(start, run.shapes)
        else:
            state = run.begin()
        text = json.dumps(run.meta.to_json()["config"], indent=2) + "\n"
        # Of a run that is finished it goes on saying what was trained.
        if distributed.is_main() and start < run.config["train"]["steps"]:
            replace_file(workdir / "config.json", text.encode())
        log = RunLog(
            workdir,
            resume_step=start,
            owed=progress.owed,
            silent=not distributed.is_main(),
        )
        books = Books(
            run,
            workdir,
            checkpoints,
            log,
            start=start,
            progress=progress,
            results=results,
            say=say,
        )
        try:
            yield books, state
        finally:
            log.close()
