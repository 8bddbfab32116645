"""Speed, memory and compile times beside PyTorch, table by table.

    python -m benchmarks.speed forward      # a forward pass, without gradients
    python -m benchmarks.speed train        # a training step
    python -m benchmarks.speed predict      # a large image by overlapping tiles
    python -m benchmarks.speed end_to_end   # a training with its data and augmentation
    python -m benchmarks.speed memory       # the peak of a training step
    python -m benchmarks.speed compile      # until a program is there
    python -m benchmarks.speed growth       # against pixels, width, batch, devices
    python -m benchmarks.speed tables       # measures nothing: writes the page again

With ``--write`` the figures are kept and the tables of ``docs/performance.md`` written;
without, a table is printed. On a GPU the same commands measure it, in bfloat16.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

# Before jax starts: PyTorch is to have some of the GPU's memory, too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks.speed import machine
from benchmarks.speed.cases import select, tiny, unet
from benchmarks.speed.end_to_end import Setup
from benchmarks.speed.tables import HERE, TABLES, keep, read, table, write
from unet_jax.types import InputError, choose

ROUNDS = {"forward": 15, "train": 15, "predict": 7, "end_to_end": 7}
ROUNDS |= {"memory": 2, "compile": 2, "growth": 7}
PEERS = ("eager", "channels_last", "compiled")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line.

    Raises:
        InputError: A number that cannot be.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("table", choices=(*TABLES, "tables"))
    add("--cases", default="", help="of cases.py, with commas, or all; of growth axes")
    add("--batch", default="", help="images a batch, with commas (1); tiles of predict")
    add("--rounds", type=int, default=0, help="of each candidate, at most")
    add(
        "--seconds",
        type=float,
        default=0.0,
        help="for a row, after which no round begins (45; 15 of growth)",
    )
    add("--peers", default="eager,channels_last", help="of PyTorch (%(default)s)")
    add("--compile", action="store_true", help="torch.compile as well")
    add("--dtype", default="", help="float32, or bfloat16 (of a GPU)")
    add("--steps_per_call", type=int, default=0, help="of end_to_end (1; 8 on a GPU)")
    add("--write", action="store_true", help="keep the figures and write the page")
    add("--small", action="store_true", help="tiny nets, to try a command")
    add("--devices", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.small and asked.write:
        raise InputError("--small is to try a command: leave out --write.")
    if asked.rounds < 0 or asked.seconds < 0 or asked.steps_per_call < 0:
        raise InputError(
            "--rounds, --seconds and --steps_per_call must be above 0, or left out."
        )
    asked.rounds = asked.rounds or ROUNDS.get(asked.table, 0)
    asked.seconds = asked.seconds or (15.0 if asked.table == "growth" else 45.0)
    asked.peers = [choose(PEERS, name, "--peers:") for name in asked.peers.split(",")]
    if asked.compile and "compiled" not in asked.peers:
        asked.peers.append("compiled")
    sizes = asked.batch.split(",") if asked.batch else []
    if not all(text.isdecimal() and int(text) > 0 for text in sizes):
        raise InputError(
            f"--batch={asked.batch} must be whole numbers above 0, with commas."
        )
    asked.batches = [int(text) for text in sizes]
    return asked


def rows(asked: argparse.Namespace) -> Any:
    """Measures the rows of a table: yields ``(key, record)``."""
    on_cpu = machine.device() == "cpu"
    dtype = asked.dtype or ("float32" if on_cpu else "bfloat16")
    choose(("float32", "bfloat16"), dtype, "--dtype:")
    options = {"peers_of": asked.peers, "rounds": asked.rounds, "limit": asked.seconds}
    if asked.table == "end_to_end":
        yield from _trainings(asked, on_cpu, dtype, options)
        return
    if asked.table == "growth":
        yield from _growth(asked, on_cpu, dtype, options)
        return
    from benchmarks.speed import apart, beside

    batches = asked.batches or [16 if asked.table == "predict" and not on_cpu else 1]
    found = select(asked.table, asked.cases, batches, dtype=dtype, on_cpu=on_cpu)
    for key, (_, case) in found.items():
        case = tiny(case) if asked.small else case
        if asked.table == "memory":
            yield key, apart.measure("memory", case, **options)
        elif asked.table == "compile":
            options["peers_of"] = _compiled()
            for what in ("forward", "train"):
                record = apart.measure(f"compile {what}", case, **options)
                yield f"{key}, {what}", record
        else:
            scale = 1 / 16 if asked.small else 1.0
            yield key, beside.measure(asked.table, case, scale=scale, **options)


def _compiled() -> list[str]:
    """What compiling is compared with, if it can be."""
    try:
        machine.need_compiler(machine.device())
    except InputError as error:
        print(f"note: {error}", file=sys.stderr, flush=True)
        return []
    return ["compiled"]


def _trainings(
    asked: argparse.Namespace, on_cpu: bool, dtype: str, options: dict[str, Any]
) -> Any:
    from benchmarks.speed import end_to_end

    setup = Setup(dtype=dtype)
    if not on_cpu:
        setup = Setup(dtype=dtype, batch=32, examples=256)
    if asked.small:
        setup = Setup((40, 40), (32, 32), 8, (2, 4), 2, dtype, 0.3)
    steps = asked.steps_per_call or (1 if on_cpu else 8)
    for batch in asked.batches or [setup.batch]:
        one = dataclasses.replace(setup, batch=batch)
        options["limit"] = max(asked.seconds, 600.0)
        yield one.text, end_to_end.measure(one, steps_per_call=steps, **options)


def _growth(
    asked: argparse.Namespace, on_cpu: bool, dtype: str, options: dict[str, Any]
) -> Any:
    from benchmarks.speed import beside, growth

    chosen = asked.cases.split(",") if asked.cases else list(growth.AXES)
    axes = [axis for axis in chosen if choose(growth.AXES, axis, "--cases:")]
    base = unet(*((2, 32) if asked.small else (16, 256)))._replace(dtype=dtype)
    if asked.devices:  # in the process with virtual devices
        yield from growth.over_devices(base, **options).items()
        return
    for key, case in growth.points(
        on_cpu=on_cpu, dtype=dtype, small=asked.small
    ).items():
        axis, _, at = key.partition("/")
        if axis not in axes:
            continue
        record = beside.measure("train", case, **options)
        yield key, growth.row(axis, int(at), record)
    if "devices" not in axes:
        return
    if not on_cpu:
        yield from growth.over_devices(base, **options).items()
        return
    arguments = [f"--rounds={asked.rounds}", f"--peers={','.join(asked.peers)}"]
    arguments += [f"--seconds={asked.seconds}", f"--dtype={dtype}"]
    arguments += ["--small"] if asked.small else []
    yield from growth.devices_apart(arguments).items()


def run(asked: argparse.Namespace) -> None:
    """Measures a table, row by row, and keeps and prints what was found."""
    if asked.table == "tables":
        _write()
        return
    machine.need_torch()
    from benchmarks.speed import theirs

    theirs.prepare(machine.device(), machine.cores())
    if "compiled" in asked.peers:
        machine.need_compiler(machine.device())
    path = HERE / f"results-{machine.kind()}.json"
    if asked.write:
        read(path)  # before anything is measured, whether it can be added to
    found, begin = {}, time.perf_counter()
    say = partial(print, file=sys.stderr, flush=True)
    if note := machine.busy():
        say(note)
    for key, record in rows(asked):
        found[key] = record
        say(f"{time.perf_counter() - begin:6.0f} s  {key}")
        if asked.write and not asked.devices:
            keep(path, asked.table, {key: record})
    if asked.devices:
        print(json.dumps(found))
        return
    print(table(asked.table, found))
    if asked.write:
        _write()


def _write() -> None:
    from benchmarks.speed import growth

    write()
    growth.draw()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; a user's mistake ends in one sentence and status 2."""
    try:
        run(parse(argv))
    except InputError as error:
        print(f"benchmarks.speed: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
