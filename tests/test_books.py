"""What a run says and saves where its data, or its net, go wrong."""

import csv
import time

import numpy as np
import pytest
from PIL import Image

import train
from configs import default
from unet_jax.checkpoint import Checkpoints
from unet_jax.data import batches
from unet_jax.evaluation import Progress, collapsed
from unet_jax.types import InputError

TINY = {
    "data.source": "folder",
    "data.train": "train[:8]",
    "data.evaluation": "train[8:]",
    "data.cache_mb": 0.0,
    "model.features": (2, 4),
    "train.crop": (16, 16),
    "train.batch_size": 4,
    "train.eval_batch_size": 2,
    "train.steps": 12,
    "train.log_every": 2,
    "train.eval_every": 4,
    "train.save_every": 4,
    "optim.warmup_steps": 0,
    "mesh.data": 1,
}


def _config(root, **changes):
    config = default.get_config()
    for key, value in {**TINY, "data.root": str(root), **changes}.items():
        config.update_from_flattened_dict({key: value})
    return train.chosen(config)


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for i in range(10):
        image = rng.integers(0, 256, (16, 16), np.uint8)
        Image.fromarray(image).save(root / "images" / f"{i}.png")
        Image.fromarray((image > 99) * np.uint8(255)).save(root / "masks" / f"{i}.png")
    return root


def _steps(workdir):
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return sorted(checkpoints._manager.all_steps())


def _rows(path):
    with path.open() as file:
        return [row["step"] for row in csv.DictReader(file)]


def _deleted_when(monkeypatch, step, path):
    """Takes a file away while a batch is read, as somebody who tidies up would."""
    plan = batches.plan

    def planned(seed, number, **options):
        if number >= step:
            path.unlink(missing_ok=True)
        return plan(seed, number, **options)

    monkeypatch.setattr(batches, "plan", planned)


@pytest.mark.slow
def test_an_image_that_is_deleted_costs_no_step(root, tmp_path, monkeypatch, capsys):
    whole = train.train_and_evaluate(_config(root), tmp_path / "whole")
    capsys.readouterr()
    image = root / "images" / "3.png"
    stored = image.read_bytes()
    workdir = tmp_path / "parts"
    with monkeypatch.context() as patch:
        _deleted_when(patch, 5, image)
        with pytest.raises(InputError, match=r"3\.png does not exist"):
            train.train_and_evaluate(_config(root), workdir)
    step = max(_steps(workdir))
    assert 0 < step < 12  # batches are read ahead of the steps
    assert f"saved step {step}; the same command goes on" in capsys.readouterr().out
    image.write_bytes(stored)
    assert train.train_and_evaluate(_config(root), workdir) == whole
    assert _rows(workdir / "evaluation.csv") == ["4", "8", "12"]


def test_an_image_that_is_deleted_may_be_skipped(root, tmp_path, monkeypatch, capsys):
    _deleted_when(monkeypatch, 5, root / "images" / "3.png")
    config = _config(root, **{"data.on_error": "skip"})
    train.train_and_evaluate(config, tmp_path / "run")
    text = capsys.readouterr().out
    assert "1 example could not be read and counted nowhere" in text
    assert max(_steps(tmp_path / "run")) == 12


@pytest.mark.slow
def test_an_evaluation_that_fails_is_made_up_for(root, tmp_path, capsys):
    whole = train.train_and_evaluate(_config(root), tmp_path / "whole")
    image = root / "images" / "9.png"
    stored = image.read_bytes()
    workdir, config = tmp_path / "parts", _config(root)
    compiled = train.compile_step

    def broken(run, state, batch):
        image.write_bytes(stored[:50])
        return compiled(run, state, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_step", broken)
        with pytest.raises(InputError, match=r"9\.png cannot be read"):
            train.train_and_evaluate(config, workdir)
    assert "saved step 4, of which the evaluation failed" in capsys.readouterr().out
    image.write_bytes(stored)
    assert train.train_and_evaluate(config, workdir) == whole
    assert _rows(workdir / "evaluation.csv") == ["4", "8", "12"]


def test_what_is_made_up_for_may_be_the_best(root, tmp_path, capsys, monkeypatch):
    image = root / "images" / "9.png"
    stored = image.read_bytes()
    scores = iter([0.9, 0.5, 0.4])
    monkeypatch.setattr("unet_jax.books.score_of", lambda *_, **__: next(scores))
    compiled = train.compile_step

    def broken(run, state, batch):
        image.write_bytes(stored[:50])
        return compiled(run, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train, "compile_step", broken)
        with pytest.raises(InputError, match=r"9\.png cannot be read"):
            train.train_and_evaluate(_config(root), tmp_path / "run")
    image.write_bytes(stored)
    train.train_and_evaluate(_config(root), tmp_path / "run")
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.best_step() == 4
        meta = checkpoints.read_meta(4)
        assert meta.results and not meta.progress["owed"]
    assert _rows(tmp_path / "run" / "evaluation.csv") == ["4", "8", "12"]


def test_other_images_than_before_are_told(root, tmp_path, capsys):
    train.train_and_evaluate(_config(root, **{"train.steps": 4}), tmp_path / "run")
    (root / "images" / "9.png").unlink()
    (root / "masks" / "9.png").unlink()
    with pytest.raises(InputError, match="evaluated on 2 images, and now there are 1"):
        train.train_and_evaluate(_config(root, **{"train.steps": 8}), tmp_path / "run")
    # The remedy: its weights, in another workdir.
    more = {"train.steps": 4, "model.weights": str(tmp_path / "run")}
    train.train_and_evaluate(_config(root, **more), tmp_path / "other")
    capsys.readouterr()
    more = {"train.steps": 8, "data.on_error": "skip"}
    train.train_and_evaluate(_config(root, **more), tmp_path / "run")
    text = capsys.readouterr().out
    assert "the images of data.evaluation: 2 -> 1, and not the same ones" in text
    assert "the images of data.train" not in text


@pytest.mark.parametrize("slow", [True, False])
def test_what_holds_up_a_run_is_named(slow, root, tmp_path, monkeypatch, capsys):
    stack = batches._stack

    def slowly(*args):
        time.sleep(0.1)
        return stack(*args)

    def computing(run, state, batch):
        step = compiled(run, state, batch)

        def slow_step(state, batch):
            time.sleep(0.1)
            return step(state, batch)

        return slow_step

    compiled = train.compile_step
    if slow:
        monkeypatch.setattr(batches, "_stack", slowly)
    else:
        monkeypatch.setattr(train, "compile_step", computing)
    changes = {"train.eval_every": 0, "train.save_every": 0, "train.threads": 1}
    train.train_and_evaluate(_config(root, **changes), tmp_path)
    text = capsys.readouterr().out
    assert f"bottleneck: {'input' if slow else 'compute'}" in text
    assert "epoch 6.0" in text  # 12 steps of 4 are six times 8 examples
    with (tmp_path / "train.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["epoch"]) == 6
    assert (float(last["input_wait"]) > 0.1) == slow


def test_a_net_that_predicts_one_class_raises_an_alarm(root, tmp_path, capsys):
    # A head that cannot learn, whose bias says background.
    changes = {
        "optim.learning_rate": 1e-12,
        "loss.class_weights": (1.0, 0.0),
        "train.steps": 16,
    }
    train.train_and_evaluate(_config(root, **changes), tmp_path)
    found = capsys.readouterr().out.count("ALARM: 3 evaluations in a row found")
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        progress = checkpoints.read_meta(16).progress
    assert (progress["collapsed"] >= 3) == bool(found)


def test_what_counts_as_collapsed():
    names = ("background", "a", "b")

    def one(table):
        return collapsed(np.array([table]), task="classes", label_names=names)

    assert one([[90, 0, 0], [7, 0, 0], [3, 0, 0]]) == ("background", 0.1)
    assert one([[0, 90, 0], [0, 7, 0], [0, 3, 0]]) == ("a", 0.93)
    assert one([[90, 0, 0], [6, 1, 0], [3, 0, 0]]) is None
    # Nothing is there but background, so that there is nothing to find.
    assert one([[90, 0, 0], [0, 0, 0], [0, 0, 0]]) is None
    # What is found elsewhere by mistake is found too: this net tells things apart.
    assert one([[80, 9, 1], [7, 0, 0], [3, 0, 0]]) is None

    def labels(*tables):
        return collapsed(np.array([tables]), task="labels", label_names=("a", "b"))

    blind = [[90, 0], [10, 0]]
    assert labels(blind, blind) == ("no label", 0.1)
    assert labels(blind, [[90, 0], [5, 5]]) is None
    assert labels([[0, 90], [0, 10]], [[0, 50], [0, 50]]) == ("every label", 0.7)


def test_evaluations_in_a_row_are_counted():
    progress = Progress()
    for step, bad in enumerate([True, True, False, True], start=1):
        progress = progress.after(step, 0.5, collapsed=bad)
    assert progress.collapsed == 1
    assert Progress(**{"best": 0.4, "best_step": 3}).collapsed == 0
