"""Whether the input keeps up with a GPU, and what memory a large folder takes.

    python -m benchmarks.input_pipeline --folder=/some/folder
    python -m benchmarks.input_pipeline

Without a folder, the images a second of batches that are cut on the host and sent, and
of images that are kept on the device (``train.resident``), in turn: of the input alone,
until the batch is on the device, and of whole training steps.

With one, it makes there 20,000 images of 512 x 512 and their masks as PNG (links to a
few distinct files, so that it fits a disk; decoding costs the same), and measures

1. how long a step of 50 ms and batch 8 waits for its images: a step that only sleeps,
   as the host does while a GPU computes, for one thread and for one a core;
2. the same with examples kept in ``data.cache_dir``, from the second epoch on, and in
   memory;
3. the peak memory of a real training run over all of it, with the default
   ``data.cache_mb``, and how long it takes until the first step.
"""

import argparse
import itertools
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

import train
from configs import default
from unet_jax import data, resident, run, sharding
from unet_jax.data.scene import Scene

ROOT = Path(__file__).resolve().parents[1]
SIZE, DISTINCT = 512, 24
BATCH, STEP = 8, 0.05


def make(folder: Path, examples: int) -> None:
    """Images of touching cells with noise, and masks of 0 and 255."""
    scene = Scene((SIZE, SIZE), (8.0, 20.0), 0.6, 0.05)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i in range(DISTINCT):
        image, instances = scene.draw(np.random.default_rng(i))
        paths = folder / "images" / f"{i:05d}.png", folder / "masks" / f"{i:05d}.png"
        Image.fromarray(image).save(paths[0])
        Image.fromarray((instances > 0).astype(np.uint8) * 255).save(paths[1])
    for i in range(DISTINCT, examples):
        for part in ("images", "masks"):
            link = folder / part / f"{i:05d}.png"
            os.link(folder / part / f"{i % DISTINCT:05d}.png", link)


def waiting(batches: Iterator[Any], steps: int) -> tuple[float, float]:
    """(milliseconds a step takes, part of them spent on waiting for the batch)."""
    for _ in range(10):
        next(batches)
    begin, waited = time.perf_counter(), 0.0
    for _ in range(steps):
        time.sleep(STEP)
        mark = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - mark
    total = time.perf_counter() - begin
    return 1000 * total / steps, waited / total


def pipeline(root: Path, steps: int) -> None:
    """How well the input keeps up."""
    options: dict[str, Any] = {
        "source": "folder",
        "root": str(root),
        "task": "classes",
        "folder": {"mask": "binary"},
    }
    cores = len(os.sched_getaffinity(0))
    some = {"train": "train[:400]", "evaluation": "train[400:408]"}
    every = {"train": "train[:-8]", "evaluation": "train[-8:]"}
    cases = [
        ("from PNG", 1, every, {"cache_mb": 0}),
        ("from PNG", cores, every, {"cache_mb": 0}),
        ("cache_dir, second epoch", cores, some, {"cache_dir": str(root / "cache")}),
        ("memory, second epoch", cores, some, {"cache_mb": 2000}),
    ]
    print(f"{'':26} threads  ms a step of {1000 * STEP:.0f}  waiting")
    for name, threads, split, more in cases:
        source = data.build(**options, **split, **more).train
        batches = data.train_batches(
            source, seed=0, batch_size=BATCH, crop=(SIZE, SIZE), threads=threads
        )
        if "second" in name:
            list(itertools.islice(batches, -(-len(source) // BATCH)))
        took, wait = waiting(batches, steps)
        print(f"{name:26} {threads:7}  {took:15.1f}  {wait:7.1%}", flush=True)


def memory(root: Path, examples: int) -> None:
    """The peak memory of a training run."""
    folder = root / "run"
    flags = {
        "data.source": "folder",
        "data.root": str(root),
        "data.train": "train[:-16]",
        "data.evaluation": "train[-16:]",
        "model.features": "(8,16,32)",
        "train.crop": "(128,128)",
        "train.steps": 400,
        "train.eval_every": 200,
    }
    command = [sys.executable, "train.py", f"--workdir={folder}"]
    command += [f"--config.{key}={value}" for key, value in flags.items()]
    print("a run over", examples, "examples:", flush=True)
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        begin = time.perf_counter()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(("step", "compiled in", "bottleneck", "evaluation")):
                took = time.perf_counter() - begin
                print(f"  {took:6.1f} s  {line.strip()}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"peak memory of the run: {peak / 2**20:.2f} GB", flush=True)


def wired(together: int, *, kept: bool, **changes: Any) -> run.Run:
    """A run of the built-in cells, whose images are kept on the device or sent."""
    flags = {
        "model.features": (8, 16, 32),
        "train.steps_per_call": together,
        "train.resident": kept,
    }
    flags |= {f"train.{key}": 960 for key in ("steps", "log_every")}
    flags |= {f"train.{key}_every": 960 for key in ("eval", "save")}
    config = default.get_config()
    with config.unlocked():
        config.update_from_flattened_dict({**flags, **changes})
    made = run.build(train.chosen(config), sharding.make_mesh(1))
    for i in range(len(made.dataset.train)):  # drawn once and kept in memory, as files
        made.dataset.train[i]
    return made


def sent_or_kept(calls: list[int], rounds: int, seconds: float = 1.0) -> None:
    """Images a second of both ways, in turn."""
    sizes = {
        "128 of 128, batch 8": {"train.crop": (128, 128), "train.batch_size": 8},
        "256 of 512, batch 4": {"train.crop": (256, 256), "train.batch_size": 4}
        | {"data.cells.size": (512, 512), "data.cells.examples": 40},
    }
    print(f"{'':24} steps a call {'images/s':>9} {'sent':>9} {'kept':>9} kept/sent")
    for (name, changes), together in itertools.product(sizes.items(), calls):
        ways = [wired(together, kept=kept, **changes) for kept in (False, True)]
        images = together * changes["train.batch_size"]
        alone = [_input(one, seconds) for one in ways]
        steps = [_steps(one, seconds) for one in ways]
        for what, timed in (("input", alone), ("step", steps)):
            found = np.array([[next(one) for one in timed] for _ in range(rounds)])
            sent, kept = images / np.median(found, 0)
            ratio = np.median(found[:, 0] / found[:, 1])
            line = f"{name:24} {together:12} {what:>9} {sent:9.0f} {kept:9.0f}"
            print(f"{line} {ratio:9.3f}", flush=True)


def _input(one: run.Run, seconds: float) -> Iterator[float]:
    """Seconds a call until its batch is on the device, cut."""
    batches = one.placed_batches(0)

    def whole(batch: Any) -> Any:
        kept = {"resident": batch["resident"]}
        each = {key: x for key, x in batch.items() if key != "resident"}
        return jax.lax.map(lambda rows: resident.cut({**kept, **rows}), each)

    cut = jax.jit(whole if one.steps_per_call > 1 else resident.cut)

    def call() -> Any:
        batch = next(batches)
        return cut(batch) if "resident" in batch else batch

    yield from _timed(call, seconds)


def _steps(one: run.Run, seconds: float) -> Iterator[float]:
    """Seconds a call of the training step, batch and all."""
    batches, state = one.placed_batches(0), [one.begin()]

    def call() -> Any:
        state[0], stats = one.train_step(state[0], next(batches))
        return stats

    yield from _timed(call, seconds)


def _timed(call: Any, seconds: float) -> Iterator[float]:
    """Seconds a call, of some each time, none of which waits for the one before."""
    jax.block_until_ready(call())
    while True:
        begin, count, last = time.perf_counter(), 0, None
        while time.perf_counter() - begin < seconds:
            last, count = call(), count + 1
            if count % 4 == 0:
                jax.block_until_ready(last)
        jax.block_until_ready(last)
        yield (time.perf_counter() - begin) / count


def main() -> None:
    """Runs it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--together", type=int, nargs="+", default=[1, 8], help="steps a call"
    )
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=100)
    asked = parser.parse_args()
    if asked.folder is None:
        sent_or_kept(asked.together, asked.rounds)
        return
    if not (asked.folder / "images").is_dir():
        begin = time.perf_counter()
        make(asked.folder, asked.examples)
        print(f"made in {time.perf_counter() - begin:.0f} s")
    pipeline(asked.folder, asked.steps)
    memory(asked.folder, asked.examples)


if __name__ == "__main__":
    main()
