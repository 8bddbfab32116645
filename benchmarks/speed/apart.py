"""What has to be measured in a process of its own: peak memory, and compiling.

    python -m benchmarks.speed.apart memory ours '{"title": ..., ...}'

is such a process, which `measure` starts; its last line is JSON. A PyTorch process
does not load jax, nor one of ours PyTorch.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed import machine
from benchmarks.speed.cases import Case, arrays
from benchmarks.speed.rounds import alternated
from unet_jax.types import InputError

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3  # that the peak is taken over, and as many before


def measure(
    command: str, case: Case, *, peers_of: Sequence[str], rounds: int, limit: float
) -> dict[str, Any]:
    """A row of the table of memory, or of that of compiling.

    Args:
        command: ``memory``, ``compile forward`` or ``compile train``.
        case: What.
        peers_of: Names of PyTorch's settings.
        rounds: Processes of each candidate.
        limit: As for `rounds.alternated`.
    """
    found: dict[str, list[dict[str, float]]] = {}
    device, begin = machine.device(), machine.now()

    def one(name: str) -> float:
        answer = run(command, name, case, device)
        found.setdefault(name, []).append(answer)
        return 0.0

    alternated(one, ["ours", *peers_of], rounds=rounds, limit=limit)

    def each(name: str, key: str) -> list[float]:
        return [float(f"{answer[key]:.4g}") for answer in found[name]]

    record = {
        "case": case.text,
        "batch": case.batch,
        "dtype": case.dtype,
        **machine.told(begin),
    }
    if command == "memory":
        record["bytes"] = {name: each(name, "bytes") for name in found}
        record["planned"] = found["ours"][0]["planned"]
        return record
    record["what"] = command.split()[1]
    seconds = {name: each(name, "seconds") for name in found}
    parts = {key: each("ours", key) for key in ("trace", "xla")}
    return {**record, "seconds": parts | seconds}


def run(command: str, side: str, case: Case, device: str) -> dict[str, float]:
    """What one process found.

    Raises:
        InputError: It failed; its last words are in the sentence.
    """
    asked = [command, side, json.dumps(case._asdict()), device]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.apart", *asked],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # Nothing that an earlier process compiled.
        env={
            **os.environ,
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        },
    )
    if done.returncode:
        last = done.stderr.strip().split("\n")[-1][:300]
        raise InputError(
            f"the process that measures {command} of {case.text}, {side}, ended with"
            f" status {done.returncode} ({last}): leave it out with --cases or --peers."
        )
    return json.loads(done.stdout.strip().split("\n")[-1])


# --- Memory --------------------------------------------------------------------------


def resident(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most.

    Raises:
        InputError: This is not Linux.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        raise InputError("memory is read from /proc: measure it on Linux.")
    line = next(x for x in status.read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])


def settled() -> int:
    """Bytes of this process once what it has freed is given back to the system."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident("VmRSS")


def _forget_peak() -> None:
    """From now on the peak is that of what comes."""
    Path("/proc/self/clear_refs").write_text("5")


def our_memory(case: Case) -> dict[str, float]:
    """Peak bytes of training steps over what is there before there are parameters."""
    import jax

    from benchmarks.speed import ours
    from unet_jax import compiled

    init = ours.jitted_init(case).lower().compile()
    step = ours.jitted_step(case).lower(*ours.shapes_of(case)).compile()
    planned = compiled.costs(step).peak or 0
    before = settled()
    state, batch = init(), ours.batch_of(case)

    def several() -> None:
        nonlocal state
        for _ in range(STEPS):
            state, stats = step(state, batch)
            jax.block_until_ready(stats)

    several()
    memory = jax.devices()[0].memory_stats()
    if memory:
        return {"bytes": memory["peak_bytes_in_use"], "planned": planned}
    _forget_peak()
    several()
    return {"bytes": resident("VmHWM") - before, "planned": planned}


def their_memory(case: Case, name: str, device: str) -> dict[str, float]:
    """Likewise, of PyTorch."""
    import torch

    from benchmarks.speed import peers, theirs

    theirs.prepare(device, machine.cores())
    # Libraries that load, and threads that start, with the first use.
    torch.nn.Conv2d(1, 1, 3).to(device)(torch.zeros(1, 1, 8, 8, device=device))
    before, setting = settled(), theirs.SETTINGS[name]
    net = peers.build(case)
    given = arrays(case)
    one = theirs.program("train", net, given, case, setting, device)
    del net, given
    for _ in range(STEPS):
        one.wait(one.run())
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        _forget_peak()
    for _ in range(STEPS):
        one.wait(one.run())
    if device == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(), "planned": 0}
    return {"bytes": resident("VmHWM") - before, "planned": 0}


# --- Compiling -----------------------------------------------------------------------


def our_compile(what: str, case: Case) -> dict[str, float]:
    """Seconds to trace and lower, to compile, and both."""
    import jax

    from benchmarks.speed import ours

    state, batch = ours.shapes_of(case)
    jax.devices()  # the backend starts
    begin = time.perf_counter()
    if what == "forward":
        lowered = ours.jitted_forward(case).lower(state.variables, batch["image"])
    else:
        lowered = ours.jitted_step(case).lower(state, batch)
    middle = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    return {"trace": middle - begin, "xla": end - middle, "seconds": end - begin}


def their_compile(what: str, case: Case, name: str, device: str) -> dict[str, float]:
    """What the first pass of a compiled net takes more than the third."""
    from benchmarks.speed import peers, theirs

    theirs.prepare(device, machine.cores())
    setting, net = theirs.SETTINGS[name], peers.build(case)
    one = theirs.program(what, net, arrays(case), case, setting, device)
    took = []
    for _ in range(3):
        begin = time.perf_counter()
        one.wait(one.run())
        took.append(time.perf_counter() - begin)
    return {"seconds": took[0] - took[2]}


def main(command: str, side: str, text: str, device: str) -> None:
    """One process; prints what it found."""
    fields = json.loads(text)
    fields |= {key: tuple(fields[key]) for key in ("features", "size")}
    case = Case(**fields)
    if command == "memory":
        mine = side == "ours"
        found = our_memory(case) if mine else their_memory(case, side, device)
    else:
        what = command.split()[1]
        mine = side == "ours"
        found = (
            our_compile(what, case) if mine else their_compile(what, case, side, device)
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
