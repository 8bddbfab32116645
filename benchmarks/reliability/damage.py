"""Runs whose newest checkpoint is damaged, and what they make of it.

    python -m benchmarks.reliability.damage [--every=2]

A run is stopped at step 6 of 8. For each fault of `faults` its workdir is copied, the
fault is inflicted, and the same command goes on from what is left, to step 8. What it
ends with is compared with an undamaged run, bit for bit: then nothing was lost but the
steps since the last good save, which were made again.
"""

import argparse
import contextlib
import io
import shutil
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from benchmarks.reliability.faults import FAULTS, Fault
from benchmarks.reliability.kills import SETTINGS, digest


class Outcome(NamedTuple):
    """What came of a fault.

    Attributes:
        name: Of the fault.
        survived: Whether the run ended like one that was not damaged.
        text: What it printed, or the traceback.
    """

    name: str
    survived: bool
    text: str


def train(workdir: Path, steps: int) -> str:
    """A run to a step, in this process; what it prints."""
    import train as program
    from configs import default

    config = default.get_config()
    changes = {key: _value(value) for key, value in SETTINGS.items()}
    changes |= {
        "train.steps": steps,
        "train.eval_every": 2,
        "optim.schedule": "constant",  # or it would depend on the number of steps
        "optim.warmup_steps": 0,
    }
    config.update_from_flattened_dict(changes)
    text = io.StringIO()
    # The first evaluation stays the best one: three checkpoints are kept, as in a run
    # whose best is old.
    with (
        mock.patch("unet_jax.books.score_of", lambda *_, **__: 1.0),
        contextlib.redirect_stdout(text),
    ):
        program.train_and_evaluate(program.chosen(config), workdir)
    return text.getvalue()


def _value(text: object) -> object:
    if not isinstance(text, str):
        return text
    return tuple(int(n) for n in text.strip("()").split(",") if n)


def survive(folder: Path, faults: Sequence[Fault]) -> list[Outcome]:
    """Inflicts each fault on a run of its own; see the module."""
    train(folder / "whole", 8)
    train(folder / "base", 6)
    wanted, found = digest(folder / "whole"), []
    for fault in faults:
        workdir = shutil.copytree(folder / "base", folder / "run")
        fault.inflict(workdir / "checkpoints" / "6")
        try:
            text = train(workdir, 8)
            survived = digest(workdir) == wanted
        except BaseException:
            text, survived = traceback.format_exc(), False
        found.append(Outcome(fault.name, survived, text))
        shutil.rmtree(workdir)
    return found


def main() -> None:
    """Runs it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="only every so many-th")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = survive(Path(folder), FAULTS[:: asked.every])
    for name, survived, text in found:
        if not survived:
            print(f"--- {name}\n{text}")
    print(f"{sum(o.survived for o in found)} of {len(found)} faults survived")


if __name__ == "__main__":
    main()
