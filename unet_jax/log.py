"""The log of a run: two CSV files and TensorBoard events, the same numbers in both.

``workdir/train.csv`` and ``workdir/evaluation.csv`` get a row a call, ``step`` first;
``workdir/tensorboard`` has the events. Every row has left this process when the call
returns, so that a killed run loses none, and a resumed run first cuts what the killed
one had logged after the checkpoint it goes on from.
"""

import collections
import csv
import errno
import importlib
import io
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from unet_jax.types import InputError, NumpyArray

Kind = Literal["train", "evaluation"]
EVENTS = "tensorboard"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """A full disk as a sentence; any other error as it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{path} cannot be written because the disk is full: free some space and"
            " run the same command again, it goes on from the last checkpoint."
        ) from error


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file whole or not at all; makes its folder.

    Args:
        path: The file; one that exists is replaced.
        content: All of it.

    Raises:
        InputError: The disk is full.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(content)
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def _read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """The columns and the rows of a CSV file; a row cut short by a kill is dropped."""
    if not path.exists():
        return [], []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    columns, *rows = list(csv.reader(io.StringIO(whole))) or [[]]
    if columns[:1] != ["step"]:
        return [], []
    return columns, [r for r in rows if len(r) == len(columns) and r[0].isdigit()]


def _line(cells: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def read_table(path: str | os.PathLike[str]) -> dict[str, NumpyArray]:
    """A CSV file of a run as columns.

    Args:
        path: ``train.csv`` or ``evaluation.csv`` of a workdir.

    Returns:
        ``f64[rows]`` for each column in the order of the file, NaN where a cell is
        empty or no number; no columns when there is no such file.
    """
    columns, rows = _read_rows(Path(path))

    def number(cell: str) -> float:
        try:
            return float(cell)
        except ValueError:
            return math.nan

    return {
        name: np.array([number(row[i]) for row in rows], np.float64)
        for i, name in enumerate(columns)
    }


class _Table:
    """One CSV file that rows are appended to."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self.path = path
        self.columns, rows = _read_rows(path)
        kept = [row for row in rows if int(row[0]) <= resume_step]
        if kept:
            self._replace(kept)
        else:  # the next row names the columns anew
            path.unlink(missing_ok=True)
            self.columns = []

    def _replace(self, rows: list[list[str]]) -> None:
        lines = [_line(row) for row in (self.columns, *rows)]
        replace_file(self.path, "".join(lines).encode())

    def append(self, step: int, values: Mapping[str, float]) -> None:
        new = [name for name in values if name not in self.columns]
        if new:
            _, rows = _read_rows(self.path)
            self.columns = (self.columns or ["step"]) + new
            self._replace([row + [""] * (len(self.columns) - len(row)) for row in rows])
        cells = [f"{values[k]:.9g}" if k in values else "" for k in self.columns[1:]]
        # Opened and closed each time: nothing waits in a buffer of this process.
        with _explained(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line([str(step), *cells]))


class _Events:
    """A TensorBoard event file, written in the calling thread.

    tensorboardX's own ``SummaryWriter`` writes in a background thread, and the process
    hangs for ever when that thread has died of a full disk.
    """

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        # Generated modules, whose names no type checker sees.
        events: Any = event_pb2
        summaries: Any = summary_pb2
        self.path, self._event = folder, events.Event
        self._summary = summaries.Summary
        resumed = any(folder.glob("events.*"))
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # A file's name holds its second; the rest keeps two starts in it apart.
            suffix = f".{os.getpid()}.{time.monotonic_ns()}"
            self._writer = EventsWriter(str(folder / "events"), suffix)
        if resumed:  # TensorBoard hides what older files say from this step on
            start = events.SessionLog(status=events.SessionLog.START)
            self._write(step=resume_step + 1, session_log=start)

    def _write(self, **fields: Any) -> None:
        with _explained(self.path):
            self._writer.write_event(self._event(wall_time=time.time(), **fields))
            self._writer.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        value = self._summary.Value
        # A NaN, the Dice of a class that is nowhere, is a gap in a curve.
        pairs = [(k, v) for k, v in values.items() if math.isfinite(v)]
        parts = [value(tag=k, simple_value=v) for k, v in pairs]
        self._write(step=step, summary=self._summary(value=parts))

    def image(self, step: int, tag: str, path: Path) -> None:
        from PIL import Image

        with Image.open(path) as image:
            width, height = image.size
        picture = self._summary.Image(
            height=height,
            width=width,
            colorspace=3,
            encoded_image_string=path.read_bytes(),
        )
        part = self._summary.Value(tag=tag, image=picture)
        self._write(step=step, summary=self._summary(value=[part]))

    def close(self) -> None:
        with _explained(self.path):
            self._writer.close()


def load_events() -> None:
    """Imports what the first TensorBoard event needs, which takes a second and more."""
    importlib.import_module("tensorboardX.event_file_writer")


class RunLog:
    """Appends what a run measures to its CSV files and TensorBoard events.

    Args:
        workdir: The run's folder; made when it is not there.
        resume_step: The step that the run goes on from, 0 for a new one. Rows of later
            steps, left by a run that was killed, are cut from the CSV files and hidden
            in TensorBoard.
        owed: The evaluation of that step will be made again: its row is cut, too.
        silent: Write nothing at all: another process writes this log.

    Raises:
        InputError: The disk is full. So do all methods.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        resume_step: int,
        owed: bool = False,
        silent: bool = False,
    ) -> None:
        self._silent = silent
        if silent:
            return
        folder = Path(workdir)
        self._tables = {
            kind: _Table(
                folder / f"{kind}.csv",
                resume_step=resume_step - (owed and kind == "evaluation"),
            )
            for kind in get_args(Kind)
        }
        # When there is something to write: see `load_events`.
        self._open = partial(_Events, folder / EVENTS, resume_step=resume_step)
        self._opened: _Events | None = None

    @property
    def _events(self) -> _Events:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def scalars(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        """Adds a row to ``<kind>.csv`` and the same numbers to TensorBoard.

        Args:
            kind: ``train`` or ``evaluation``.
            step: Updates done.
            values: Name to number. The first row names the columns; a name that comes
                later adds one, and a name that is missing leaves its cell empty.
        """
        if self._silent:
            return
        numbers = {name: float(value) for name, value in values.items()}
        self._tables[kind].append(step, numbers)
        self._events.scalars(step, {f"{kind}/{k}": v for k, v in numbers.items()})

    def image(self, step: int, path: str | os.PathLike[str]) -> None:
        """Shows a PNG file in TensorBoard, as ``evaluation/picture``.

        Args:
            step: Updates done.
            path: The file.
        """
        if not self._silent:
            self._events.image(step, "evaluation/picture", Path(path))

    def close(self) -> None:
        """Closes the event file; nothing is written afterwards."""
        if not self._silent and self._opened is not None:
            self._opened.close()


class Meter:
    """Adds the steps' sums, a few steps late so that no step waits for its numbers.

    Its methods raise InputError at the first loss or gradient that is not finite.

    Args:
        workdir: Named in that sentence.
        images_of: From a step to the names of its images, for that sentence too.
    """

    def __init__(
        self, workdir: Path, images_of: Callable[[int], str] | None = None
    ) -> None:
        self._workdir, self._images_of = workdir, images_of
        self._waited = 0.0
        self._pending: collections.deque[tuple[int, Any]] = collections.deque()
        self._loss = self._count = self._grad_norm = 0.0
        self._begin = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock for something that is not training."""
        self.drain()
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def add(self, step: int, stats: Any, *, waited: float = 0.0) -> None:
        """Takes the sums of the steps up to ``step``; reads those of a while ago.

        Args:
            step: Updates done.
            stats: Of the training step.
            waited: Seconds that went into waiting for the batch.
        """
        self._waited += waited
        self._pending.append((step, stats))
        while len(self._pending) > 4:
            self._read(*self._pending.popleft())

    def drain(self) -> None:
        """Reads all there are, so that what is saved next is known to be finite."""
        while self._pending:
            self._read(*self._pending.popleft())

    def _read(self, step: int, stats: Any) -> None:
        # One number each, or one for each step of a call.
        losses, counts, norms = (
            np.atleast_1d(np.asarray(stats[k])).astype(np.float64)
            for k in ("loss", "count", "grad_norm")
        )
        bad = ~(np.isfinite(losses) & np.isfinite(norms))
        if bad.any():
            first = int(bad.argmax())
            number = step + first + 1 - len(bad)
            images = self._images_of(number) if self._images_of else ""
            raise InputError(
                f"the loss is {losses[first]} and the gradient's norm {norms[first]} at"
                f" step {number}{images and f' ({images})'}: the run stops, and"
                f" {self._workdir} keeps the last good checkpoint; try a smaller"
                " optim.learning_rate (--find_lr finds one) or optim.clip=1 in a new"
                " --workdir, or look for images with extreme values."
            )
        self._loss += float(losses.sum())
        self._count += float(counts.sum())
        self._grad_norm = float(norms[-1])

    def take(self) -> dict[str, float]:
        """Loss (mean over examples), gradient norm (the last step's) and speed.

        ``input_wait`` is the part of the time that went into waiting for batches. All
        since the last call.
        """
        self.drain()
        seconds = time.perf_counter() - self._begin
        out = {
            "loss": self._loss / max(self._count, 1.0),
            "grad_norm": self._grad_norm,
            "images_per_second": self._count / seconds,
            "input_wait": min(self._waited / seconds, 1.0),
        }
        self._loss = self._count = self._waited = 0.0
        self._begin = time.perf_counter()
        return out
