"""The main job end to end: train, watch, kill, resume, refuse."""

import csv
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

import train
from configs import default
from unet_jax.books import Books
from unet_jax.checkpoint import Checkpoints, load_for_inference
from unet_jax.log import Meter
from unet_jax.types import InputError

ROOT = Path(__file__).parent.parent
TINY = {
    "data.cells.size": (16, 16),
    "data.cells.examples": 6,
    "model.features": (2, 4),
    "train.crop": (16, 16),
    "train.batch_size": 4,
    "train.eval_batch_size": 4,
    "train.log_every": 2,
    "optim.warmup_steps": 0,
    "mesh.data": 1,
}


def _config(**changes):
    config = default.get_config()
    with config.unlocked():
        for key, value in {**TINY, **changes}.items():
            config.update_from_flattened_dict({key: value})
    return train.chosen(config)


def _parameters(workdir):
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.latest_step()
        restore = ocp.args.StandardRestore()
        items = checkpoints._manager.restore(
            step, args=ocp.args.Composite(variables=restore, training=restore)
        )
    return step, items


def _assert_same_run(a, b):
    """The newest checkpoints of two workdirs are the same to the last bit."""
    (step_a, items_a), (step_b, items_b) = _parameters(a), _parameters(b)
    assert step_a == step_b
    for name in ("variables", "training"):
        leaves_a = jax.tree_util.tree_leaves_with_path(items_a[name])
        leaves_b = jax.tree.leaves(items_b[name])
        assert len(leaves_a) == len(leaves_b)
        for (path, x), y in zip(leaves_a, leaves_b, strict=True):
            if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
                x, y = jax.random.key_data(x), jax.random.key_data(y)
            assert np.array_equal(x, y), jax.tree_util.keystr(path)


def _run_until(last, config, workdir):
    """A run that dies inside a step."""
    taken = Meter.add

    def add(self, step, stats, **more):
        if step == last:
            raise KeyboardInterrupt
        return taken(self, step, stats, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Meter, "add", add)
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(config, workdir)


def test_a_run_leaves_everything_and_goes_on_bit_for_bit(tmp_path, capsys):
    changes = {
        "train.steps": 8,
        "train.eval_every": 4,
        "train.save_every": 2,
        "train.ema": 0.9,
        "augment.rotate": 20.0,
        "model.dropout": 0.3,
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    results = train.train_and_evaluate(_config(**changes), whole)
    text = capsys.readouterr().out
    assert "encoder/level1" in text and "memory of the compiled step" in text
    assert set(results) >= {"loss", "dice", "dice/cell", "iou/background"}
    for name in ("train.csv", "evaluation.csv", "config.json", "curves.png"):
        assert (whole / name).stat().st_size > 0
    assert [p.name for p in sorted((whole / "pictures").iterdir())] == [
        "step_000004.png",
        "step_000008.png",
    ]
    assert list((whole / "tensorboard").iterdir())
    with (whole / "evaluation.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [4, 8]

    # The first run dies inside step 5, after the save of step 4.
    _run_until(5, _config(**changes), parts)
    assert train.train_and_evaluate(_config(**changes), parts) == results
    assert "going on from step 4" in capsys.readouterr().out
    _assert_same_run(whole, parts)
    assert (whole / "evaluation.csv").read_text() == (
        parts / "evaluation.csv"
    ).read_text()
    # A third time there is nothing left to do.
    assert train.train_and_evaluate(_config(**changes), parts) == results
    assert "finished at step 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "mesh",
    [
        {"mesh.space": 2, "model.features": (4, 8)},
        {"mesh.data": 2, "mesh.fsdp": True, "model.features": (8, 64)},
    ],
    ids=["space", "fsdp"],
)
def test_a_run_on_a_mesh_goes_on_bit_for_bit(mesh, tmp_path, capsys):
    changes = {"train.steps": 6, "train.eval_every": 3, "train.save_every": 2, **mesh}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    results = train.train_and_evaluate(_config(**changes), whole)
    _run_until(5, _config(**changes), parts)
    assert train.train_and_evaluate(_config(**changes), parts) == results
    assert "going on from step 4" in capsys.readouterr().out
    _assert_same_run(whole, parts)


def test_early_stopping_and_plateau_survive_a_restart(tmp_path, capsys):
    changes = {
        "train.steps": 40,
        "train.eval_every": 1,
        "train.save_every": 1,
        "train.patience": 5,
        "optim.schedule": "plateau",
        "optim.learning_rate": 0.0,  # nothing improves: best at step 1, stop at 6
        "plateau.patience": 1,
        "model.norm": "none",
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.train_and_evaluate(_config(**changes), whole)
    text = capsys.readouterr().out
    assert "stopped early: 5 evaluations" in text
    assert "finished at step 6; best" in text
    # The first is the best; two more are one too many for a patience of 1, twice.
    assert text.count("plateau: the learning rate is now scaled") == 2
    with pytest.MonkeyPatch.context() as patch:
        taken = Books.assess

        def assess(self, state, step):
            if step == 4:
                raise KeyboardInterrupt
            taken(self, state, step)

        patch.setattr(Books, "assess", assess)
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(_config(**changes), parts)
    train.train_and_evaluate(_config(**changes), parts)
    _assert_same_run(whole, parts)


@pytest.mark.parametrize(
    "changes",
    [
        {"data.cells.rank": 3, "data.cells.size": (16,) * 3, "train.crop": (8,) * 3},
        {
            "model.padding": "valid",
            "train.crop": (20, 20),
            "model.norm": "none",
            "optim.name": "sgd",
        },
        {
            "task": "labels",
            "loss.cross_entropy": 0.0,
            "loss.binary_cross_entropy": 1.0,
            "loss.over": "batch",
        },
        {"train.accumulate": 2, "model.dtype": "bfloat16", "optim.freeze": ("head",)},
        {"mesh.data": 2, "data.normalisation": "standard"},
    ],
)
def test_other_ways_to_train(tmp_path, changes):
    results = train.train_and_evaluate(
        _config(**changes, **{"train.steps": 2}), tmp_path
    )
    assert np.isfinite(results["loss"])
    model, variables, meta, step = load_for_inference(tmp_path)
    assert step == 2 and meta.rank == (3 if "data.cells.rank" in changes else 2)
    assert np.isfinite(jax.tree.leaves(variables)[0]).all()
    assert model.num_classes == (1 if meta.task == "labels" else 2)


def test_a_loss_that_diverges_stops_the_run_and_keeps_the_good(tmp_path):
    changes = {"train.steps": 50, "train.save_every": 1, "optim.learning_rate": 1e30}
    changes |= {"optim.name": "sgd", "optim.schedule": "constant", "optim.clip": 0.0}
    changes |= {"model.norm": "none"}
    with pytest.raises(InputError, match=r"at step \d+.*learning_rate"):
        train.train_and_evaluate(_config(**changes), tmp_path)
    _, variables, _, step = load_for_inference(tmp_path, which="latest")
    assert step >= 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train.crop": (16, 16, 16)}, "train.crop.*2"),
        ({"train.crop": (64, 64)}, "crop"),
        ({"train.crop": (19, 19), "model.padding": "valid"}, "use 18 or 20"),
        ({"model.features": (2,) * 6}, r"train\.crop.*at least \(32, 32\)"),
        ({"model.name": "unetpp", "model.level": 2}, "in 1 to 1"),
        ({"train.accumulate": 3}, "does not divide"),
        ({"train.accumulate": 2, "loss.over": "batch"}, "train.accumulate=1"),
        ({"train.batch_size": 3, "mesh.data": 2}, "use 2 or 4"),
        ({"loss.binary_cross_entropy": 1.0}, "binary_cross_entropy"),
        ({"task": "label"}, "task"),
        ({"data.source": "folders"}, "folder"),
        ({"data.train": "train[:0%]"}, "train"),
        ({"model.act": "rellu"}, "relu"),
        ({"optim.freeze": ("enc",)}, "encoder/level0"),
        ({"train.monitor": "dise"}, r"train\.monitor.*dice"),
        ({"plateau.monitor": "los"}, r"plateau\.monitor.*loss"),
        ({"train.accumulate": 0}, "accumulate"),
        ({"train.crop": (0, 16)}, "crop"),
        ({"model.dtype": "bf16"}, "bfloat16"),
    ],
)
def test_what_does_not_work_is_one_sentence(tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        train.train_and_evaluate(_config(**changes, **{"train.steps": 1}), tmp_path)


def test_a_workdir_of_another_run_is_refused(tmp_path, capsys):
    train.train_and_evaluate(_config(**{"train.steps": 1}), tmp_path)
    for changes, says in [
        ({"model.features": (2, 6)}, r"model\.features"),
        ({"data.normalisation": "example"}, r"data\.normalisation\.kind"),
        ({"optim.name": "sgd"}, r"optim\.name"),
        ({"optim.freeze": ("head",)}, r"optim\.freeze"),
        ({"train.ema": 0.9}, r"train\.ema"),
    ]:
        other = _config(**{"train.steps": 2, **changes})
        with pytest.raises(InputError, match=says):
            train.train_and_evaluate(other, tmp_path)
    assert load_for_inference(tmp_path)[3] == 1
    capsys.readouterr()
    longer = _config(**{"train.steps": 2, "seed": 1})
    train.train_and_evaluate(longer, tmp_path)
    text = capsys.readouterr().out
    assert "changed since the checkpoint: seed: 0 -> 1" in text
    assert "changed since the checkpoint: train.steps: 1 -> 2" in text


def test_the_best_evaluation_is_kept_whenever_it_comes(tmp_path, monkeypatch):
    scores = iter([0.3, 0.9, 0.9, float("nan"), 0.5, 0.1])
    taken = train.Run.evaluate

    def evaluate(self, state, *, keep=0):
        found = taken(self, state, keep=keep)
        found.results["dice"] = next(scores)
        return found

    monkeypatch.setattr(train.Run, "evaluate", evaluate)
    changes = {"train.steps": 6, "train.eval_every": 1, "train.save_every": 4}
    train.train_and_evaluate(_config(**changes), tmp_path)
    _, _, meta, step = load_for_inference(tmp_path)
    assert step == 2 and meta.results["dice"] == 0.9
    assert meta.progress["best_step"] == 2


def test_another_number_of_devices_evaluates_and_goes_on(tmp_path):
    two = {"mesh.data": 2, "train.ema": 0.9}
    train.train_and_evaluate(_config(**two, **{"train.steps": 2}), tmp_path)
    one = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "unet_jax", "evaluate", f"--workdir={tmp_path}"]
    out = subprocess.run(command, cwd=ROOT, env=one, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("cpu: cpu, 1 device(s)")
    longer = _config(**{"train.ema": 0.9, "train.steps": 3})
    train.train_and_evaluate(longer, tmp_path)
    assert load_for_inference(tmp_path, which="latest")[3] == 3


def test_a_workdir_that_cannot_be_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        train.train_and_evaluate(_config(**{"train.steps": 1}), tmp_path / "file")


# --- As a program --------------------------------------------------------------------


def _command(workdir, *flags, steps=30):
    tiny = [f"--config.{k}={v}" for k, v in TINY.items()]
    return [
        sys.executable,
        "train.py",
        *([f"--workdir={workdir}"] if workdir else []),
        *tiny,
        f"--config.train.steps={steps}",
        "--config.train.eval_every=10",
        "--config.train.save_every=2",
        "--config.train.log_every=1",
        "--config.augment.rotate=30.0",
        *flags,
    ]


def _start(*args, **kwargs):
    return subprocess.Popen(
        _command(*args, **kwargs),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _kill_at(process, step):
    """Lets a run print ``step`` and kills it; False if it ended before."""
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            process.kill()
            break
    process.stdout.close()
    return process.wait() == -signal.SIGKILL


def _kill_in_a_save(process, workdir):
    """Kills a run while a checkpoint is half written."""
    folder = workdir / "checkpoints"
    while process.poll() is None:
        if any(folder.glob("*.orbax-checkpoint-tmp*")):
            process.kill()
            break
        time.sleep(0.0005)
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    return any(folder.glob("*.orbax-checkpoint-tmp*"))


def _latest(workdir):
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.latest_step() or 0


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    whole, parts, steps = tmp_path / "whole", tmp_path / "parts", 60
    _start(whole, steps=steps).communicate()
    choose = random.Random(int.from_bytes(os.urandom(4), "big"))
    killed, half_written = 0, False
    for _ in range(3):
        half_written |= _kill_in_a_save(_start(parts, steps=steps), parts)
        at = _latest(parts) + choose.randint(1, 8)
        killed += 1 + _kill_at(_start(parts, steps=steps), at)
    assert killed >= 5 and half_written
    text = _start(parts, steps=steps).communicate()[0]
    assert f"finished at step {steps}" in text, text
    _assert_same_run(whole, parts)
    with (parts / "train.csv").open() as file:
        logged = [int(row["step"]) for row in csv.DictReader(file)]
    assert logged == list(range(1, steps + 1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_compiling_ends_in_peace(tmp_path, number):
    process = _start(tmp_path)
    for line in process.stdout:
        if line.startswith("compiling the training step"):
            process.send_signal(number)
            break
    text = process.communicate()[0]
    assert process.returncode == 0, text
    assert re.search("stopped before the first step|saved step", text)
    assert "Traceback" not in text


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    process = _start(tmp_path, "--config.train.save_every=0", steps=100_000)
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    text = process.communicate()[0]
    assert process.returncode == 0, text
    saved = int(re.search(r"SIGTERM: saved step (\d+)", text)[1])
    assert saved >= 3
    assert load_for_inference(tmp_path, which="latest")[3] == saved


def test_nothing_is_asked_of_the_network(tmp_path):
    code = (
        "import runpy, sys\n"
        "def refuse(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'):\n"
        "        raise SystemExit(f'{event}: {args}')\n"
        "sys.addaudithook(refuse)\n"
        f"sys.argv = {_command(tmp_path, steps=2)[1:]}\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "finished at step 2" in done.stdout, done.stderr


def _run(*flags):
    return subprocess.run(
        _command(None, *flags), cwd=ROOT, capture_output=True, text=True
    )


def test_a_dry_run_says_what_it_would_do(tmp_path):
    out = _run("--dry_run")
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert lines[0] == "cpu: cpu, 1 device(s) used"
    assert any(line.startswith("memory of the compiled step") for line in lines)


def test_of_a_flag_given_twice_the_last_wins(monkeypatch):
    argv = ["train.py", "--config.model.features=(2,4)", "--dry_run"]
    argv += ["--config.train.steps=3", "--config.model.features=(4,8,16)"]
    monkeypatch.setattr(sys, "argv", argv)  # ml_collections looks there for overrides
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how ml_collections loads a file
        command = train.parse(argv)
    config, workdir = command.config, command.workdir
    assert config["model"]["features"] == (4, 8, 16)
    assert config["train"]["steps"] == 3 and workdir is None


def test_mistakes_on_the_command_line_have_no_traceback(tmp_path):
    for flags, says in [
        (["--config.model.featurs=3", "--dry_run"], "features"),
        (["--config.train.steps=many", "--dry_run"], "steps"),
        (["--config=configs/nothing.py", "--dry_run"], "configs/nothing.py"),
        ([], "--workdir"),
        (["train", "--dry_run"], "'train'"),
    ]:
        out = _run(*flags)
        assert out.returncode == 2
        assert "Traceback" not in out.stderr + out.stdout
        assert out.stderr.splitlines()[-1].startswith("train.py: error: ")
        assert says in out.stderr, out.stderr


def test_bad_files_end_in_one_sentence_with_the_name(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir(), masks.mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(images / f"{name}.png")
        mask = np.zeros((16, 16), np.uint8)
        mask[:8] = 255
        Image.fromarray(mask).save(masks / f"{name}.png")
    (images / "a.png").write_bytes((images / "a.png").read_bytes()[:40])
    config = _config(
        **{
            "data.source": "folder",
            "data.root": str(tmp_path),
            "data.evaluation": "train",
            "train.steps": 1,
        }
    )
    with pytest.raises(InputError, match=r"a\.png"):
        train.train_and_evaluate(config, tmp_path / "run")
