"""Evaluation: each example once, divided once, and the decisions that follow."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_jax import evaluation, losses, models, sharding
from unet_jax.evaluation import Progress, score_of
from unet_jax.types import InputError

STATS = {"kind": "range", "shift": (0.0,), "scale": (1 / 255,)}


def _batches(rng, count, batch_size):
    """``count`` random examples in batches, the last one filled up."""
    image = rng.integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
    label = (image[..., 0] > 100).astype(np.uint8)
    index = np.arange(count, dtype=np.int32)
    for begin in range(0, count, batch_size):
        fill = max(begin + batch_size - count, 0)
        rows = np.r_[begin : min(begin + batch_size, count), [0] * fill].astype(int)
        real = np.arange(batch_size) < batch_size - fill
        yield {
            "image": image[rows],
            "label": label[rows],
            "weight": np.broadcast_to(real[:, None, None], label[rows].shape).astype(
                np.float32
            ),
            "index": np.where(real, index[rows], -1).astype(np.int32),
        }


@pytest.mark.parametrize("task", ["classes", "labels"])
def test_the_batch_size_does_not_matter(task):
    classes = 2 if task == "classes" else 1
    model = models.UNet(num_classes=classes, features=(2, 4))
    term = "cross_entropy" if task == "classes" else "binary_cross_entropy"
    loss_fn = losses.build(task=task, **{term: 1.0})
    step = jax.jit(evaluation.make_eval_step(model, loss_fn, task=task, stats=STATS))
    variables = model.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    mesh = sharding.make_mesh(1)
    found = []
    for batch_size in (1, 2, 5):
        batches = []
        for batch in _batches(np.random.default_rng(0), 5, batch_size):
            if task == "labels":
                batch["label"] = batch["label"][..., None]
                batch["weight"] = batch["weight"][..., None]
            batches.append(batch)
        found.append(
            evaluation.evaluate(
                step,
                variables,
                batches,
                mesh=mesh,
                task=task,
                label_names=("background", "cell")[-classes:],
                keep=3,
            )
        )
    for other in found[1:]:
        np.testing.assert_array_equal(found[0].confusion, other.confusion)
        np.testing.assert_allclose(found[0].loss, other.loss, rtol=1e-5)
        assert len(other.kept) == 3
        np.testing.assert_array_equal(
            found[0].kept[1]["prediction"], other.kept[1]["prediction"]
        )
    assert found[0].index.tolist() == [0, 1, 2, 3, 4]
    if task == "classes":
        assert found[0].results["dice"] == found[0].results["dice/cell"]
    assert set(found[0].results) == set(
        evaluation.figures(task, ("background", "cell")[-classes:])
    )


def test_an_image_of_which_nothing_counts_has_no_part_in_the_loss():
    model = models.UNet(num_classes=2, features=(2, 4))
    loss_fn = losses.build(task="classes", cross_entropy=1.0)
    step = evaluation.make_eval_step(model, loss_fn, task="classes", stats=STATS)
    mesh = sharding.make_mesh(1)
    step = evaluation.jit_eval_step(step, mesh)
    variables = model.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    batch = next(_batches(np.random.default_rng(0), 2, 2))
    batch["weight"][1] = 0.0
    found = evaluation.evaluate(
        step, variables, [batch], mesh=mesh, task="classes", label_names=("a", "b")
    )
    assert np.isnan(found.loss[1])
    assert found.results["loss"] == found.loss[0] > 0
    broken = jax.tree.map(lambda leaf: leaf * np.float32("nan"), variables)
    batch["weight"][1] = 1.0
    batch["weight"][0] = 0.0
    found = evaluation.evaluate(
        step, broken, [batch], mesh=mesh, task="classes", label_names=("a", "b")
    )
    assert np.isnan(found.results["loss"])


def test_best_counts_the_evaluations_without_a_better_one():
    progress = Progress()
    for step, score in enumerate([0.2, 0.5, 0.4, float("-inf"), 0.5], start=1):
        progress = progress.after(step, score)
    assert (progress.best, progress.best_step, progress.since_best) == (0.5, 2, 3)


def test_plateau_reduces_when_torch_does():
    progress, scales = Progress(), []
    for step in range(9):
        progress = progress.after(step, 0.0, watched=1.0, factor=0.5, patience=2)
        scales.append(progress.lr_scale)
    # torch: more than `patience` bad evaluations in a row; the first is the best.
    assert scales == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    better = progress.after(10, 0.0, watched=0.9, patience=2)
    assert better.plateau_best == 0.9 and better.plateau_since == 0


def test_plateau_wants_a_real_improvement():
    progress = Progress(plateau_best=1.0)
    tiny = progress.after(1, 0.0, watched=1.0 - 5e-5, patience=5)
    assert tiny.plateau_since == 1 and tiny.plateau_best == 1.0


def test_score_is_higher_for_better():
    assert score_of({"loss": 2.0}, "loss") == -2.0
    assert score_of({"dice": 0.5}, "dice") == 0.5
    worst = score_of({"dice": float("nan")}, "dice")
    assert -1e30 < worst < -1e20
    with pytest.raises(InputError, match="dice"):
        score_of({"dice": 0.5}, "dise")


@settings(max_examples=60, deadline=None)
@given(
    evaluations=st.lists(
        st.tuples(st.floats(0, 1), st.booleans(), st.floats(0, 2)), max_size=12
    ),
    cut=st.integers(0, 12),
)
def test_decisions_do_not_depend_on_where_a_run_was_stopped(evaluations, cut):
    def decided(progress, numbers):
        for i in numbers:
            score, collapsed, loss = evaluations[i]
            progress = progress.after(
                10 * i, score, collapsed=collapsed, watched=loss, patience=2
            )
        return progress

    count = len(evaluations)
    cut = min(cut, count)
    whole = decided(Progress(), range(count))
    stopped = decided(Progress(), range(cut))
    stored = json.loads(json.dumps(dataclasses.asdict(stopped)))
    assert decided(Progress(**stored), range(cut, count)) == whole
