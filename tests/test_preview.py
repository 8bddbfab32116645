"""The picture of what augmentation makes of the data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import cli, losses, optim, preview, run, sharding, training
from unet_jax.types import InputError

CONFIG = {
    "seed": 3,
    "task": "classes",
    "data": {
        "source": "cells",
        "train": "train",
        "evaluation": "val",
        "normalisation": "range",
        "cells": {"size": (48, 48), "examples": 4},
    },
    "augment": {"flip": True, "elastic": 4.0, "rotate": 20.0, "noise": 0.1},
    "model": {"name": "unet", "features": (4, 8)},
    "loss": {"cross_entropy": 1.0},
    "optim": {"name": "adam", "learning_rate": 1e-3, "freeze": ()},
    "plateau": {"monitor": "loss", "factor": 0.5, "patience": 3},
    "train": {
        "steps": 2, "batch_size": 2, "accumulate": 1, "crop": (32, 32), "ema": 0.0,
        "eval_batch_size": 2, "threshold": 0.5, "monitor": "dice", "patience": 0,
    },
}  # fmt: skip


def wired(**changes):
    config = {**CONFIG, **changes}
    return run.build(config, sharding.make_mesh(data=1))


def test_a_row_an_example_and_a_column_a_draw():
    small = preview.picture(wired(), examples=1, draws=1)
    wide = preview.picture(wired(), examples=1, draws=3)
    tall = preview.picture(wired(), examples=3, draws=1)
    assert small.dtype == np.uint8
    panel = 256 + 8
    assert wide.shape[1] - small.shape[1] == 2 * panel
    assert (tall.shape[0] - small.shape[0]) % 2 == 0
    assert tall.shape[0] - small.shape[0] >= 2 * panel
    # The first row does not depend on what is below it or to the right.
    np.testing.assert_array_equal(small[:200, : 2 * panel], tall[:200, : 2 * panel])
    np.testing.assert_array_equal(small[:200, : 2 * panel], wide[:200, : 2 * panel])


def test_weights_that_differ_get_a_row_of_their_own(monkeypatch):
    plain = preview.picture(wired(), examples=1, draws=1)
    wire = wired()
    batch = next(wire.train_batches(0))
    batch["weight"][:, :8] = 5.0
    monkeypatch.setattr(run.Run, "train_batches", lambda self, start: iter([batch]))
    weighted = preview.picture(wire, examples=1, draws=1)
    assert weighted.shape[0] > 1.8 * plain.shape[0]
    np.testing.assert_array_equal(weighted[:250], plain[:250])


def test_the_keys_are_those_of_the_training_step():
    """What the preview draws for a step is what that step learns from."""
    wire, tx = wired(), optim.build(name="sgd", learning_rate=0.1, total_steps=2)[0]
    seen = []

    def spy(key, example):
        jax.debug.callback(lambda k: seen.append(k.tolist()), jax.random.key_data(key))
        return example

    loss_fn = losses.build(task="classes", cross_entropy=1.0)
    step = training.make_train_step(
        wire.model, tx, loss_fn, spy, stats=wire.meta.normalisation
    )
    state = training.init_state(
        wire.model, tx, seed=CONFIG["seed"], image_shape=(2, 32, 32, 1)
    )
    key = jax.random.split(jax.random.key(CONFIG["seed"]))[0]
    batches = wire.train_batches(0)
    for number in range(2):
        batch = next(batches)
        state, _ = jax.jit(step)(state, batch)
        jax.effects_barrier()
        keys = training.augment_keys(key, number, jnp.asarray(batch["index"]))
        want = jax.random.key_data(keys).tolist()
        assert sorted(seen) == sorted(want)
        seen.clear()


def test_volumes_and_labels(capsys):
    data = {**CONFIG["data"], "cells": {"rank": 3, "size": (16, 32, 32), "examples": 2}}
    train = {**CONFIG["train"], "crop": (16, 32, 32)}
    volumes = wired(data=data, train=train, task="labels", loss={"dice": 1.0})
    picture = preview.picture(volumes, examples=1, draws=1)
    assert picture.ndim == 3
    assert picture.std() > 10


def test_nothing_to_draw_is_refused():
    with pytest.raises(InputError, match="examples = 0"):
        preview.picture(wired(), examples=0)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "a.png"
    small = ["--config.data.cells.size=(48,48)", "--config.train.crop=(32,32)"]
    small += ["--config.data.cells.examples=4", "--config.model.features=(4,8)"]
    status = cli.main(
        ["augment", "--config=configs/default.py", f"--out={out}", "--examples=1",
         "--draws=1", *small]
    )  # fmt: skip
    assert status == 0
    assert out.is_file()
    assert "1 crops, 1 draws each" in capsys.readouterr().out
    assert cli.main(["augment", "--config=configs/default.py", "--out=a.bmp"]) == 2
    assert "must be a .png" in capsys.readouterr().err
