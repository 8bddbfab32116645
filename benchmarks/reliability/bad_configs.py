"""Configs, command lines and workdirs that ``train.py`` cannot work with."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.reliability.bad_images import halved
from benchmarks.reliability.case import Case, copied, trained

# What is wrong: (other values, what the sentence must have).
VALUES: dict[str, tuple[dict[str, object], str]] = {
    "an unknown key": ({"model.featurs": 3}, "featurs"),
    "an unknown section": ({"modle.features": 3}, "modle"),
    "a section for a value": ({"model": 3}, "model"),
    "a text for a number": ({"train.steps": "many"}, "steps"),
    "a half step": ({"train.steps": 1.5}, "steps"),
    "no steps": ({"train.steps": 0}, r"train\.steps"),
    "negative steps": ({"train.steps": -5}, r"train\.steps"),
    "a negative batch": ({"train.batch_size": -2}, r"train\.batch_size"),
    "a batch of 0 without memory": ({"train.batch_size": 0}, r"train\.memory_gb"),
    "negative memory": (
        {"train.batch_size": 0, "train.memory_gb": -1.0},
        r"train\.memory_gb",
    ),
    "memory of nan": (
        {"train.batch_size": 0, "train.memory_gb": "nan"},
        r"train\.memory_gb",
    ),
    "no evaluation batch": ({"train.eval_batch_size": 0}, r"train\.eval_batch_size"),
    "accumulation that does not divide": ({"train.accumulate": 3}, "accumulate"),
    "no accumulation": ({"train.accumulate": 0}, "accumulate"),
    "no crop": ({"train.crop": "()"}, r"train\.crop"),
    "a crop of one axis": ({"train.crop": "(16,)"}, r"train\.crop"),
    "a crop of three axes": ({"train.crop": "(16,16,16)"}, r"train\.crop"),
    "a crop of 0": ({"train.crop": "(0,16)"}, r"train\.crop"),
    "a negative crop": ({"train.crop": "(-16,16)"}, r"train\.crop"),
    "a crop of halves": ({"train.crop": "(16.5,16)"}, r"train\.crop"),
    "a crop of texts": ({"train.crop": "('a','b')"}, r"train\.crop"),
    "a crop as one number": ({"train.crop": 16}, r"train\.crop"),
    "a crop larger than the images": ({"train.crop": "(64,64)"}, "64"),
    "a crop too small for the net": (
        {"train.crop": "(2,2)", "model.features": "(2,2,2,2)"},
        r"train\.crop",
    ),
    "a crop that a valid net cannot take": (
        {"model.padding": "valid", "train.crop": "(17,17)"},
        "17",
    ),
    "foreground of 2": ({"train.foreground": 2.0}, r"train\.foreground"),
    "negative foreground": ({"train.foreground": -0.5}, r"train\.foreground"),
    "foreground of nan": ({"train.foreground": "nan"}, r"train\.foreground"),
    "negative threads": ({"train.threads": -4}, r"train\.threads"),
    "an average of 1": ({"train.ema": 1.0}, r"train\.ema"),
    "an average of nan": ({"train.ema": "nan"}, r"train\.ema"),
    "a threshold of 2": ({"train.threshold": 2.0}, r"train\.threshold"),
    "a negative patience": ({"train.patience": -1}, r"train\.patience"),
    "a negative alarm": ({"train.alarm": -1}, r"train\.alarm"),
    "a negative interval of evaluations": ({"train.eval_every": -3}, "eval_every"),
    "a negative interval of saves": ({"train.save_every": -3}, "save_every"),
    "a negative interval of rows": ({"train.log_every": -3}, "log_every"),
    "steps to a call that do not divide": (
        {"train.steps_per_call": 2},
        r"train\.steps_per_call",
    ),
    "an unknown figure": ({"train.monitor": "dise"}, "dise"),
    "a figure that falls": ({"plateau.monitor": "nothing"}, "nothing"),
    "a plateau factor of 0": (
        {"plateau.factor": 0.0, "optim.schedule": "plateau"},
        r"plateau\.factor",
    ),
    "a plateau factor of 2": (
        {"plateau.factor": 2.0, "optim.schedule": "plateau"},
        r"plateau\.factor",
    ),
    "a plateau without patience": (
        {"plateau.patience": -1, "optim.schedule": "plateau"},
        r"plateau\.patience",
    ),
    "a negative seed": ({"seed": -1}, "seed"),
    "a seed beyond 64 bits": ({"seed": 2**70}, "seed"),
    "an unknown task": ({"task": "boxes"}, "boxes"),
    "an unknown source": ({"data.source": "folders"}, "folders"),
    "no source": ({"data.source": ""}, r"data\.source"),
    "a source without a root": ({"data.source": "folder"}, r"data\.root"),
    "a root that is no folder": (
        {"data.source": "folder", "data.root": "/dev/null"},
        "/dev/null",
    ),
    "a root with a zero": (
        {"data.source": "folder", "data.root": "a\0b"},
        "root|a.{1,6}b",
    ),
    "no split": ({"data.train": ""}, "split"),
    "a split that is no split": ({"data.train": "train[1"}, r"train\[1"),
    "a split of words": ({"data.train": "train[most]"}, r"train\[most\]"),
    "a split of 200 %": ({"data.train": "train[:200%]"}, "200%"),
    "a split beyond the end": ({"data.train": "train[:99]"}, r"train\[:99\]"),
    "an empty split": ({"data.train": "train[1:1]"}, r"train\[1:1\]"),
    "a split of a few per cent": ({"data.train": "train[:1%]"}, r"train\[:1%\]"),
    "fold 3 of 2": ({"data.train": "all[fold 3/2]"}, "fold 3 of 2|3/2"),
    "fold 0": ({"data.train": "all[fold 0/5]"}, "fold 0"),
    "two slices": ({"data.train": "train[:1][1:]"}, r"train\[:1\]\[1:\]"),
    "splits that overlap": (
        {"data.train": "train[:2]", "data.evaluation": "train[1:]"},
        "share",
    ),
    "an unknown normalisation": ({"data.normalisation": "minmax"}, "minmax"),
    "an unknown way with errors": ({"data.on_error": "ignore"}, "ignore"),
    "a cache of nan": ({"data.cache_mb": "nan"}, r"data\.cache_mb"),
    "a cache in a file": ({"data.cache_dir": "/dev/null/x"}, "/dev/null"),
    "a size of 0 to bring to": ({"data.resize": "(0,16)"}, r"data\.resize|resize"),
    "a size of one axis to bring to": ({"data.resize": "(16,)"}, "resize"),
    "a size of texts to bring to": ({"data.resize": "('a',2)"}, "resize"),
    "an absurd size to bring to": ({"data.resize": "(999999,999999)"}, "resize|GB"),
    "a border without a height": ({"data.border.sigma": 5.0}, r"data\.border\.w0"),
    "a border of nan": ({"data.border.w0": "nan"}, "w0"),
    "a negative border": ({"data.border.w0": -1.0}, "w0"),
    "a border without width": (
        {"data.border.w0": 10.0, "data.border.sigma": 0.0},
        "sigma",
    ),
    "cells of size 0": ({"data.cells.size": "(0,16)"}, "size"),
    "cells of texts": ({"data.cells.size": "('a','b')"}, "size"),
    "a fraction of cells": ({"data.cells.examples": -2}, "examples"),
    "cells of rank 4": ({"data.cells.rank": 4}, "rank"),
    "cells without radius": ({"data.cells.radius": "(0,0)"}, "radius"),
    "cells of a radius backwards": ({"data.cells.radius": "(9,3)"}, "radius"),
    "crowding of nan": ({"data.cells.crowding": "nan"}, "crowding"),
    "negative noise of cells": ({"data.cells.noise": -1.0}, "noise"),
    "an unknown loss": ({"loss.lovasz": 1.0}, "lovasz"),
    "no loss": ({"loss.cross_entropy": 0.0, "loss.dice": 0.0}, "loss"),
    "a negative loss": ({"loss.dice": -1.0}, "dice"),
    "a loss of nan": ({"loss.dice": "nan"}, "dice"),
    "a loss of labels for classes": (
        {"loss.binary_cross_entropy": 1.0},
        "binary_cross_entropy",
    ),
    "weights for three classes": (
        {"loss.class_weights": "(1.,2.,3.)"},
        "3 weights|class_weights",
    ),
    "weights of texts": ({"loss.class_weights": "('a','b')"}, "class_weights"),
    "negative weights": ({"loss.class_weights": "(-1.,1.)"}, "class_weights"),
    "weights of 0": ({"loss.class_weights": "(0.,0.)"}, "class_weights"),
    "an unknown way to normalise": ({"loss.normalise": "mean"}, "mean"),
    "negative smoothing": ({"loss.smooth": -1.0}, "smooth"),
    "a negative gamma of focal": ({"loss.focal": 1.0, "loss.gamma": -1.0}, "gamma"),
    "an alpha of focal for three": (
        {"loss.focal": 1.0, "loss.focal_alpha": "(1.,1.,1.)"},
        "3 weights|focal_alpha",
    ),
    "negative Tversky": ({"loss.tversky": 1.0, "loss.alpha": -1.0}, "alpha"),
    "an unknown optimizer": ({"optim.name": "adamm"}, "adamm"),
    "an unknown schedule": ({"optim.schedule": "cosin"}, "cosin"),
    "a rate of nan": ({"optim.learning_rate": "nan"}, r"optim\.learning_rate"),
    "an infinite rate": ({"optim.learning_rate": "inf"}, r"optim\.learning_rate"),
    "a negative rate": ({"optim.learning_rate": -0.1}, r"optim\.learning_rate"),
    "a negative warm-up": ({"optim.warmup_steps": -5}, "warmup_steps"),
    "betas of 1": ({"optim.betas": "(1.,1.)"}, r"optim\.betas"),
    "three betas": ({"optim.betas": "(.9,.9,.9)"}, r"optim\.betas"),
    "betas of texts": ({"optim.betas": "('a','b')"}, r"optim\.betas"),
    "a momentum of 2": ({"optim.name": "sgd", "optim.momentum": 2.0}, "momentum"),
    "Nesterov for adam": ({"optim.nesterov": True}, "nesterov"),
    "a negative decay": ({"optim.weight_decay": -1.0}, r"optim\.weight_decay"),
    "a decay of nan": ({"optim.weight_decay": "nan"}, r"optim\.weight_decay"),
    "a negative clip": ({"optim.clip": -1.0}, r"optim\.clip"),
    "a negative eps": ({"optim.eps": -1.0}, r"optim\.eps"),
    "a power of nan": ({"optim.schedule": "poly", "optim.power": "nan"}, "power"),
    "a negative end": ({"optim.final_fraction": -1.0}, "final_fraction"),
    "frozen nothing": ({"optim.freeze": "('encodr',)"}, "encodr"),
    "frozen everything": ({"optim.freeze": "('**',)"}, r"optim\.freeze"),
    "a rate of no part": ({"optim.lr_scale": "(('encodr',.1),)"}, "encodr"),
    "a rate without a pair": ({"optim.lr_scale": "('encoder',)"}, "lr_scale"),
    "a rotation of nan": ({"augment.rotate": "nan"}, r"augment\.rotate"),
    "a negative scale": ({"augment.scale": -1.0}, r"augment\.scale"),
    "a probability of 2": ({"augment.probability": 2.0}, "probability"),
    "an unknown axis to flip": ({"augment.flip_axes": "(7,)"}, "flip_axes"),
    "an axis the images do not have": ({"augment.flip_axes": "(2,)"}, "flip_axes"),
    "a flip of texts": ({"augment.flip_axes": "('x',)"}, "flip_axes"),
    "a displacement of text": ({"augment.elastic": "much"}, "elastic"),
    "a displacement of three axes": ({"augment.elastic": "(1.,1.,1.)"}, "elastic"),
    "a grid of one node": (
        {"augment.elastic": 1.0, "augment.elastic_grid": 1},
        "elastic_grid",
    ),
    "an unknown interpolation": ({"augment.interpolation": "lanczos"}, "lanczos"),
    "an unknown net": ({"model.name": "unet3"}, "unet3"),
    "an unknown activation": ({"model.act": "mish2"}, "mish2"),
    "an unknown norm": ({"model.norm": "bath"}, "bath"),
    "an unknown block": ({"model.block": "dens"}, "dens"),
    "an unknown padding": ({"model.padding": "full"}, "full"),
    "no features": ({"model.features": "()"}, r"model\.features"),
    "features of 0": ({"model.features": "(2,0)"}, r"model\.features"),
    "features of texts": ({"model.features": "('a',)"}, r"model\.features"),
    "features as a text": ({"model.features": "many"}, "features"),
    "a dropout of 2": ({"model.dropout": 2.0}, r"model\.dropout"),
    "an unknown dtype": ({"model.dtype": "float31"}, "float31"),
    "groups that do not divide": (
        {"model.norm": "group", "model.norm_groups": 3, "model.features": "(4,8)"},
        "norm_groups",
    ),
    "weights that are not there": ({"model.weights": "nowhere.pth"}, "nowhere"),
    "an encoder's weights for none": (
        {"model.encoder_weights": "nowhere.pth"},
        "encoder_weights|nowhere",
    ),
    "a mesh of 99": ({"mesh.data": 99}, "99"),
    "a mesh of 0": ({"mesh.data": 0}, r"mesh\.data"),
    "a space of -1": ({"mesh.space": -1}, r"mesh\.space"),
    "one fold": ({"members.folds": 1}, r"members\.folds"),
    "folds of a part": (
        {"members.folds": 2, "data.train": "all[:2]"},
        r"data\.train",
    ),
    "folds and seeds": ({"members.folds": 2, "members.seeds": 2}, r"members\.folds"),
    "more folds than examples": (
        {"members.folds": 50, "data.train": "all"},
        "fold|empty",
    ),
}

START = """\
import sys
from configs.default import get_config as _default
def get_config():
    config = _default()
"""

# What is wrong: (the file's content, what the sentence must have).
CONFIGS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "get_config"),
    "no get_config": (b"config = 3\n", "get_config"),
    "no Python": (b"train:\n  steps: 3\n", r"my\.py"),
    "a broken bracket": (b"def get_config(:\n", r"my\.py"),
    "random bytes": (bytes(range(256)), r"my\.py"),
    "UTF-16": ("def get_config(): pass\n".encode("utf-16"), r"my\.py"),
    "a JSON": (b'{"train": {"steps": 3}}', "get_config"),
    "it raises": (b"def get_config():\n    raise RuntimeError('no')\n", "no"),
    "it divides by 0": (b"def get_config():\n    return 1 / 0\n", "division"),
    "it raises at once": (b"raise ValueError('at once')\n", "at once"),
    "a module that is not there": (b"import no_such_module\n", "no_such_module"),
    "a name that is not there": (b"def get_config():\n    return conf\n", "conf"),
    "it ends Python": (b"import sys\nsys.exit('bye')\n", r"my\.py|bye"),
    "it returns nothing": (b"def get_config():\n    pass\n", r"my\.py|get_config"),
    "it returns a dict": (b"def get_config():\n    return {}\n", r"my\.py|get_config"),
    "it returns an empty config": (
        b"import ml_collections\nget_config = ml_collections.ConfigDict\n",
        "train|missing",
    ),
    "it wants an argument": (b"def get_config(x):\n    return x\n", r"my\.py|argument"),
    "get_config is a number": (b"get_config = 3\n", r"my\.py|callable"),
    "a section removed": (
        f"{START}    del config.loss\n    return config\n".encode(),
        "loss",
    ),
    "a key removed": (
        f"{START}    del config.train.steps\n    return config\n".encode(),
        "steps",
    ),
    "a section that is a number": (
        f"{START}    config.data = 3\n    return config\n".encode(),
        "data",
    ),
    "a value of None": (
        f"{START}    config.train.crop = None\n    return config\n".encode(),
        "crop",
    ),
    "an unknown option": (
        f"{START}    config.data.cells.sise = (16, 16)\n    return config\n".encode(),
        "sise",
    ),
    "an unknown section": (
        f"{START}    config.modle = 3\n    return config\n".encode(),
        "modle",
    ),
    "an array": (
        f"{START}    import numpy\n    config.train.crop = numpy.ones(2)\n"
        "    return config\n".encode(),
        "crop",
    ),
    "a function": (
        f"{START}    with config.unlocked(): config.train.steps = len\n"
        "    return config\n".encode(),
        "steps",
    ),
}


def _with_values(folder: Path, values: dict[str, object]) -> list[str]:
    return trained(folder, values)


def _with_file(folder: Path, content: bytes, command: str) -> list[str]:
    (folder / "my.py").write_bytes(content)
    if command == "train.py":
        return ["train.py", "--config=my.py", "--workdir=run"]
    return ["unet-jax", command, "--config=my.py"]


# --- Command lines -------------------------------------------------------------------

LINES: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "--workdir"),
    "an unknown flag": (["--wrkdir=a"], "wrkdir"),
    "a word": (["train", "--workdir=a"], "'train'"),
    "an empty workdir": (["--workdir="], "--workdir"),
    "no config file": (["--config=nowhere.py", "--workdir=a"], r"nowhere\.py"),
    "an empty config file": (["--config=", "--workdir=a"], "config"),
    "a folder for a config": (["--config=.", "--workdir=a"], "config"),
    "a config twice": (["--config=a.py", "--config=b.py", "--workdir=a"], r"a\.py"),
    "negative devices": (["--devices=-1", "--workdir=a"], "devices"),
    "two trials": (["--find_lr", "--overfit_one_batch"], "find_lr"),
    "a value without a key": (["--config.=3", "--workdir=a"], "config"),
    "a key without a value": (["--config.train.steps", "--workdir=a"], "steps"),
    "a key of code": (
        ["--config.train.crop=__import__('os').mkdir('harm')", "--workdir=a"],
        "crop",
    ),
}


# --- Workdirs ------------------------------------------------------------------------


def _workdir(folder: Path, change: Callable[[Path], object], **more: str) -> list[str]:
    change(folder)
    values = {key.replace("__", "."): value for key, value in more.items()}
    return trained(folder, {"train.steps": 2, **values})


def _damaged(folder: Path) -> None:
    for file in (copied(folder) / "checkpoints" / "1").rglob("*"):
        if file.is_file():
            halved(file)


def _foreign(folder: Path) -> None:
    (folder / "run" / "checkpoints" / "7").mkdir(parents=True)
    (folder / "run" / "checkpoints" / "7" / "notes.txt").write_text("hello")


def _without_training(folder: Path) -> None:
    shutil.rmtree(copied(folder) / "checkpoints" / "1" / "training")
    shutil.rmtree(folder / "run" / "sums")


def _is_members(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "members.json").write_text(json.dumps({"members": ["../x"]}))


WORKDIRS: dict[str, tuple[Callable[[Path], object], dict[str, str], str]] = {
    "a file": (lambda d: (d / "run").write_text("x"), {}, "run"),
    "below a file": (
        lambda d: ((d / "x").write_text("x"), (d / "run").symlink_to(d / "x" / "y")),
        {},
        "run",
    ),
    "a link to nothing": (
        lambda d: (d / "run").symlink_to("nowhere/at/all"),
        {},
        "run",
    ),
    "a link to itself": (lambda d: (d / "run").symlink_to("run"), {}, "run"),
    "not writable": (lambda d: (d / "run").symlink_to("/proc"), {}, "/run"),
    "a damaged checkpoint": (_damaged, {}, "is whole"),
    "a foreign checkpoint": (_foreign, {}, "damaged|checkpoint"),
    "another net": (copied, {"model__features": "(2,6)"}, "features"),
    "another task": (
        copied,
        {
            "task": "labels",
            "loss__cross_entropy": "0.0",
            "loss__binary_cross_entropy": "1.0",
        },
        "task|num_classes",
    ),
    "another optimizer": (copied, {"optim__name": "sgd"}, r"optim"),
    "fewer steps than it has": (copied, {"train__steps": "1"}, ""),
    "a part missing": (_without_training, {}, "training"),
    "members for one run": (_is_members, {}, "member|fold|seed"),
    "one run for members": (copied, {"members__seeds": "2"}, "seed|member"),
    "checkpoints that are a file": (
        lambda d: (
            (d / "run").mkdir(),
            (d / "run" / "checkpoints").write_text("no folder"),
        ),
        {},
        "checkpoints",
    ),
    "a log that is a folder": (
        lambda d: (d / "run" / "train.csv").mkdir(parents=True),
        {},
        r"train\.csv",
    ),
}


CASES = [
    *(
        Case("config values", name, partial(_with_values, values=values), says)
        for name, (values, says) in VALUES.items()
    ),
    *(
        Case(
            "config files", name, partial(_with_file, content=c, command="train.py"), s
        )
        for name, (c, s) in CONFIGS.items()
    ),
    *(
        Case("configs of unet-jax", name, partial(_with_file, content=c, command=x), s)
        for x in ("augment",)
        for name, (c, s) in CONFIGS.items()
    ),
    *(
        Case("command lines", name, lambda d, line=line: ["train.py", *line], says)
        for name, (line, says) in LINES.items()
    ),
    *(
        Case(
            "workdirs",
            name,
            partial(_workdir, change=change, **more),
            says,
            works=not says,
        )
        for name, (change, more, says) in WORKDIRS.items()
    ),
]
