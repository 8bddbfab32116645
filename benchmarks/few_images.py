"""Dice and V_Rand against the number of training images, with and without augmentation.

    python -m benchmarks.few_images --root=DIR --steps=300

The claim of the U-Net paper (section 3.1) is that deformed copies let a net learn from
a few images. DIR holds ISBI 2012's ``train-volume.tif`` and ``train-labels.tif``. For
each number of images, seed and kind of augmentation one small U-Net is trained for the
same number of steps on slices drawn by the seed from 0-19, and measured on slices
20-29. Each result is a row of ``few_images.csv`` as soon as it is there; rows that are
there already are not computed again. At the end the table and the plot are written.
"""

import argparse
import csv
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unet_jax import measures, run, sharding
from unet_jax.data.source import Source, Wrapper
from unet_jax.predict import Predictor

COUNTS = (1, 2, 5, 10, 20)
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "random crops only": {},
    "augmented": {
        "flip": True,
        "quarter_turns": True,
        "rotate": 180.0,
        "scale": 0.15,
        "elastic": 10.0,
        "brightness": 0.1,
        "contrast": 0.2,
        "gamma": 0.2,
        "noise": 0.03,
    },
}
FIGURES = ("dice/membrane", "dice/cell", "v_rand", "v_info")
FIELDS = ("augmentation", "images", "seed", *FIGURES, "loss", "seconds")


class Some(Wrapper):
    """A few examples of a source."""

    def __init__(self, source: Source, numbers: Sequence[int]) -> None:
        super().__init__(source)
        self.numbers = list(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int, /) -> Any:
        return self.source[self.numbers[i]]

    def name(self, i: int, /) -> str:
        return self.source.name(self.numbers[i])

    def size(self, i: int, /) -> tuple[int, ...]:
        return self.source.size(self.numbers[i])


def config(root: str, kind: str, *, steps: int) -> dict[str, Any]:
    """The run: a U-Net of 120 thousand parameters, the same for all."""
    return {
        "seed": 0,
        "task": "classes",
        "data": {
            "source": "volumes",
            "root": root,
            "train": "all[:20]",
            "evaluation": "all[20:30]",
            "normalisation": "range",
            "volumes": {"slices": True, "label_names": ("membrane", "cell")},
        },
        "augment": AUGMENTATIONS[kind],
        "model": {"name": "unet", "features": (8, 16, 32, 64)},
        "loss": {"cross_entropy": 1.0, "dice": 1.0},
        "optim": {
            "name": "adamw",
            "learning_rate": 3e-3,
            "schedule": "cosine",
            "warmup_steps": 20,
            "weight_decay": 1e-4,
            "clip": 1.0,
            "freeze": (),
        },
        "plateau": {"monitor": "loss", "factor": 0.5, "patience": 10},
        "train": {
            "steps": steps,
            "batch_size": 4,
            "accumulate": 1,
            "crop": (160, 160),
            "ema": 0.98,
            "eval_batch_size": 1,
            "threshold": 0.5,
            "monitor": "dice",
            "patience": 0,
        },
    }


def trained(wired: run.Run, numbers: Sequence[int], seed: int) -> tuple[Any, float]:
    """Trains on some of the training slices: the state, and the last loss."""
    source = Some(wired.dataset.train, numbers)
    data = dataclasses.replace(wired.dataset, train=source)
    config = {**wired.config, "seed": seed}
    wired = dataclasses.replace(wired, dataset=data, config=config)
    key = jax.random.split(jax.random.key(seed))[0]
    # The compiled start is of seed 0; another seed's parameters are drawn anew.
    state = dataclasses.replace(_start(wired, seed), key=key)
    batches = wired.train_batches(0)
    stats: dict[str, Any] = {}
    for _ in range(wired.config["train"]["steps"]):
        batch = sharding.place(next(batches), wired.mesh)
        state, stats = wired.train_step(state, batch)
    return state, float(stats["loss"] / stats["count"])


def counted(
    wired: run.Run, state: Any, *, tta: str = "none"
) -> dict[str, tuple[np.ndarray[Any, Any], measures.Measure]]:
    """The rows of the held-out slices, of pixels and of ISBI 2012."""
    predictor = Predictor.from_model(wired.model, state.variables, wired.meta, tta=tta)
    setting = measures.Setting(
        predictor=predictor, task="classes", label_names=wired.meta.label_names
    )
    return measures.rows(("pixels", "isbi2012"), setting, wired.dataset.evaluation).of


def measured(wired: run.Run, count: int, seed: int) -> dict[str, float]:
    """Trains on ``count`` slices drawn by the seed; figures of the held-out ones."""
    total = len(wired.dataset.train)
    numbers = np.random.default_rng(seed).permutation(total)[:count]
    begin = time.perf_counter()
    state, loss = trained(wired, numbers.tolist(), seed)
    seconds = time.perf_counter() - begin
    figures: dict[str, float] = {}
    for rows, kind in counted(wired, state).values():
        figures |= kind.summarise(rows)
    return {k: figures[k] for k in FIGURES} | {"loss": loss, "seconds": seconds}


def _start(wired: run.Run, seed: int) -> Any:
    from unet_jax import optim
    from unet_jax.training import init_state

    train = wired.config["train"]
    tx, _ = optim.build(total_steps=train["steps"], **wired.config["optim"])
    shape = (1, *train["crop"], wired.dataset.channels)
    state = init_state(wired.model, tx, seed=seed, image_shape=shape, ema=True)
    return jax.device_put(state, sharding.replicated(wired.mesh))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    plain = ("augmentation", "images", "seed")
    return [
        {k: v if k == "augmentation" else (int if k in plain else float)(v)
         for k, v in row.items()}
        for row in rows
    ]  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean and range over seeds of every figure, as Markdown."""
    lines = ["| images | augmentation | Dice of membranes | Dice of cells | V_Rand |"]
    lines[0] += " V_Info |"
    lines.append("|---|---|---|---|---|---|")
    for count in sorted({row["images"] for row in rows}):
        for kind in AUGMENTATIONS:
            some = [
                r for r in rows if (r["images"], r["augmentation"]) == (count, kind)
            ]
            if not some:
                continue
            cells = []
            for key in FIGURES:
                values = [row[key] for row in some]
                cells.append(
                    f"{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"
                )
            lines.append(f"| {count} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Dice of membranes and V_Rand against images, a point a seed, a line the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    colours = {"random crops only": "#d55e00", "augmented": "#0072b2"}
    titles = (("dice/membrane", "Dice of membranes"), ("v_rand", "V_Rand (thinned)"))
    for axis, (key, title) in zip(axes, titles, strict=True):
        for kind, colour in colours.items():
            some = [row for row in rows if row["augmentation"] == kind]
            counts = sorted({row["images"] for row in some})
            means = [
                np.mean([row[key] for row in some if row["images"] == n])
                for n in counts
            ]
            axis.plot(counts, means, color=colour, label=kind)
            places = [row["images"] for row in some]
            axis.scatter(places, [row[key] for row in some], color=colour, s=12)
        axis.set_xscale("log")
        axis.set_xticks(COUNTS, [str(n) for n in COUNTS])
        axis.minorticks_off()
        axis.set_xlabel("training images")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Trains what is not there yet and writes table and plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", required=True)
    parser.add_argument("--out", default="runs/few_images", type=Path)
    parser.add_argument("--seeds", default=3, type=int)
    parser.add_argument("--steps", default=400, type=int)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "few_images.csv"
    rows = read(path)
    done = {(r["augmentation"], r["images"], r["seed"]) for r in rows}
    mesh = sharding.make_mesh(data=1)
    runs = {
        kind: run.build(config(arguments.root, kind, steps=arguments.steps), mesh)
        for kind in AUGMENTATIONS
    }
    for seed in range(arguments.seeds):
        for count in COUNTS:
            for kind, wired in runs.items():
                if (kind, count, seed) in done:
                    continue
                figures = measured(wired, count, seed)
                row = {"augmentation": kind, "images": count, "seed": seed} | figures
                rows.append(row)
                with path.open("a", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS)
                    if file.tell() == 0:
                        writer.writeheader()
                    writer.writerow(row)
                line = ", ".join(f"{k} {v:.4f}" for k, v in figures.items())
                print(f"{count} image(s), {kind}, seed {seed}: {line}", flush=True)
    (arguments.out / "few_images.md").write_text(table(rows) + "\n")
    plot(rows, arguments.out / "few_images.png")
    print(table(rows))


if __name__ == "__main__":
    main()
