"""Training runs that are killed at random moments, again and again, to their end.

    python -m benchmarks.reliability.kills --kills=50 --out=/some/folder

A run of the built-in cells, with augmentation, dropout and an average of the weights,
saves every second step. It is started, killed with SIGKILL after a random time (which
may fall into the start, a step, an evaluation or a save), and started again until it is
done. Then its last checkpoint, optimizer and log are compared with those of a run that
nobody killed, bit for bit; and the next one begins.
"""

import argparse
import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STEPS = 80
SETTINGS = {
    "data.cells.size": "(16,16)",
    "data.cells.examples": 6,
    "model.features": "(2,4)",
    "model.dropout": 0.3,
    "augment.rotate": 30.0,
    "train.crop": "(16,16)",
    "train.batch_size": 4,
    "train.eval_batch_size": 4,
    "train.ema": 0.9,
    "train.foreground": 0.5,
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.eval_every": 20,
    "train.save_every": 2,
    "train.threads": 1,
    "mesh.data": 1,
}


@dataclass
class Found:
    """What came of it.

    Attributes:
        kills: Runs ended by SIGKILL.
        unfinished: Of these, how many left a checkpoint half written.
        ends: Runs that were finished after one kill or more.
        same: Of these, how many ended like the one that nobody killed.
        trouble: What else happened: the last lines of a run that ended by itself.
    """

    kills: int = 0
    unfinished: int = 0
    ends: int = 0
    same: int = 0
    trouble: list[str] = field(default_factory=list)


def command(workdir: Path) -> list[str]:
    """The command line of a run."""
    changes = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    return [sys.executable, "train.py", f"--workdir={workdir}", *changes]


def start(workdir: Path) -> "subprocess.Popen[str]":
    """Starts a run; what it prints goes to a file beside its workdir."""
    with Path(f"{workdir}.txt").open("w") as out:
        return subprocess.Popen(
            command(workdir),
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )


def digest(workdir: Path) -> str:
    """Of all that a run ends with: weights, average, optimizer, key, losses."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from unet_jax.checkpoint import Checkpoints

    total = hashlib.sha256()
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        items = {
            name: ocp.args.StandardRestore()
            for name in ("variables", "ema", "training")
        }
        found = checkpoints._manager.restore(step, args=ocp.args.Composite(**items))
    total.update(str(step).encode())
    for name in items:
        for path, leaf in jax.tree_util.tree_leaves_with_path(found[name]):
            if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            total.update(jax.tree_util.keystr(path).encode())
            total.update(np.asarray(leaf).tobytes())
    total.update((workdir / "evaluation.csv").read_bytes())
    for line in (workdir / "train.csv").read_text().splitlines():
        total.update(",".join(line.split(",")[:3]).encode())  # step, loss, gradient
    return total.hexdigest()


def soak(folder: Path, kills: int, *, seed: int = 0, say: Any = print) -> Found:
    """Kills runs until enough have been killed; see the module.

    Args:
        folder: Where the runs are.
        kills: How many.
        seed: Of the moments.
        say: Is told how it goes.
    """
    begin = time.perf_counter()
    whole = start(folder / "whole")
    if whole.wait():
        raise RuntimeError((folder / "whole.txt").read_text()[-2000:])
    span = time.perf_counter() - begin
    wanted = digest(folder / "whole")
    say(f"the run that nobody kills takes {span:.1f} s")
    found, moments = Found(), _moments(random.Random(seed), span)
    number = 0
    while found.kills < kills:
        workdir = folder / f"run{number}"
        number += 1
        _one(workdir, moments, kills, wanted, found)
        say(f"{found.kills} kills, {found.same} of {found.ends} runs end the same")
    return found


def _moments(choose: random.Random, span: float) -> Iterator[float]:
    while True:
        yield choose.uniform(0.0, 1.2 * span)


def _one(
    workdir: Path, moments: Iterator[float], kills: int, wanted: str, found: Found
) -> None:
    """A run from its beginning to its end, killed on the way."""
    killed = 0
    while True:
        process = start(workdir)
        try:
            # The last one needed is let go on to its end.
            process.wait(next(moments) if found.kills < kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            found.kills += 1
            half = (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")
            found.unfinished += any(half)
            continue
        if process.returncode:
            found.trouble.append(Path(f"{workdir}.txt").read_text()[-600:])
        if killed:
            found.ends += 1
            found.same += not process.returncode and digest(workdir) == wanted
        return


def main() -> None:
    """Runs it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lanes", type=int, default=1, help="runs side by side")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True)
    with ThreadPoolExecutor(asked.lanes) as pool:

        def lane(number: int) -> Found:
            folder = asked.out / f"lane{number}"
            folder.mkdir()
            return soak(folder, -(-asked.kills // asked.lanes), seed=number)

        for found in pool.map(lane, range(asked.lanes)):
            print(found)


if __name__ == "__main__":
    main()
