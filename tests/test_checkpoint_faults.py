"""Damaged checkpoints: a run goes on from the newest whole one, and nothing is lost."""

import dataclasses
import json
import logging
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.reliability.faults import (
    FAULTS,
    KINDS,
    ON_FILES,
    delete,
    empty,
    flip,
    largest,
    sums,
)
from unet_jax import checkpoint, integrity, models, optim, training
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
SCORES = {100: 0.9, 200: 0.1, 300: 0.2}


@pytest.fixture(scope="module")
def state():
    tx, _ = optim.build(total_steps=10)
    shapes = jax.eval_shape(
        lambda: training.init_state(
            MODEL, tx, seed=0, image_shape=(1, 8, 8, 1), ema=True
        )
    )
    rng = np.random.default_rng(0)

    def filled(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(3)
        return jnp.asarray(rng.normal(size=x.shape) * 9, x.dtype)

    return jax.tree.map(filled, shapes)


def _at(state, step):
    return state.replace(step=state.step * 0 + step)


@pytest.fixture(scope="module")
def made(tmp_path_factory, state):
    workdir = tmp_path_factory.mktemp("made") / "run"
    with Checkpoints(workdir) as checkpoints:
        for step, score in SCORES.items():
            checkpoints.save(_at(state, step), META, score=score)
    return workdir


@pytest.fixture
def workdir(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def _files(folder):
    found = {}
    for at, folders, names in os.walk(folder):
        # Orbax sweeps them away in the background.
        folders[:] = [name for name in folders if "orbax-checkpoint-tmp" not in name]
        for path in (Path(at, name) for name in names):
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def _restored(checkpoints, step, state):
    found = checkpoints.restore(step, jax.eval_shape(lambda: state))
    both = (
        x.replace(key=jax.random.key_data(x.key)) for x in (found, _at(state, step))
    )
    chex.assert_trees_all_equal(*map(jax.device_get, both))


# Of what befalls one file a part, for the time it takes.
SOME = [*FAULTS[:ON_FILES:4], *FAULTS[ON_FILES:]]


@pytest.mark.parametrize("fault", SOME, ids=lambda fault: fault.name)
def test_a_run_goes_on_from_the_newest_whole_one(workdir, fault):
    newest = workdir / "checkpoints" / "300"
    whole = _files(workdir)
    fault.inflict(newest)
    left = _files(workdir)
    said = []
    good = (300, 200, 100)[fault.lost]
    with Checkpoints(workdir, say=said.append) as checkpoints:
        assert checkpoints.latest_step() == good
        assert checkpoints.read_meta(good) == META
        assert checkpoints.best_step() == 100
        assert checkpoints.steps() == [n for n in (*SCORES, 400) if n <= good]
    # What is whole is where it was, and every byte that was left is somewhere.
    now = _files(workdir)
    kept = {k: v for k, v in whole.items() if k.startswith("checkpoints/")}
    kept = {k: v for k, v in kept.items() if int(k.split("/")[1]) <= good}
    assert kept.items() <= now.items()
    contents = set(now.values())
    lost = {name for name, content in left.items() if content not in contents}
    assert all(name.startswith("sums/") for name in lost)
    moved = (workdir / "damaged").exists()
    assert moved == bool(said)
    for line in said:
        assert f"going on from step {good}; it was moved to {workdir}/damaged/" in line
    # Once more, and there is nothing left to say.
    with Checkpoints(workdir, say=pytest.fail) as checkpoints:
        assert checkpoints.latest_step() == good


@pytest.mark.parametrize("fault", SOME[:: len(SOME) // 3], ids=lambda f: f.name)
def test_what_it_goes_on_from_is_restored_and_saved_again(workdir, fault, state):
    fault.inflict(workdir / "checkpoints" / "300")
    with Checkpoints(workdir, say=lambda _: None) as checkpoints:
        good = checkpoints.latest_step()
        _restored(checkpoints, good, state)
        for step in (350, 500):
            checkpoints.save(_at(state, step), META, score=0.3)
    assert integrity.steps_in(workdir) == [100, 350, 500]
    assert all(integrity.sums_of(workdir, step) for step in (350, 500))


def test_every_file_of_a_checkpoint_is_watched(workdir):
    folder = workdir / "checkpoints" / "300"
    assert integrity.damage(workdir, 300) is None
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        name = path.relative_to(workdir).as_posix()
        for way in (flip, empty):
            way(path)
            assert name in (integrity.damage(workdir, 300) or "")
        path.write_bytes(content)
    assert integrity.damage(workdir, 300) is None


@pytest.mark.parametrize("kind", [k for k in KINDS if "commit" not in k])
def test_without_sums_what_cannot_be_read_is_damaged(workdir, kind, state):
    delete(sums(workdir / "checkpoints" / "300"))
    empty(largest(workdir / "checkpoints" / "300", KINDS[kind]))
    with Checkpoints(workdir, say=lambda _: None) as checkpoints:
        good = checkpoints.latest_step()
        if good == 300:
            # The arrays of a net as small as this are all in the index.
            assert "process" in kind or kind.endswith("arrays")
            _restored(checkpoints, good, state)


def test_without_sums_a_folder_of_another_number_is_damaged(workdir):
    shutil.rmtree(workdir / "sums")
    (workdir / "checkpoints" / "300").rename(workdir / "checkpoints" / "400")
    said = []
    with Checkpoints(workdir, say=said.append) as checkpoints:
        assert checkpoints.latest_step() == 200
    assert "checkpoints/400: it holds step 300" in said[0]


def test_damaged_ones_alone_are_never_a_new_beginning(workdir):
    for step in SCORES:
        empty(largest(workdir / "checkpoints" / str(step), KINDS["the arrays"]))
    before = _files(workdir)
    for opened in (
        lambda: Checkpoints(workdir),
        lambda: checkpoint.stored_meta(workdir),
        lambda: checkpoint.good_steps(workdir),
        lambda: checkpoint.load_for_inference(workdir, which="latest"),
    ):
        with pytest.raises(InputError, match=r"is whole.*step 200: .*begin anew"):
            opened()
    assert _files(workdir) == before


def test_a_second_damaged_one_does_not_replace_the_first(workdir, state):
    for _ in range(3):
        flip(largest(workdir / "checkpoints" / "300", KINDS["the arrays"]))
        with Checkpoints(workdir, say=lambda _: None) as checkpoints:
            assert checkpoints.latest_step() == 200
            checkpoints.save(_at(state, 300), META, score=0.2)
    found = {path.name for path in (workdir / "damaged").iterdir()}
    names = {"300", "300_2", "300_3"}
    assert found == names | {f"{name}.json" for name in names}


def test_predicting_falls_back_only_where_that_was_asked_for(workdir, caplog):
    def broken(step):
        flip(largest(workdir / "checkpoints" / str(step), KINDS["the arrays"]))

    broken(300)
    before = _files(workdir)
    with caplog.at_level(logging.WARNING, "unet_jax"):
        assert checkpoint.load_for_inference(workdir, which="latest")[3] == 200
    assert "step 300" in caplog.text
    assert "its content changed" in caplog.text
    assert checkpoint.load_for_inference(workdir)[3] == 100
    with pytest.raises(InputError, match=r"step 300 .*damaged.*--which=latest or"):
        checkpoint.load_for_inference(workdir, which="300")
    assert checkpoint.stored_meta(workdir) == META
    assert _files(workdir) == before
    broken(100)
    with pytest.raises(InputError, match=r"best .*step 100, .*--which=latest"):
        checkpoint.load_for_inference(workdir)
    with pytest.raises(InputError, match="there is no checkpoint newest"):
        checkpoint.load_for_inference(workdir, which="newest")
    assert checkpoint.good_steps(workdir) == {200}


def test_one_that_lost_its_score_may_have_been_the_best(workdir):
    empty(workdir / "checkpoints" / "200" / "metrics" / "metrics")
    assert checkpoint.load_for_inference(workdir)[3] == 100  # the sums know its score
    empty(sums(workdir / "checkpoints" / "200"))
    with pytest.raises(InputError, match=r"step 200, .*metrics/metrics"):
        checkpoint.load_for_inference(workdir)


def test_sums_are_there_when_a_save_is_and_go_with_it(workdir, state):
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(_at(state, 400), META, score=0.3)
        checkpoints.wait()
        assert integrity.score_of(workdir, 400) == 0.3
        checkpoints.save(_at(state, 500), META, score=0.3)
    names = {path.name for path in (workdir / "sums").iterdir()}
    assert names == {"100.json", "400.json", "500.json"}
    assert checkpoint.good_steps(workdir) == {100, 400, 500}


@contextmanager
def _full_disk():
    """A system that writes no more than the first bytes of a file."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("way", ["check", "wait", "save", "close"])
def test_a_save_that_fails_halfway_leaves_the_others_whole(workdir, state, way, capfd):
    before = _files(workdir)
    with (
        pytest.raises(InputError, match=r"disk .*goes on from step 300"),
        Checkpoints(workdir) as checkpoints,
    ):
        checkpoints.check()
        with _full_disk():
            checkpoints.save(_at(state, 400), META, score=0.3)
            if way == "wait":
                checkpoints.wait()
            checkpoints._recorded()
        if way == "check":
            checkpoints.check()
        elif way == "save":
            checkpoints.save(_at(state, 500), META, score=0.3)
        assert way == "close"
    assert before.items() <= _files(workdir).items()
    assert "Traceback" not in capfd.readouterr().err
    with Checkpoints(workdir, say=pytest.fail) as checkpoints:
        assert checkpoints.latest_step() == 300
        checkpoints.save(_at(state, 400), META, score=0.3)
        checkpoints.wait()
        checkpoints.check()
    assert 400 in checkpoint.good_steps(workdir)


def test_where_it_goes_on_from_is_what_is_whole_on_disk(workdir, state, monkeypatch):
    usage = shutil.disk_usage(workdir)._replace(free=10)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    with Checkpoints(workdir) as checkpoints:
        flip(largest(workdir / "checkpoints" / "300", KINDS["the arrays"]))
        with pytest.raises(InputError, match="goes on from step 200"):
            checkpoints.save(_at(state, 400), META, score=0.3)


def test_what_was_read_and_found_whole_is_not_read_again(workdir, monkeypatch):
    read = []
    digest = integrity._digest
    monkeypatch.setattr(integrity, "_digest", lambda p: read.append(p) or digest(p))
    assert checkpoint.stored_meta(workdir) == META
    newest = [path for path in read if "300" in path.parts]
    known = integrity.sums_of(workdir, 300)
    assert known is not None
    assert len(newest) == len(known.files)
    read.clear()
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest_step() == 300
    assert checkpoint.good_steps(workdir) == set(SCORES)
    assert not [path for path in read if "300" in path.parts]
    monkeypatch.setattr(integrity, "REMEMBERED", 0.0)
    assert integrity.damage(workdir, 300) is None
    assert sorted(path for path in read if "300" in path.parts) == sorted(newest)
    monkeypatch.setattr(integrity, "REMEMBERED", 600.0)
    flip(newest[0])
    assert "its content changed" in (integrity.damage(workdir, 300) or "")


def test_an_old_one_that_is_half_deleted_costs_one_line(workdir, state):
    # Killed while orbax deletes the oldest, before the sums of the newest are written.
    delete(sums(workdir / "checkpoints" / "300"))
    oldest = workdir / "checkpoints" / "200"
    for path in [path for path in oldest.rglob("*") if path.is_file()][::2]:
        path.unlink()
    (oldest / "metrics" / "metrics").unlink(missing_ok=True)
    for which, step in (("best", 100), ("latest", 300)):
        assert checkpoint.load_for_inference(workdir, which=which)[3] == step
    assert checkpoint.stored_meta(workdir) == META
    assert checkpoint.good_steps(workdir) == {100, 300}
    said = []
    with Checkpoints(workdir, say=said.append) as checkpoints:
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (300, 100)
        _restored(checkpoints, 300, state)
        checkpoints.save(_at(state, 400), META, score=0.3)
    assert len(said) == 1
    assert "step 200 is damaged" in said[0]
    assert integrity.steps_in(workdir) == [100, 300, 400]


def test_sums_that_cannot_be_written_do_not_end_a_run(workdir, state):
    shutil.rmtree(workdir / "sums")
    (workdir / "sums").write_text("in the way")
    said = []
    with Checkpoints(workdir, say=said.append) as checkpoints:
        checkpoints.save(_at(state, 400), META, score=0.3)
    assert len(said) == 1
    assert "step 400 has no sums" in said[0]
    with Checkpoints(workdir, say=said.append) as checkpoints:
        assert checkpoints.latest_step() == 400


@pytest.mark.parametrize("jump", [-3600.0, 1e8])
def test_a_clock_that_jumps_changes_nothing(tmp_path, state, monkeypatch, jump):
    real, real_ns, start = time.time, time.time_ns, time.monotonic()
    jumps = [0]
    monkeypatch.setattr(time, "time", lambda: real() + jump * jumps[0])
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(jump * 1e9) * jumps[0])
    for steps in ((1, 2), (3, 4)):
        with Checkpoints(tmp_path, say=pytest.fail) as checkpoints:
            assert checkpoints.latest_step() == (steps[0] - 1 or None)
            for step in steps:
                score = 0.9 if step == 2 else 0.1
                checkpoints.save(_at(state, step), META, score=score)
                checkpoints.wait()
                jumps[0] += 1
    assert time.monotonic() - start < 60
    assert integrity.steps_in(tmp_path) == [2, 3, 4]
    assert checkpoint.load_for_inference(tmp_path)[3] == 2


def test_a_file_that_may_not_be_read_is_no_damage(workdir, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(integrity, "_digest", refused)
    before = _files(workdir)
    with pytest.raises(InputError, match=r"checkpoints/300/.* may not be read"):
        Checkpoints(workdir)
    assert _files(workdir) == before


def test_damaged_ones_that_cannot_be_moved_are_a_sentence(workdir):
    empty(largest(workdir / "checkpoints" / "300", KINDS["the tree"]))
    (workdir / "damaged").write_text("in the way")
    with pytest.raises(InputError, match=r"checkpoints/300 cannot be moved"):
        Checkpoints(workdir)


GOOD = META.to_json()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "no JSON object"),
        ([], "no JSON object"),
        ({}, "model = None"),
        ({**GOOD, "format": 99}, "update unet_jax"),
        ({**GOOD, "format": "2"}, "update unet_jax"),
        ({**GOOD, "colour": 1}, "'colour'"),
        ({**GOOD, "model": {}}, "model = {}"),
        ({**GOOD, "model": "unet"}, "model = 'unet'"),
        ({**GOOD, "task": "boxes"}, "task = 'boxes'"),
        ({**GOOD, "task": ["classes"]}, "task ="),
        ({**GOOD, "label_names": "cell"}, "label_names = 'cell'"),
        ({**GOOD, "channels": True}, "channels = True"),
        ({**GOOD, "channels": 0}, "channels = 0"),
        ({**GOOD, "rank": 4}, "rank = 4"),
        ({**GOOD, "spacing": [1, "x"]}, "spacing ="),
        ({**GOOD, "threshold": None}, "threshold = None"),
        ({**GOOD, "progress": 3}, "progress = 3"),
        *(
            ({k: v for k, v in GOOD.items() if k != key}, key)
            for key in ("rank", "task")
        ),
    ],
)
def test_a_strange_description_of_a_net_is_a_sentence(data, says):
    with pytest.raises(InputError, match=says):
        Meta.from_json(data)


def test_a_description_of_a_newer_version_is_no_damage(workdir):
    path = workdir / "checkpoints" / "300" / "meta" / "metadata"
    path.write_text(json.dumps({**GOOD, "format": 99, "new": 1}))
    shutil.rmtree(workdir / "sums")
    with (
        Checkpoints(workdir, say=pytest.fail) as checkpoints,
        pytest.raises(InputError, match=r"checkpoints/300: .*update unet_jax"),
    ):
        checkpoints.read_meta(300)


def test_members_that_cannot_be_read_are_a_sentence(tmp_path):
    for text in ("", "[]", '{"members": 3}', '{"members": [3]}', "[" * 10**5):
        (tmp_path / "members.json").write_text(text)
        with pytest.raises(InputError, match=r"members\.json does not name"):
            checkpoint.members_of(tmp_path)


def test_progress_survives_as_it_was(workdir, state):
    progress = {"best": 0.5, "best_step": 100}
    with Checkpoints(workdir) as checkpoints:
        meta = dataclasses.replace(META, progress=progress)
        checkpoints.save(_at(state, 400), meta, score=0.3)
    flip(largest(workdir / "checkpoints" / "400", KINDS["the arrays"]))
    with Checkpoints(workdir, say=lambda _: None) as checkpoints:
        assert checkpoints.latest_step() == 300
        assert checkpoints.read_meta(300).progress == {}
