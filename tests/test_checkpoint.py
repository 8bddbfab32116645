"""Checkpoints: exact, complete, the best and the latest kept, refusals."""

import contextlib
import dataclasses
import errno
import os
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from unet_jax import checkpoint, integrity, log, models, optim, training
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


def test_a_step_is_left_as_it_is_unless_it_is_to_be_replaced(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step, score in ((1, 0.5), (2, -1e30)):
            checkpoints.save(_state(step=step), META, score=score)
        checkpoints.save(_state(seed=1, step=2), META, score=0.9)
        checkpoints.wait()
        assert checkpoints.best_step() == 1
    assert integrity.score_of(tmp_path, 2) == -1e30


@pytest.mark.parametrize("under_way", [False, True])
def test_what_is_saved_again_replaces_what_was_there(tmp_path, under_way):
    progress, results = {"best": 0.9, "best_step": 2}, {"dice": 0.9}
    new = dataclasses.replace(META, progress=progress, results=results)
    state = _state(seed=1, step=2)
    with Checkpoints(tmp_path) as checkpoints:
        for step, score in ((1, 0.5), (2, -1e30)):
            checkpoints.save(_state(step=step), META, score=score)
        if not under_way:
            checkpoints.wait()
            assert checkpoints.best_step() == 1
        checkpoints.save(state, new, score=0.9, again=True)
        assert checkpoints.read_meta(2) == new
        assert checkpoints.best_step() == checkpoints.latest_step() == 2
        assert checkpoints.steps() == [1, 2]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}
    assert integrity.score_of(tmp_path, 2) == 0.9
    assert integrity.sums_of(tmp_path, 2) is not None
    assert integrity.damage(tmp_path, 2) is None
    _, variables, meta, step = checkpoint.load_for_inference(tmp_path)
    assert (meta, step) == (new, 2)
    chex.assert_trees_all_equal(variables, jax.device_get(state.variables))
    with Checkpoints(tmp_path, say=pytest.fail) as checkpoints:
        found = checkpoints.restore(2, jax.eval_shape(_state))
        chex.assert_trees_all_equal(_numbers(found), _numbers(state))
        for step in (3, 4):
            checkpoints.save(_state(step=step), META, score=0.1)
    assert integrity.steps_in(tmp_path) == [2, 3, 4]  # the best is kept


def test_saving_again_what_is_not_there_is_saving(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(_state(step=1), META, score=0.5, again=True)
    assert integrity.score_of(tmp_path, 1) == 0.5


class Killed(BaseException):
    """The process is gone."""


MOVES = [
    (Path, "rename"),
    (Path, "unlink"),
    (shutil, "rmtree"),
    (integrity, "replace_file"),
]


def _moves(monkeypatch, last):
    """What is moved, written and removed from here on; a kill comes before `last`."""
    made = []

    def counted(real):
        def move(path, *args, **kwargs):
            made.append(path)
            if len(made) > last:
                raise Killed
            return real(path, *args, **kwargs)

        return move

    for owner, name in MOVES:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return made


@pytest.mark.parametrize("only", [True, False])
def test_a_kill_while_one_is_replaced_costs_nothing(tmp_path, monkeypatch, only):
    made, steps = tmp_path / "made", [2] if only else [1, 2]
    new = dataclasses.replace(META, progress={"best": 0.9})
    with Checkpoints(made) as checkpoints:
        for step in steps:
            checkpoints.save(_state(step=step), META, score=0.1)
        monkeypatch.setattr(integrity, "replace", lambda *_: None)
        checkpoints.save(_state(step=2), new, score=0.9, again=True)
        monkeypatch.undo()
    assert (made / "checkpoints" / "again").is_dir()
    scores = []
    for last in range(10):
        workdir = shutil.copytree(made, tmp_path / str(last))
        with monkeypatch.context() as patch:
            moves = _moves(patch, last)
            with contextlib.suppress(Killed):
                integrity.replace(workdir, 2)
        stored = checkpoint.stored_meta(workdir)
        assert stored in (META, new)
        assert checkpoint.load_for_inference(workdir, which="latest")[2] in (META, new)
        with Checkpoints(workdir, say=pytest.fail) as checkpoints:
            assert checkpoints.steps() == steps
            scores.append(integrity.score_of(workdir, 2))
            found = checkpoints.read_meta(2)
            assert found == (new if scores[-1] == 0.9 else META)
            # The old one has been moved, the new one not yet: that before it is read.
            assert found == stored or (not only and last in (1, 2))
        assert integrity.sums_of(workdir, 2) is not None
        assert integrity.damage(workdir, 2) is None
        names = {path.name for path in (workdir / "checkpoints").iterdir()}
        assert names == set(map(str, steps))
        if len(moves) <= last:
            break
    assert scores == [0.1] + [0.9] * 6


def test_a_kill_while_one_is_saved_again_costs_nothing(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(_state(step=1), META, score=0.1)
        checkpoints.wait()
        with monkeypatch.context() as patch:
            moves = _moves(patch, 1)
            with pytest.raises(Killed):
                checkpoints.save(_state(step=1), META, score=0.9, again=True)
        assert moves[-1].name == "1.json"
    with Checkpoints(tmp_path, say=pytest.fail) as checkpoints:
        assert checkpoints.latest_step() == 1
        assert integrity.score_of(tmp_path, 1) == 0.1
        checkpoints.save(_state(step=1), META, score=0.9, again=True)
    assert integrity.score_of(tmp_path, 1) == 0.9


def test_a_full_disk_leaves_what_was_to_be_replaced(tmp_path, monkeypatch):
    def full(number):
        def write_bytes(path, content):
            raise OSError(number, os.strerror(number), str(path))

        return write_bytes

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(_state(step=1), META, score=0.1)
        checkpoints.wait()
        for number in (errno.ENOSPC, errno.EFBIG):
            with monkeypatch.context() as patch:
                patch.setattr(log.Path, "write_bytes", full(number))
                with pytest.raises(InputError, match=r"full.*goes on from"):
                    checkpoints.save(_state(step=1), META, score=0.9, again=True)
        assert checkpoints.best_step() == checkpoints.latest_step() == 1
    assert integrity.score_of(tmp_path, 1) == 0.1
    with Checkpoints(tmp_path, say=pytest.fail) as checkpoints:
        checkpoints.save(_state(step=1), META, score=0.9, again=True)
    assert integrity.score_of(tmp_path, 1) == 0.9
