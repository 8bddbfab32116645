"""How long after the command the first step is done, with and without kept programs.

    python -m benchmarks.cold_start --rounds=5

Every figure is of a fresh process, from before it is started to the end of its first
step: ``train.py`` as it is with ``configs/default.py``, for the first time (``cold``,
nothing kept) and later (``warm``, `unet_jax.programs.keep`); and, where PyTorch is
installed, a plain script that does the like without compiling: a U-Net of 16 to 256
features, batches of 8 crops of 128 x 128, AdamW. They take turns. CPU seconds count all
threads of a process and say less of what else the machine does.
"""

import argparse
import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

OURS = """
import os, sys
import jax
import train

def add(self, step, stats, **more):
    jax.block_until_ready(stats)
    os._exit(0)

train.Books.add = add
sys.exit(train.main())
"""

PYTORCH = """
import torch
from torch import nn
from torch.nn import functional as F

def block(inputs, outputs):
    layers = []
    for first in (inputs, outputs):
        layers += [nn.Conv2d(first, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)

class UNet(nn.Module):
    def __init__(self, features=(16, 32, 64, 128, 256)):
        super().__init__()
        sizes = (1, *features)
        self.down = nn.ModuleList(map(block, sizes[:-1], features))
        pairs = list(zip(features[:0:-1], features[-2::-1]))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.up = nn.ModuleList(block(2 * b, b) for _, b in pairs)
        self.head = nn.Conv2d(features[0], 2, 1)

    def forward(self, x):
        kept = []
        for i, level in enumerate(self.down):
            x = level(F.max_pool2d(x, 2) if i else x)
            kept.append(x)
        for grow, up, skip in zip(self.grow, self.up, kept[-2::-1]):
            x = up(torch.cat([skip, grow(x)], 1))
        return self.head(x)

net = UNet()
optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-4)
image, label = torch.rand(8, 1, 128, 128), torch.randint(2, (8, 128, 128))
loss = F.cross_entropy(net(image), label)
loss.backward()
nn.utils.clip_grad_norm_(net.parameters(), 1.0)
optimizer.step()
loss.item()
"""


def once(code: str, cache: Path, workdir: Path) -> tuple[float, float]:
    """Runs a script in a process of its own.

    Args:
        code: The script; it ends when its first step is done.
        cache: Stands in for the user's cache.
        workdir: Of the run, not there yet.

    Returns:
        Seconds that it took, and seconds of CPU.

    Raises:
        RuntimeError: It failed.
    """
    flags = ["--config=configs/default.py", f"--workdir={workdir}"]
    environ = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return seconds, cpu


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times each (5)")
    rounds = parser.parse_args().rounds
    rows = {"train.py, first use": OURS, "train.py, programs kept": OURS}
    if importlib.util.find_spec("torch"):
        rows["plain PyTorch"] = PYTORCH
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        once(OURS, place / "kept", place / "before")
        for i in range(rounds):
            for j, (name, code) in enumerate(rows.items()):
                cache = place / ("kept" if j else f"empty{i}")
                found[name].append(once(code, cache, place / f"run{i}.{j}"))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print(f"| what | seconds (median of {rounds}) | lowest | CPU seconds |")
    print("|---|---:|---:|---:|")
    for name, times in found.items():
        wall, cpu = zip(*times, strict=True)
        print(
            f"| {name} | {statistics.median(wall):.1f} | {min(wall):.1f} |"
            f" {statistics.median(cpu):.1f} |"
        )


if __name__ == "__main__":
    main()
