"""Checkpoints: exact, complete, the best and the latest kept, refusals."""

import shutil

import chex
import jax
import numpy as np
import pytest

from unet_jax import checkpoint, models, optim, training
from unet_jax.checkpoint import Checkpoints, Meta
from unet_jax.types import InputError

MODEL = models.UNet(num_classes=2, features=(2, 4))
META = Meta(
    model={"name": "unet", **models.fields(MODEL)},
    task="classes",
    label_names=("background", "cell"),
    normalisation={"kind": "range", "shift": (0.0,), "scale": (1.0,)},
    channels=1,
    rank=2,
)


def _state(seed=0, ema=True, step=0):
    tx, _ = optim.build(total_steps=10)
    state = training.init_state(MODEL, tx, seed=seed, image_shape=(1, 8, 8, 1), ema=ema)
    return state.replace(step=state.step + step)


def _numbers(state):
    return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


@pytest.mark.parametrize("ema", [False, True])
def test_what_is_saved_comes_back_exactly(tmp_path, ema):
    state = _state(seed=3, ema=ema, step=7)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, META, score=0.5)
    with Checkpoints(tmp_path) as checkpoints:
        shapes = jax.eval_shape(lambda: _state(ema=ema))
        found = checkpoints.restore(7, shapes)
        assert checkpoints.read_meta(7) == META
    chex.assert_trees_all_equal(_numbers(found), _numbers(state))
    model, variables, meta, step = checkpoint.load_for_inference(tmp_path)
    assert (model, meta, step) == (MODEL, META, 7)
    chex.assert_trees_all_equal(variables, jax.device_get(state.variables))


def test_best_and_the_latest_two_are_kept(tmp_path):
    scores = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2, 5: -1e30}
    with Checkpoints(tmp_path) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(_state(step=step), META, score=score)
            checkpoints.wait()
    with Checkpoints(tmp_path) as checkpoints:  # the scores survive a restart
        assert checkpoints.latest_step() == 5
        assert checkpoints.best_step() == 2
        checkpoints.save(_state(step=6), META, score=0.1)
        checkpoints.wait()
    kept = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"2", "5", "6"}
    assert checkpoint.load_for_inference(tmp_path, which="latest")[3] == 6


def test_a_half_written_checkpoint_is_not_there(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(_state(step=1), META, score=0.1)
    done = tmp_path / "checkpoints" / "1"
    shutil.copytree(done, done.with_name("2.orbax-checkpoint-tmp-0"))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(_state(step=1), META, score=0.1)
        checkpoints.wait()
        usage = shutil.disk_usage(tmp_path)._replace(free=10)
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(InputError, match="goes on from step 1"):
            checkpoints.save(_state(step=2), META, score=0.2)
        monkeypatch.undo()

        def fail(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(InputError, match=r"full.*goes on from step 1"):
            checkpoints.save(_state(step=2), META, score=0.2)
        assert checkpoints.latest_step() == 1


def test_an_empty_workdir_and_another_model_are_refused(tmp_path):
    with pytest.raises(InputError, match="no checkpoint in"):
        checkpoint.load_for_inference(tmp_path)
    other = models.UNet(num_classes=2, features=(2, 8))
    meta = Meta.from_json(
        {**META.to_json(), "model": {"name": "unet", **models.fields(other)}}
    )
    with pytest.raises(InputError, match=r"model\.features = \[2, 4\].*--workdir"):
        checkpoint.check_same_run(META, meta, "runs/a")
    checkpoint.check_same_run(META, Meta.from_json(META.to_json()), "runs/a")


def test_meta_is_hashable_where_the_model_needs_it():
    meta = Meta.from_json(META.to_json())
    assert meta == META
    assert hash(meta.build_model()) == hash(MODEL)
    assert np.dtype(meta.build_model().dtype) == np.float32


def test_a_reader_does_not_sweep_away_what_a_run_is_writing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(_state(step=1), META, score=0.1)
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    half.mkdir()
    assert checkpoint.load_for_inference(tmp_path)[3] == 1
    assert half.exists()


def test_a_checkpoint_of_format_1_is_still_read():
    old = META.to_json()
    old["format"] = 1
    old["model"] = {
        "name": "unet",
        "num_classes": 2,
        "features": [2, 4],
        "up": "bilinear",
        "align_corners": True,
    }
    meta = Meta.from_json(old)
    model = MODEL.clone(up="bilinear_aligned")
    assert meta.build_model() == model
    # A run goes on although the net has more fields now than were written down then.
    now = Meta.from_json(
        {**META.to_json(), "model": {"name": "unet", **models.fields(model)}}
    )
    assert checkpoint.check_same_run(meta, now, "runs/a") == []
    with pytest.raises(InputError, match=r"model\.up"):
        checkpoint.check_same_run(meta, META, "runs/a")
