"""Evaluation: the step that counts, the sum over a data set, and what follows from it.

Every example counts once, whole, and everything is divided once at the end.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from unet_jax import metrics, sharding
from unet_jax.layers import crop
from unet_jax.models import UNet
from unet_jax.normalisation import Stats, normalise
from unet_jax.training import any_weight, fit, trim
from unet_jax.types import Batch, LossFn, NumpyArray, PyTree, Task, choose


def make_eval_step(
    model: UNet,
    loss_fn: LossFn,
    *,
    task: Task,
    stats: Stats,
    threshold: float = 0.5,
) -> Callable[[PyTree, Batch], dict[str, Any]]:
    """The evaluation step.

    Args:
        model: The net.
        loss_fn: ``(logits, label, weight) -> f32[B]``.
        task: ``classes`` or ``labels``.
        stats: The normalisation.
        threshold: The probability from which a label counts as predicted.

    Returns:
        ``(variables, batch) -> stats``, one row an example: ``index`` i32[B], ``loss``
        f32[B], ``counted`` f32[B] (1 where anything has weight), ``confusion``
        i32[B, ...], and ``shown``: ``image``, ``label``, ``weight`` and ``prediction``
        (i32 like the label), all of the logits' size. The host drops rows of index -1,
        adds, and divides once.
    """

    def step(variables: PyTree, batch: Batch) -> dict[str, Any]:
        cut = trim(model, batch)
        image = normalise(cut["image"], stats)
        logits, _ = model.apply(sharding.gather(variables), image, train=False)
        label, weight = fit({**cut, "label": cut["label"].astype(np.int32)}, logits)
        counts = metrics.confusion(
            logits, label, weight, task=task, threshold=threshold
        )
        return {
            "index": batch["index"],
            "loss": loss_fn(logits, label, weight),
            "counted": any_weight(weight),
            "confusion": counts,
            "shown": {
                "image": crop(cut["image"], logits.shape[1:-1]),
                "label": label,
                "weight": weight,
                "prediction": metrics.decide(logits, task=task, threshold=threshold),
            },
        }

    return step


def jit_eval_step(
    step: Callable[[PyTree, Any], dict[str, Any]], mesh: jax.sharding.Mesh
) -> Callable[[PyTree, Any], dict[str, Any]]:
    """`make_eval_step`'s function compiled for a mesh.

    The figures are whole on every device, and what is shown stays where it is.
    """
    whole = sharding.replicated(mesh)
    figures = dict.fromkeys(("index", "loss", "counted", "confusion"), whole)
    return jax.jit(
        sharding.within(mesh, step), out_shardings={**figures, "shown": None}
    )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What came out of a data set.

    Attributes:
        results: ``loss`` (mean over the examples of which anything counts) and the
            figures of `unet_jax.metrics.summarise`. A loss that pools over a batch
            (``over="batch"``) pools over the batches that are evaluated.
        index: ``i64[N]``, the examples' numbers in the data set, sorted.
        confusion: ``i64[N, ...]``, each example's counts, in the order of ``index``.
        loss: ``f64[N]``, likewise; NaN where nothing counts.
        kept: The first few examples for a picture: ``image``, ``label``, ``weight`` and
            ``prediction`` of the logits' size.
    """

    results: dict[str, float]
    index: NumpyArray
    confusion: NumpyArray
    loss: NumpyArray
    kept: list[dict[str, NumpyArray]]


def evaluate(
    eval_step: Callable[[PyTree, Any], Mapping[str, Any]],
    variables: PyTree,
    batches: Iterable[Batch],
    *,
    mesh: jax.sharding.Mesh,
    task: Task,
    label_names: Sequence[str],
    keep: int = 0,
    empty: metrics.Empty = "skip",
) -> Evaluation:
    """Evaluates every example of ``batches`` once.

    Args:
        eval_step: A jitted `make_eval_step`.
        variables: The model's, on the mesh.
        batches: Host batches (`unet_jax.data.batches.eval_batches`), this process's
            rows of them. All processes evaluate together.
        mesh: Where they are placed.
        task: ``classes`` or ``labels``.
        label_names: One a channel of the logits.
        keep: How many examples to keep for a picture.
        empty: See `unet_jax.metrics.summarise`.
    """
    index, confusion, loss, counted = [], [], [], []
    kept: list[dict[str, NumpyArray]] = []
    for batch in batches:
        out = eval_step(variables, sharding.place(batch, mesh))
        figures = {k: np.asarray(v) for k, v in out.items() if k != "shown"}
        real = figures["index"] >= 0
        index.append(figures["index"][real])
        confusion.append(figures["confusion"][real].astype(np.int64))
        loss.append(figures["loss"][real].astype(np.float64))
        counted.append(figures["counted"][real] > 0)
        rows = np.flatnonzero(real)[: keep - len(kept)]
        if len(rows):
            # The rows that are real come first; the others stay where they are.
            parts = {name: x[: len(rows)] for name, x in out["shown"].items()}
            shown = sharding.fetch(parts)
            kept += [{name: x[row] for name, x in shown.items()} for row in rows]
    order = np.argsort(np.concatenate(index), kind="stable")
    counts = np.concatenate(confusion)[order]
    some = np.concatenate(counted)[order]
    losses = np.where(some, np.concatenate(loss)[order], np.nan)
    # By what counts and not by what is NaN: the loss of a broken net must show.
    results = {"loss": float(losses[some].mean()) if some.any() else float("nan")}
    results |= metrics.summarise(
        counts, task=task, label_names=tuple(label_names), empty=empty
    )
    return Evaluation(results, np.concatenate(index)[order], counts, losses, kept)


# Of what the truth has beside it: a net that predicts less is said to have collapsed.
COLLAPSED = 0.01


def collapsed(
    confusion: NumpyArray, *, task: Task, label_names: Sequence[str]
) -> tuple[str, float] | None:
    """Whether a net predicts one thing nearly everywhere, and the truth is not so.

    Args:
        confusion: ``i64[N, K, K]`` or ``i64[N, K, 2, 2]``, see `metrics.confusion`.
        task: ``classes`` or ``labels``.
        label_names: One a channel of the logits.

    Returns:
        What it predicts, and the part of the pixels that are something else: in a
        hundred of those it finds less than one. None for a net that tells things apart,
        or where there is nothing to tell.
    """
    table = confusion.sum(0)
    if task == "labels":
        table = table.sum(0)
        label_names = ("no label", "every label")
    total = table.sum()
    main = int(table.sum(0).argmax())
    there, found = total - table.sum(1)[main], total - table.sum(0)[main]
    if not there or found >= COLLAPSED * there:
        return None
    return label_names[main], float(there / total)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What the loop has decided from evaluations so far; JSON-able, in the checkpoint.

    Attributes:
        best: The best score yet (higher is better), None before the first.
        best_step: Where it was.
        since_best: Evaluations since.
        plateau_best: The lowest watched value of reduce-on-plateau.
        plateau_since: Evaluations that have not bettered it.
        lr_scale: What the learning rate is scaled by.
        collapsed: Evaluations in a row that found the net to have `collapsed`.
        owed: Whether the evaluation of this step could not be finished.
    """

    best: float | None = None
    best_step: int = 0
    since_best: int = 0
    plateau_best: float | None = None
    plateau_since: int = 0
    lr_scale: float = 1.0
    collapsed: int = 0
    owed: bool = False

    def after(
        self,
        step: int,
        score: float,
        *,
        collapsed: bool = False,
        watched: float | None = None,
        factor: float = 0.5,
        patience: int = 10,
    ) -> "Progress":
        """The decisions after one more evaluation.

        Args:
            step: The step evaluated.
            score: Higher is better; NaN never is.
            collapsed: Whether the net predicts one thing only.
            watched: The value that reduce-on-plateau wants to see fall (the validation
                loss), or None when it is off. As in PyTorch's ReduceLROnPlateau, an
                improvement is one of 1e-4 of the value, and the rate is reduced when
                more than ``patience`` evaluations in a row brought none.
            factor: What the rate is multiplied by.
            patience: See ``watched``.
        """
        better = self.best is None or score > self.best
        new = dataclasses.replace(
            self,
            best=score if better else self.best,
            best_step=step if better else self.best_step,
            since_best=0 if better else self.since_best + 1,
            collapsed=self.collapsed + 1 if collapsed else 0,
            owed=False,
        )
        if watched is None:
            return new
        lowest = self.plateau_best
        if lowest is None or watched < lowest - 1e-4 * abs(lowest):
            return dataclasses.replace(new, plateau_best=watched, plateau_since=0)
        since = self.plateau_since + 1
        if since > patience:
            return dataclasses.replace(
                new, plateau_since=0, lr_scale=self.lr_scale * factor
            )
        return dataclasses.replace(new, plateau_since=since)


# Below every figure, yet above a checkpoint that nobody has evaluated.
WORST = -1e29


def score_of(
    results: Mapping[str, float], monitor: str, *, name: str = "train.monitor"
) -> float:
    """The value that decides which evaluation is best, higher being better.

    Args:
        results: An evaluation's figures.
        monitor: A key of ``results``; ``loss`` counts negative, NaN as `WORST`.
        name: What the sentence calls ``monitor``.

    Raises:
        InputError: No such figure.
    """
    choose(results, monitor, f"{name} =")
    value = float(results[monitor])
    if value != value:
        return WORST
    return -value if monitor == "loss" else value


def figures(task: Task, label_names: Sequence[str]) -> list[str]:
    """The names of all figures that an evaluation measures."""
    count = len(label_names)
    shape = (1, count, count) if task == "classes" else (1, count, 2, 2)
    empty = np.zeros(shape, np.int64)
    names = metrics.summarise(empty, task=task, label_names=tuple(label_names))
    return ["loss", *names]
