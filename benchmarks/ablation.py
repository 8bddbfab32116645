"""What border weights, elastic deformation and test-time augmentation each bring.

    python -m benchmarks.ablation --root=DIR

DIR holds ISBI 2012's ``train-volume.tif`` and ``train-labels.tif``. The small U-Net of
`benchmarks.few_images` is trained on slices 0-19 with and without border weights, with
and without elastic deformation (all other augmentation stays), for some seeds, and
measured on slices 20-29 with and without the mean over the 8 symmetries. The rows of
every slice are kept in ``ablation.json`` as soon as they are there; runs that are there
already are not trained again. The table has the means over seeds, and the differences
with their 95 % intervals over slices, all seeds of a slice drawn together.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import few_images
from unet_jax import bootstrap, metrics, partition, run, sharding

FIGURES = ("dice/membrane", "v_rand", "v_info")
TITLES = ("Dice of membranes", "V_Rand", "V_Info")
NAMES = ("membrane", "cell")


def config(root: str, *, border: bool, elastic: bool, steps: int) -> dict[str, Any]:
    """`few_images.config`, augmented, with the parts that are asked for."""
    made = few_images.config(root, "augmented", steps=steps)
    made["augment"] = dict(made["augment"])
    if not elastic:
        del made["augment"]["elastic"]
    if border:
        made["data"] = {**made["data"], "border": {"w0": 10.0}}
    return made


def summarise(rows: np.ndarray[Any, Any]) -> dict[str, float]:
    """Figures from ``[slices, seeds, 4 + 11 * 12]``: the mean of the seeds' own."""
    figures: dict[str, list[float]] = {}
    for seed in range(rows.shape[1]):
        tables = rows[:, seed, :4].reshape(-1, 2, 2).astype(np.int64)
        found = metrics.summarise(tables, task="classes", label_names=NAMES)
        found |= partition.isbi2012(rows[:, seed, 4:].reshape(-1, 11, 12))
        for key in FIGURES:
            figures.setdefault(key, []).append(found[key])
    return {key: float(np.mean(values)) for key, values in figures.items()}


def stacked(
    known: dict[str, Any], *, border: bool, elastic: bool, tta: bool, seeds: int
) -> np.ndarray[Any, Any]:
    """``[slices, seeds, ...]`` of one kind of run."""
    name = _name(border, elastic)
    view = "symmetries" if tta else "none"
    rows = [known[f"{name}, seed {seed}"][view] for seed in range(seeds)]
    return np.stack([np.asarray(r, np.float64) for r in rows], axis=1)


def _name(border: bool, elastic: bool) -> str:
    words = [word for word, on in (("border", border), ("elastic", elastic)) if on]
    return " + ".join(words) or "neither"


def table(known: dict[str, Any], seeds: int) -> str:
    """The page: means of every kind, then what each part brings."""
    head = " | ".join(TITLES)
    lines = [f"| border weights | elastic | symmetries | {head} |", "|---" * 6 + "|"]
    for border in (False, True):
        for elastic in (False, True):
            for tta in (False, True):
                rows = stacked(
                    known, border=border, elastic=elastic, tta=tta, seeds=seeds
                )
                found = summarise(rows)
                marks = ["yes" if x else "no" for x in (border, elastic, tta)]
                cells = [f"{found[key]:.3f}" for key in FIGURES]
                lines.append(f"| {' | '.join(marks + cells)} |")
    lines += ["", f"| what it brings | {head} |", "|---" * 4 + "|"]
    full = {"border": True, "elastic": True, "tta": False}
    pairs = (
        ("border weights", full | {"border": False}, full),
        ("elastic deformation", full | {"elastic": False}, full),
        ("elastic deformation, without border weights",
         {"border": False, "elastic": False, "tta": False}, full | {"border": False}),
        ("the mean over 8 symmetries", full, full | {"tta": True}),
    )  # fmt: skip
    for what, without, with_it in pairs:
        gains = bootstrap.differences(
            stacked(known, **without, seeds=seeds),
            stacked(known, **with_it, seeds=seeds),
            summarise,
        )
        cells = [
            f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
            for gain in (gains[key] for key in FIGURES)
        ]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is not there yet and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", required=True)
    parser.add_argument("--out", default="runs/ablation", type=Path)
    parser.add_argument("--seeds", default=3, type=int)
    parser.add_argument("--steps", default=400, type=int)
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "ablation.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    mesh = sharding.make_mesh(data=1)
    kinds = [(b, e) for b in (False, True) for e in (False, True)]
    options = {"steps": arguments.steps}
    runs = {
        (b, e): run.build(config(arguments.root, border=b, elastic=e, **options), mesh)
        for b, e in kinds
    }
    for seed in range(arguments.seeds):
        for kind, wired in runs.items():
            name = f"{_name(*kind)}, seed {seed}"
            if name in known:
                continue
            numbers = range(len(wired.dataset.train))
            state, loss = few_images.trained(wired, list(numbers), seed)
            known[name] = {}
            for view in ("none", "symmetries"):
                found = few_images.counted(wired, state, tta=view)
                flat = [rows.reshape(len(rows), -1) for rows, _ in found.values()]
                known[name][view] = np.concatenate(flat, axis=1).tolist()
            path.write_text(json.dumps(known))
            figures = summarise(np.asarray(known[name]["none"])[:, None])
            text = ", ".join(f"{k} {v:.4f}" for k, v in figures.items())
            print(f"{name}: loss {loss:.4f}, {text}", flush=True)
    (arguments.out / "ablation.md").write_text(table(known, arguments.seeds) + "\n")
    print(table(known, arguments.seeds))


if __name__ == "__main__":
    main()
