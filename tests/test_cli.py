"""The console command: what it prints, writes and refuses."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_predict import make, picture, save

from unet_jax import cli

CONFIG = {
    "data": {
        "source": "cells",
        "train": "train",
        "evaluation": "val[:2]",
        "cells": {"size": (16, 16), "examples": 3, "radius": (3, 5)},
    },
    "loss": {"cross_entropy": 1.0},
    "train": {"eval_batch_size": 3},
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    import dataclasses

    path = tmp_path_factory.mktemp("run")
    _, variables, meta = make()
    save(path, variables, dataclasses.replace(meta, config=CONFIG), step=7)
    return str(path)


def test_predict(workdir, tmp_path, capsys):
    Image.fromarray(picture(21, 10)).save(tmp_path / "a.png")
    out = tmp_path / "out"
    status = cli.main(
        ["predict", f"--workdir={workdir}", str(tmp_path / "a.png"), f"--out={out}",
         "--tile=16", "--probabilities", "--overlay"]
    )  # fmt: skip
    assert status == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cpu: ")
    assert lines[0].endswith("device(s)")
    assert "step 7" in lines[1]
    assert "a.png -> " in lines[2]
    names = sorted(p.name for p in out.iterdir())
    assert names == ["a.png", "a_overlay.png", "a_probability.npy"]
    with Image.open(out / "a.png") as label:
        assert label.size == (10, 21)
    assert np.load(out / "a_probability.npy").shape == (21, 10, 2)


def test_evaluate_prints_a_table_and_json(workdir, capsys):
    assert cli.main(["evaluate", f"--workdir={workdir}"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("cpu: ")
    assert "step 7, 2 examples of val[:2]" in text
    for word in ("dice", "recall", "background", "cell", "mean", "pixel_accuracy"):
        assert word in text
    assert cli.main(["evaluate", f"--workdir={workdir}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 7
    assert found["examples"] == 2
    results = found["results"]
    assert f"{results['dice/cell']:.4f}" in text
    assert f"{results['loss']:.4f}" in text


def test_evaluate_other_splits(workdir, capsys):
    for split, count in (("train", 3), ("test[:1]", 1)):
        arguments = [f"--workdir={workdir}", f"--split={split}", "--json"]
        assert cli.main(["evaluate", *arguments]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["split"], found["examples"]) == (split, count)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "--workdir=nowhere", "--out=o", "a.png"], "no checkpoint"),
        (["predict", "--workdir=WORKDIR", "--out=o", "a.png"], "a.png does not exist"),
        (["predict", "--workdir=WORKDIR", "--out=o", "a", "--overlap=1"], "overlap"),
        (["predict", "--workdir=WORKDIR", "--out=o", "a", "--which=9"], "checkpoint 9"),
        (["evaluate", "--workdir=WORKDIR", "--split=train[1"], "split"),
        (["evaluate", "--workdir=WORKDIR", "--batch_size=3"], "--batch_size = 3"),
        (["shapes", "--config=nothing.py"], "nothing.py"),
        (["shapes", "--size=12y"], "--size=12y"),
        (["shapes", "--size=20", "--config.model.padding=valid"], "use 188"),
        (["shapes", "--config.model.depth=3"], "features"),
        (["shapes", "--config.train.steps=3"], "--config.model.KEY"),
        (["shapes", "--workdir=WORKDIR", "--config.model.up=nearest"], "net of its"),
        (["shapes", "--size=32", "--out=net.pdf"], ".svg"),
        (["prune", "--workdir=WORKDIR"], "deep supervision"),
    ],
)
def test_a_users_mistake_is_one_sentence(
    arguments, words, workdir, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.main([a.replace("WORKDIR", workdir) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("unet-jax: error: ")
    assert words in error
    assert error.count("\n") == 1


def test_shapes_of_a_config_and_of_a_workdir(workdir, tmp_path, capsys):
    path = tmp_path / "net.png"
    changes = ["--config.model.features=(2,4,8)", "--config.model.up=bilinear"]
    config = ["--config=configs/unetpp.py", "--size=32x48", f"--out={path}"]
    assert cli.main(["shapes", *config, *changes]) == 0
    text = capsys.readouterr().out
    assert "image 32 x 48 x 1" in text and "X[0,2]" in text and path.exists()
    assert "X[0,3]" not in text
    assert cli.main(["shapes", f"--workdir={workdir}"]) == 0
    assert "decoder unet" in capsys.readouterr().out
    assert cli.main(["shapes", "--size=64"]) == 0  # plain U-Net
    assert "31,036,546" in capsys.readouterr().out


def test_features_and_a_pixel(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(16, 12)).save("a.png")
    arguments = ["features", f"--workdir={workdir}", "a.png", "--maps=2"]
    assert cli.main([*arguments, "--pixel=3,4"]) == 0
    text = capsys.readouterr().out
    assert "pixel (3, 4) of a.png" in text and "softmax" in text
    assert "a.png -> a_features.png" in text
    with Image.open("a_features.png") as drawn:
        assert drawn.size[0] > 300


def test_argparse_refuses(capsys):
    for arguments in (
        [],
        ["predict"],
        ["evaluate", "--workdir=a", "--which=bset"],
        ["evaluate", "--workdir=a", "--config.model.up=nearest"],
        ["shapes", "--sise=3"],
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "bset" in error and "--sise=3" in error and "model.up=nearest" in error


def test_the_module_runs():
    for arguments in (["--help"], ["predict", "--help"], ["evaluate", "--help"]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "unet_jax", *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "usage: unet-jax" in done.stdout
        assert " jax\n" not in done.stderr  # so that help answers at once
    assert "0 and 255" in cli.predict._VALUES


@pytest.mark.parametrize(
    ("arguments", "unbuffered"), [(["--help"], ""), (["shapes", "--size=16"], "1")]
)
def test_a_reader_that_leaves_is_no_error(arguments, unbuffered):
    # Buffered, the first write that fails is the one at the end.
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "unet_jax", *arguments],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
