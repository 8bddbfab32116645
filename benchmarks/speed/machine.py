"""Where figures are measured, and with what; light: no jax, no PyTorch at the top."""

import functools
import importlib.util
import os
import platform
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from unet_jax.types import InputError

PACKAGES = ("jax", "jaxlib", "flax", "torch")


def need_torch() -> None:
    """Refuses to go on without PyTorch.

    Raises:
        InputError: It is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "PyTorch is what is compared with, and it is not installed: pip install"
            " torch (for CPUs only: --index-url https://download.pytorch.org/whl/cpu)."
        )


def need_compiler(device: str) -> None:
    """Refuses to go on without what `torch.compile` calls.

    Args:
        device: ``cpu`` or ``cuda``.

    Raises:
        InputError: A C++ compiler, or Triton on a GPU, is not there.
    """
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise InputError(
            "torch.compile needs a C++ compiler: install g++, or name one in CXX."
        )
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise InputError("torch.compile needs Triton on a GPU: pip install triton.")


def cores() -> int:
    """CPU cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def kind() -> str:
    """Of jax's first device, for a file's name: ``cpu``, ``nvidia-h200``."""
    import jax

    return "-".join(jax.devices()[0].device_kind.lower().split())


def device() -> str:
    """What PyTorch calls the device that jax uses.

    Raises:
        InputError: PyTorch has no name for it.
    """
    import jax

    names = {"cpu": "cpu", "gpu": "cuda"}
    backend = jax.default_backend()
    if backend not in names:
        raise InputError(
            f"PyTorch is not compared with on {backend}: set JAX_PLATFORMS=cpu."
        )
    return names[backend]


def _processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _hardware() -> str:
    import jax

    processor = f"{cores()} CPU cores ({_processor()})"
    first = jax.devices()[0]
    if first.platform == "cpu":
        return processor
    return f"one {first.device_kind} beside {processor}"


@functools.cache
def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


class Moment(NamedTuple):
    """Seconds on the clock, and of CPU time: everyone's, and this process's own."""

    clock: float
    everyone: float
    own: float


def now() -> Moment:
    """To be given to `told` when a row is done."""
    own, everyone, stat = os.times(), 0.0, Path("/proc/stat")
    if stat.is_file():
        # user, nice, system, idle, iowait, irq, softirq, and what other guests of the
        # host took.
        ticks = [int(word) for word in stat.read_text().split("\n")[0].split()[1:9]]
        everyone = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    return Moment(time.perf_counter(), everyone, sum(own[:4]))


def told(since: Moment) -> dict[str, Any]:
    """What a record says of where and how it was measured.

    Args:
        since: When the row was begun.

    Returns:
        ``hardware``, ``versions`` and ``others``: the part of all CPU time since then
        that was not ours nor of processes of ours that have ended.
    """
    end = now()
    span = (end.clock - since.clock) * (os.cpu_count() or 1)
    others = (end.everyone - since.everyone) - (end.own - since.own)
    return {
        "others": round(max(others, 0.0) / span, 2),
        "hardware": _hardware(),
        "versions": _versions(),
    }


BUSY = 0.1  # part of the CPU from which other work is worth a warning


def busy(seconds: float = 1.0) -> str:
    """A sentence if other work takes much of the CPU, else ""."""
    begin = now()
    time.sleep(seconds)
    others = told(begin)["others"]
    if others < BUSY:
        return ""
    return (
        f"note: other work takes {others:.0%} of the CPU. PyTorch's OpenMP threads wait"
        " for each other and lose more by that than ours: measure on an idle machine"
    )
