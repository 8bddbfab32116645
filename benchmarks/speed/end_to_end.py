"""Images a second of whole trainings: reading, augmenting, stepping.

Each side trains in a process of its own, which stands still unless it is told to go on
for some seconds; they are told in turns.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.speed import machine
from benchmarks.speed.cases import MOMENTUM, RATE, widths
from benchmarks.speed.rounds import PAUSE, alternated
from unet_jax.types import InputError, size_text

ROOT = Path(__file__).resolve().parents[2]


class _Settings(NamedTuple):
    rate: float = RATE
    momentum: float = MOMENTUM
    rotate: float = 180.0  # degrees, either way
    elastic: float = 10.0  # pixels that a node of 3 x 3 moves
    brightness: float = 0.1
    noise: float = 0.03


SETTINGS = _Settings()


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is trained on what.

    Attributes:
        size: Of the images of the source ``cells``.
        crop: Of the net's input.
        examples: Images there are.
        features: Of a U-Net.
        batch: Images of a step.
        dtype: To compute in.
        span: Seconds of a measurement, at least.
        channels: Of the images.
    """

    size: tuple[int, ...] = (320, 320)
    crop: tuple[int, ...] = (256, 256)
    examples: int = 64
    features: tuple[int, ...] = widths(16, 5)
    batch: int = 8
    dtype: str = "float32"
    span: float = 8.0
    channels: int = 1

    @property
    def text(self) -> str:
        """The net and what it is given."""
        return (
            f"U-Net {self.features[0]}, {self.batch} crops of {size_text(self.crop)},"
            f" {self.dtype}"
        )


# --- In the process ------------------------------------------------------------------


def serve(call: Callable[[], int], wait: Callable[[], Any], setup: Setup) -> None:
    """Trains whenever a line comes, for a while, and answers with images a second.

    Args:
        call: Begins a step, or some; returns how many images that is.
        wait: Waits for it.
        setup: Of which the span is read, and how many images make an epoch, which is
            trained on before the first line is taken.
    """
    seen = 0
    while seen < setup.examples:
        seen += call()
    wait()
    print("ready", flush=True)
    for _ in sys.stdin:
        # What was fetched ahead while the process stood still is not counted.
        seen, begin = 0, time.perf_counter()
        while seen < 8 * setup.batch or time.perf_counter() - begin < setup.span / 4:
            seen += call()
        wait()
        seen, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < setup.span:
            seen += call()
        wait()
        print(json.dumps(seen / (time.perf_counter() - begin)), flush=True)


def main(asked: dict[str, Any]) -> None:
    """A process of one side."""
    fields: dict[str, Any] = asked["setup"]
    for key in ("size", "crop", "features"):
        fields[key] = tuple(fields[key])
    setup = Setup(**fields)
    if asked["side"] == "ours":
        from benchmarks.speed import ours_training

        ours_training.main(setup, **asked["options"])
    else:
        from benchmarks.speed import theirs_training

        theirs_training.main(setup, Path(asked["data"]), **asked["options"])


# --- Outside -------------------------------------------------------------------------


def candidates(
    peers_of: Sequence[str], steps_per_call: int, device: str
) -> dict[str, dict[str, Any]]:
    """What each process is asked for, by its name in the table."""
    from benchmarks.speed import ours_training

    mine = {"ours": (False, 1)}
    if steps_per_call > 1:
        mine[f"ours, {steps_per_call} steps a call"] = (False, steps_per_call)
    if ours_training.section():
        several = f", {steps_per_call} steps a call" if steps_per_call > 1 else ""
        mine[f"ours, data on the device{several}"] = (True, steps_per_call)
    found: dict[str, dict[str, Any]] = {
        name: {
            "side": "ours",
            "options": {"resident": resident, "steps_per_call": steps},
        }
        for name, (resident, steps) in mine.items()
    }
    for name in peers_of:
        found[name] = {"side": "theirs", "options": {"name": name, "device": device}}
    return found


def measure(
    setup: Setup,
    *,
    peers_of: Sequence[str],
    steps_per_call: int,
    rounds: int,
    limit: float,
) -> dict[str, Any]:
    """The row of the table.

    Args:
        setup: What is trained on what.
        peers_of: Names of PyTorch's settings.
        steps_per_call: Of one more candidate of ours; 1 for none.
        rounds, limit: As for `rounds.alternated`.
    """
    from benchmarks.speed import ours_training

    begin, device = machine.now(), machine.device()
    running: dict[str, subprocess.Popen[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "cells.npz"
        ours_training.data_of(setup, data)
        try:
            for name, asked in candidates(peers_of, steps_per_call, device).items():
                asked |= {"setup": dataclasses.asdict(setup), "data": str(data)}
                running[name] = _start(asked)
                _answer(running[name], name)  # ready, and then it stands still

            def one(name: str) -> float:
                time.sleep(PAUSE)
                process = running[name]
                assert process.stdin is not None
                print(file=process.stdin, flush=True)
                return float(_answer(process, name))

            rates = alternated(one, list(running), rounds=rounds, limit=limit)
        finally:
            for process in running.values():
                process.communicate()  # no more lines: it ends
    return {
        "case": setup.text,
        "batch": setup.batch,
        "dtype": setup.dtype,
        "rates": {n: [float(f"{v:.4g}") for v in some] for n, some in rates.items()},
        **machine.told(begin),
    }


def _start(asked: dict[str, Any]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.speed.end_to_end", json.dumps(asked)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _answer(process: "subprocess.Popen[str]", name: str) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise InputError(
            f"the training of {name} ended with status {process.wait()}: see what it"
            " wrote above."
        )
    return line


if __name__ == "__main__":
    # As a module with its name, which those that it imports know it by.
    from benchmarks.speed import end_to_end

    end_to_end.main(json.loads(sys.argv[1]))
