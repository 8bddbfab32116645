"""What folds or seeds are worth together, when they are done."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unet_jax import bootstrap, metrics
from unet_jax.books import short
from unet_jax.checkpoint import Checkpoints
from unet_jax.evaluation import Evaluation
from unet_jax.log import replace_file
from unet_jax.members.roster import Say, best_of, write_json
from unet_jax.members.team import Team, write
from unet_jax.types import NumpyArray


def conclude(team: Team, workdir: Path, *, say: Say) -> dict[str, float]:
    """What all members together say, when they are done.

    Of folds, the figures out of fold (`out_of_fold`), which are printed and written to
    ``members.json``, ``out_of_fold.json`` and ``out_of_fold.csv``.

    Returns:
        Of folds those figures, of seeds the means of the members' best ones.
    """
    if team.kind == "folds":
        return out_of_fold(team, workdir, say=say)
    found = [best_of(workdir / name)[1].results for name in team.names]
    for name, results in zip(team.names, found, strict=True):
        say(f"{name}: {short(results)}")
    say(
        f"{workdir} is an ensemble: unet-jax predict --workdir={workdir} averages its"
        f" {len(team.names)} nets"
    )
    return {key: float(np.mean([r[key] for r in found])) for key in found[0]}


def out_of_fold(team: Team, workdir: Path, *, say: Say) -> dict[str, float]:
    """Every example of the pool once, counted by the net that has not learnt from it.

    That is each member's best checkpoint, the one that ``predict`` uses. It was chosen
    on the examples that it is counted on, which makes it a little better than on new
    ones; with ``train.eval_every=0`` there is nothing to choose and the best is the
    last.

    Args:
        team: Folds, trained.
        workdir: Of all of them.
        say: Is told the table.

    Returns:
        The figures of `unet_jax.metrics.summarise` of all examples, pooled and as means
        over images, and ``loss``, the mean of theirs.
    """
    found: dict[str, tuple[int, Evaluation]] = {}
    for name, one in zip(team.names, team.runs, strict=True):
        step, _ = best_of(workdir / name)
        with Checkpoints(workdir / name, read_only=True) as checkpoints:
            state = checkpoints.restore(step, one.shapes)
        found[name] = (step, one.evaluate(state))
    meta = team.runs[0].meta
    summarise = partial(metrics.summarise, task=meta.task, label_names=meta.label_names)
    rows = np.concatenate([own.confusion[_counts(own)] for _, own in found.values()])
    loss = np.concatenate([own.loss[_counts(own)] for _, own in found.values()])
    left_out = sum(len(own.index) for _, own in found.values()) - len(rows)
    figures = summarise(rows)
    results = {"loss": float(loss.mean()) if loss.size else math.nan, **figures}
    intervals = {
        key: bootstrap.Interval(value, math.nan, math.nan)
        for key, value in figures.items()
    }
    if len(rows) > 1:
        intervals = bootstrap.intervals(rows, summarise)
    say(_table(found, results, intervals, meta.label_names))
    if left_out:
        say(f"left out, because nothing of them counts: {left_out} examples")
    _write_rows(team, workdir, found)
    folds = {
        name: {"step": step, "examples": _count(own), **_finite(own.results)}
        for name, (step, own) in found.items()
    }
    ends = {key: [_finite(end) for end in i[1:]] for key, i in intervals.items()}
    write_json(
        workdir / "out_of_fold.json",
        {
            "checkpoint": "best",
            "examples": len(rows),
            "left_out": left_out,
            "results": _finite(results),
            "intervals": ends,
            "folds": folds,
        },
    )
    write(team, workdir, _finite(results))
    return results


def _counts(one: Evaluation) -> NumpyArray:
    """``bool[N]``: the examples of which anything has weight."""
    return np.asarray(one.confusion.sum(axis=(*range(1, one.confusion.ndim),)) > 0)


def _count(one: Evaluation) -> int:
    return int(_counts(one).sum())


def _finite(value: Any) -> Any:
    """For JSON, which has no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return value if math.isfinite(value) else None


def _write_rows(
    team: Team, workdir: Path, found: Mapping[str, tuple[int, Evaluation]]
) -> None:
    """``out_of_fold.csv``: a row an example, its name, its fold and its Dice."""
    meta = team.runs[0].meta
    inner = [k for k, name in enumerate(meta.label_names) if name != "background"]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    dice = [f"dice/{name}" for name in meta.label_names]
    table.writerow(["name", "fold", "dice", *dice, "loss"])

    def cell(value: float) -> str:
        return "" if math.isnan(value) else f"{value:.9g}"

    for one, (fold, (_, own)) in zip(team.runs, found.items(), strict=True):
        scores = metrics.per_image(
            own.confusion, task=meta.task, label_names=meta.label_names
        )
        for i, row, loss in zip(own.index.tolist(), scores, own.loss, strict=True):
            some = [row[k] for k in inner if not math.isnan(row[k])]
            mean = sum(some) / len(some) if some else math.nan
            cells = [cell(value) for value in (mean, *row.tolist(), loss)]
            table.writerow([one.dataset.evaluation.name(i), fold, *cells])
    replace_file(workdir / "out_of_fold.csv", text.getvalue().encode())


def _table(
    found: Mapping[str, tuple[int, Evaluation]],
    results: Mapping[str, float],
    intervals: Mapping[str, bootstrap.Interval],
    label_names: Sequence[str],
) -> str:
    """The folds, a row each, then the figures of all with their intervals."""
    wide = max(map(len, found))
    count = sum(_count(own) for _, own in found.values())
    lines = [
        f"out of fold: {count} examples, each counted by the net that has not learnt"
        " from it, at its best step",
        f"{'':<{wide}}{'step':>8}{'examples':>10}{'dice':>9}{'image_dice':>12}",
    ]
    for name, (step, own) in found.items():
        dice, mean = (own.results[key] for key in ("dice", "image_dice"))
        lines.append(f"{name:<{wide}}{step:>8}{_count(own):>10}{dice:9.4f}{mean:12.4f}")
    keys = []
    for key in ("dice", "iou", "image_dice", "image_iou"):
        named = [f"{key}/{name}" for name in label_names if name != "background"]
        keys += [key, *(named if len(named) > 1 else [])]
    wide = max(map(len, keys))
    for key in keys:
        _, low, high = intervals[key]
        lines.append(f"{key:<{wide}}  {results[key]:.4f}  [{low:.4f}, {high:.4f}]")
    lines.append(
        "[]: 95 % of 1000 samples of the images; what other seeds would change is not"
        " in it"
    )
    return "\n".join(lines)
