"""UNet++ cut off at each level: the table, the smaller workdir, the refusals."""

import chex
import jax
import numpy as np
import pytest

import train
from configs import default
from unet_jax import checkpoint, cli, models
from unet_jax.predict import Predictor
from unet_jax.types import InputError


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    config = default.get_config()
    for key, value in {
        "data.cells.size": (20, 24),
        "data.cells.examples": 4,
        "model.name": "unetpp",
        "model.features": (2, 3, 4),
        "train.steps": 2,
        "train.crop": (16, 16),
        "train.batch_size": 2,
        "train.eval_batch_size": 2,
        "optim.warmup_steps": 0,
        "mesh.data": 1,
    }.items():
        with config.unlocked():
            config.update_from_flattened_dict({key: value})
    folder = tmp_path_factory.mktemp("unetpp")
    train.train_and_evaluate(train.chosen(config), folder)
    return folder


def test_the_table_and_the_smaller_net(workdir, tmp_path, capsys):
    out = tmp_path / "small"
    arguments = [f"--workdir={workdir}", "--repeats=2", "--level=1", f"--out={out}"]
    assert cli.main(["prune", *arguments]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if " G " in line]
    assert [row[0] for row in rows] == ["1", "2", "all"]
    counts = [int(row[-8].replace(",", "")) for row in rows]
    assert counts[0] < counts[1] < counts[2]
    # The smaller workdir holds what its own head needs, and predicts as that head does.
    model, variables, _, step = checkpoint.load_for_inference(out)
    assert (model.level, step) == (1, 2)
    assert counts[0] == sum(x.size for x in jax.tree.leaves(variables["params"]))
    whole, all_variables, _, _ = checkpoint.load_for_inference(workdir)
    image = np.random.default_rng(0).integers(0, 256, (1, 20, 24, 1)).astype(np.float32)
    head = whole.apply(all_variables, image)[1]["heads"][0]
    chex.assert_trees_all_close(model.apply(variables, image)[0], head, atol=1e-4)
    label, _ = Predictor(out)(image[0, ..., 0].astype(np.uint8))
    assert label.shape == (20, 24)
    # And its evaluation is the table's.
    assert cli.main(["evaluate", f"--workdir={out}"]) == 0
    evaluated = capsys.readouterr().out
    assert f"{float(rows[0][-2]):.4f}" in evaluated
    # Training does not go on there, and nothing is written over.
    assert cli.main(["prune", *arguments]) == 2
    assert "already holds checkpoints" in capsys.readouterr().err


def test_what_cannot_be_pruned_is_one_sentence(workdir, tmp_path, capsys):
    for arguments, says in [
        (["--level=1"], "go together"),
        (["--level=3", f"--out={tmp_path / 'x'}"], "use one of 1, 2"),
    ]:
        assert cli.main(["prune", f"--workdir={workdir}", *arguments]) == 2
        assert says in capsys.readouterr().err
    from unet_jax import pruning

    for fields, says in [
        ({"decoder": "unetpp"}, "has a head at every level"),
        ({"decoder": "unetpp", "deep_supervision": True, "level": 1}, "already cut"),
        ({}, "configs/unetpp.py"),
    ]:
        model = models.UNet(num_classes=2, features=(2, 2, 2), **fields)
        with pytest.raises(InputError, match=says):
            pruning.check(model, "runs/a")


def test_a_pruned_workdir_does_not_train_on(workdir, tmp_path):
    out = tmp_path / "small"
    level = ["--level=2", f"--out={out}", "--repeats=1"]
    assert cli.main(["prune", f"--workdir={workdir}", *level]) == 0
    with (
        checkpoint.Checkpoints(out) as checkpoints,
        pytest.raises(InputError, match="to predict with"),
    ):
        checkpoints.restore(2, like=checkpoint.TrainState(*[None] * 7))
