"""A bad input, how it is tried, and what comes of it.

A case makes its files in an empty folder and gives a command line. It is run in this
process, because a Python with JAX takes seconds to start. What should come of it is one
sentence for the user that names the file, the key or the value at fault.
"""

import contextlib
import functools
import io
import logging
import re
import shutil
import signal
import sys
import tempfile
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

SECONDS = 60  # after which a command hangs

Ending = Literal["clear", "unclear", "traceback", "accepted", "hang"]


class Case(NamedTuple):
    """A bad input.

    Attributes:
        kind: Which format or command it is for.
        name: What is wrong, of its kind unique.
        make: Makes the files in a folder and returns the command line, of which the
            first word is ``train.py`` or ``unet-jax``.
        says: A pattern that the sentence must have: the file, key or value at fault.
        harm: Whether something happened that must not, by the folder afterwards.
        works: The input is only odd: the command must do its work, and what it prints
            must have the pattern.
    """

    kind: str
    name: str
    make: Callable[[Path], list[str]]
    says: str
    harm: Callable[[Path], bool] = lambda folder: False
    works: bool = False


class Outcome(NamedTuple):
    """What came of a case.

    Attributes:
        ending: ``clear``: a sentence that says what it must, and status 2, or 1 of a
            check that failed. ``unclear``: a sentence that does not. ``traceback``:
            any other error. ``accepted``: the command did its work. ``hang``: it did
            not end. Of an input that is only odd, ``clear`` is that it worked.
        text: What was printed.
    """

    ending: Ending
    text: str


class Hang(BaseException):
    """Raised in a command that takes too long."""


def run_case(case: Case, folder: Path) -> Outcome:
    """Makes the files of a case and runs its command.

    Args:
        case: Of `benchmarks.reliability.bad_inputs.CASES`.
        folder: An empty folder.
    """
    name, *arguments = case.make(folder)
    out, error, status, trace = run(name, arguments, folder)
    text = f"{out}{error}{trace}\nstatus {status}"
    if case.harm(folder):
        return Outcome("accepted", f"what must not happen did\n{text}")
    if status is None:
        return Outcome("hang", text)
    if trace or "Traceback" in out + error:
        return Outcome("traceback", text)
    if case.works:
        good = status == 0 and not error and re.search(case.says, out) is not None
        return Outcome("clear" if good else "unclear", text)
    if status == 0:
        return Outcome("accepted", text)
    return Outcome("clear" if _is_clear(case, status, out, error) else "unclear", text)


def _is_clear(case: Case, status: int, out: str, error: str) -> bool:
    """Whether a command said what it must, and nothing else."""
    lines = error.splitlines()
    if status == 1 and not lines:  # a check that failed; its findings are the output
        return re.search(case.says, out) is not None
    usage = bool(lines) and lines[0].startswith("usage: ")
    if status != 2 or not lines or (len(lines) > 1 and not usage):
        return False
    begins = re.match(r"(unet-jax( [a-z]+)?|train\.py): error: .", lines[-1])
    return begins is not None and re.search(case.says, lines[-1]) is not None


def run(
    name: str, arguments: Sequence[str], folder: Path
) -> tuple[str, str, int | None, str]:
    """Runs a command in this process, in a folder.

    Returns:
        Its output; its errors, without what is logged, which goes to the output; its
        status, None where it had to be stopped; and the traceback of what it raised.
    """
    # As a terminal is: the names of files need not be text.
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    error = io.TextIOWrapper(
        io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True
    )
    status: int | None = 1
    trace = ""
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
        _logged_to(out),
        _warnings_as_in_a_program(),
    ):
        try:
            with _at_most(SECONDS):
                status = _main(name, arguments)
        except Hang:
            status = None
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            trace = traceback.format_exc()
    texts = []
    for stream in (out, error):
        raw = stream.buffer
        assert isinstance(raw, io.BytesIO)
        texts.append(raw.getvalue().decode("utf-8", "backslashreplace"))
    return texts[0], texts[1], status, trace


def _main(name: str, arguments: Sequence[str]) -> int:
    if name == "unet-jax":
        from unet_jax import cli

        return cli.main(arguments)
    import train

    before = sys.argv
    sys.argv = [name, *arguments]  # ml_collections looks there for overrides
    try:
        return train.main()
    finally:
        sys.argv = before


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises Hang after some seconds, and again each second, for threads are waited
    for on the way out."""

    def stop(number: int, frame: types.FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _logged_to(stream: io.TextIOWrapper) -> Iterator[None]:
    """What is logged goes there; a log line is no error message."""
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def _warnings_as_in_a_program() -> Iterator[None]:
    """A program's filters, which a test may have made stricter."""
    quiet = (DeprecationWarning, PendingDeprecationWarning, ImportWarning)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for category in (*quiet, ResourceWarning):
            warnings.simplefilter("ignore", category)
        yield


# --- Command lines -------------------------------------------------------------------

TINY = {
    "model.features": "(2,4)",
    "train.crop": "(16,16)",
    "train.steps": 1,
    "train.batch_size": 2,
    "train.eval_batch_size": 2,
    "train.threads": 1,
    "optim.warmup_steps": 0,
    "mesh.data": 1,
}
CELLS = {"data.cells.size": "(16,16)", "data.cells.examples": 2}


def train_on(folder: Path, source: str, **changes: object) -> list[str]:
    """``train.py`` on the data in ``folder/data``.

    Args:
        folder: Of the case; the workdir is in it, too.
        source: Of ``data.source``.
        changes: Of the config, ``__`` for the dots: ``data__train``.
    """
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    files = {} if source in ("cells", "tfds") else {"data.root": folder / "data"}
    return trained(folder, {"data.source": source, **files, **keys})


def trained(folder: Path, changes: dict[str, object] | None = None) -> list[str]:
    """``train.py`` in ``folder/run`` on the built-in cells, with other values."""
    values = {**TINY, **CELLS, **(changes or {})}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return ["train.py", f"--workdir={folder / 'run'}", *flags]


@functools.cache
def workdir() -> Path:
    """A workdir that was trained for one step, to be read only."""
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="unet-jax-cases-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    name, *arguments = trained(folder)
    out, error, status, trace = run(name, arguments, folder)
    if status != 0:
        raise RuntimeError(f"{out}{error}{trace}")
    return folder / "run"


def copied(folder: Path) -> Path:
    """A copy of that workdir, to be damaged."""
    shutil.copytree(workdir(), folder / "run")
    return folder / "run"
