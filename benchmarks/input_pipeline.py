"""Whether the input keeps up with a GPU, and what memory a large folder takes.

    python -m benchmarks.input_pipeline --folder=/some/folder

Makes a folder of 20,000 images of 512 x 512 and their masks as PNG (links to a few
distinct files, so that it fits a disk; decoding costs the same), and measures

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

import numpy as np
from PIL import Image

from unet_jax import data
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


def main() -> None:
    """Runs it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=100)
    asked = parser.parse_args()
    if not (asked.folder / "images").is_dir():
        begin = time.perf_counter()
        make(asked.folder, asked.examples)
        print(f"made in {time.perf_counter() - begin:.0f} s")
    pipeline(asked.folder, asked.steps)
    memory(asked.folder, asked.examples)


if __name__ == "__main__":
    main()
