"""What a training step costs against pixels, width, batch and devices.

Along each axis all else is that of a U-Net of width 16, batch 1, 256 x 256. Along
``devices`` a batch of 8 is split over some of a CPU's virtual devices, which share its
cores, so that splitting can gain nothing and shows what it costs; or over real ones.
"""

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.speed import beside, machine, ours
from benchmarks.speed.cases import GROWING, SHARED, Case, unet
from benchmarks.speed.rounds import Program, interleaved
from benchmarks.speed.tables import HERE, PAGE, files, read
from unet_jax import sharding
from unet_jax.log import replace_file
from unet_jax.types import InputError

PICTURE = PAGE.with_suffix(".png")
DEVICES = (1, 2, 4, 8)
AXES = GROWING


def points(*, on_cpu: bool, dtype: str, small: bool = False) -> dict[str, Case]:
    """What is measured with PyTorch beside it: ``axis/x`` to the case.

    Args:
        on_cpu: A GPU goes further.
        dtype: To compute in.
        small: Of tiny nets, to try it.
    """
    base, side = (2, 32) if small else (16, 256)
    sides = (32, 64) if small else (64, 128, 256, 512, 1024)
    sides += () if on_cpu else (2048,)
    bases = (2, 4) if small else (8, 16, 32, 64)
    batches = (1, 2) if small else (1, 2, 4, 8, 16)
    batches += () if on_cpu else (32, 64)
    cases = {
        **{f"pixels/{n * n}": unet(base, n) for n in sides},
        **{f"width/{b}": unet(b, side) for b in bases},
        **{f"batch/{k}": unet(base, side, batch=k) for k in batches},
    }
    return {key: case._replace(dtype=dtype) for key, case in cases.items()}


def over_devices(
    case: Case, *, peers_of: Sequence[str], rounds: int, limit: float
) -> dict[str, dict[str, Any]]:
    """Rows of the devices that jax sees; PyTorch is beside one of them."""
    begin, case = machine.now(), case._replace(batch=SHARED)
    counts = [n for n in DEVICES if n <= jax.device_count()]
    programs = {f"ours {n}": _split(case, n) for n in counts}
    beside_one = beside.programs("train", case, peers_of)
    programs |= {name: beside_one[name] for name in peers_of}
    for program in programs.values():
        program.wait(program.run())
    seconds = beside.rounded(interleaved(programs, rounds=rounds, limit=limit))
    found = {}
    for n in counts:
        own = {"ours": seconds[f"ours {n}"]}
        own |= {name: seconds[name] for name in peers_of if n == 1}
        record = {"case": case.text, "batch": case.batch, "dtype": case.dtype}
        record |= {"seconds": own, **machine.told(begin)}
        found[f"devices/{n}"] = row("devices", n, record)
    return found


def _split(case: Case, count: int) -> Program:
    """A training step of a batch that is split over devices."""
    mesh = sharding.make_mesh(count, 1, devices=jax.devices()[:count])
    state = jax.device_put(ours.state_of(case), sharding.replicated(mesh))
    batch = sharding.place(jax.device_get(ours.batch_of(case)), mesh)
    step = jax.jit(
        sharding.within(mesh, ours.step_of(case)),
        out_shardings=sharding.replicated(mesh),
        donate_argnums=0,
    )

    def run() -> Any:
        nonlocal state
        state, stats = step(state, batch)
        return stats

    return Program(run, lambda stats: jax.block_until_ready((state, stats)), np.asarray)


def row(axis: str, at: int, record: dict[str, Any]) -> dict[str, Any]:
    """A record of a training step as that of a point."""
    return {"axis": AXES[axis], "at": at, **record}


def devices_apart(arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`over_devices` in a process that sees eight virtual devices of a CPU.

    Args:
        arguments: Of the command line, but for what is measured.

    Raises:
        InputError: That process failed; what it wrote is in the sentence.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={max(DEVICES)}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", "growth", "--devices", *arguments],
        cwd=HERE.parents[1],
        env={**os.environ, "XLA_FLAGS": flags.strip()},
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = done.stdout.strip().split("\n")
    if done.returncode:
        raise InputError(
            f"the process with {max(DEVICES)} virtual devices ended with status"
            f" {done.returncode}: see what it wrote above."
        )
    return json.loads(lines[-1])


def draw(path: Path = PICTURE, folder: Path = HERE) -> None:
    """Four panels with logarithmic axes; nothing where there are no figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [file for file in files(folder) if read(file).get("growth")]
    if not measured:
        return
    figure = Figure(figsize=(10, 8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    for number, file in enumerate(measured):
        rows = read(file)["growth"]
        kind = file.stem.removeprefix("results-")
        for panel, axis in zip(panels.flat, AXES, strict=True):
            some = {k: r for k, r in rows.items() if k.split("/")[0] == axis}
            _lines(panel, list(some.values()), kind, f"C{number}")
    for panel, (axis, title) in zip(panels.flat, AXES.items(), strict=True):
        panel.set(xlabel=title, ylabel="ms a training step", xscale="log", yscale="log")
        ticks = sorted({x for line in panel.lines for x in line.get_xdata()})
        panel.set_xticks(ticks, [_tick(axis, int(x)) for x in ticks], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    replace_file(path, content.getvalue())


def _tick(axis: str, x: int) -> str:
    side = round(x**0.5)
    return f"{side}²" if axis == "pixels" else str(x)


def _lines(panel: Any, rows: list[Any], kind: str, colour: str) -> None:
    names = dict.fromkeys(name for row in rows for name in row["seconds"])
    styles = {"ours": "o-", "eager": "s--", "channels_last": "^:", "compiled": "v-."}
    words = {"ours": "ours", "eager": "PyTorch"}
    for name in names:
        some = sorted((r for r in rows if name in r["seconds"]), key=lambda r: r["at"])
        panel.plot(
            [r["at"] for r in some],
            [1e3 * float(np.median(r["seconds"][name])) for r in some],
            styles.get(name, "x-"),
            color=colour,
            markersize=4,
            alpha=1.0 if name == "ours" else 0.7,
            label=f"{kind}: {words.get(name, name.replace('_', ' '))}",
        )
