"""Inputs that the commands of ``unet-jax`` cannot work with."""

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.reliability.bad_images import (
    GREY,
    RGB,
    Code,
    halved,
    harmed,
    npy,
    pairs,
    picture,
    png_of,
    saved,
)
from benchmarks.reliability.case import Case, copied, workdir

Make = Callable[[Path], object]
"""makes files in a folder"""


def _nothing(folder: Path) -> None:
    pass


def _file(name: str, content: bytes) -> Make:
    """Makes one file."""

    def make(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return make


IMAGE = _file("a.png", saved(picture()))


def _command(folder: Path, make: Make, line: list[str]) -> list[str]:
    """A command line in which WORKDIR is that of a run."""
    make(folder)
    there = (folder / "run").exists() or not any("WORKDIR" in word for word in line)
    run = folder / "run" if there else workdir()
    return ["unet-jax", *(word.replace("WORKDIR", str(run)) for word in line)]


RUN = "--workdir=WORKDIR"

# --- predict -------------------------------------------------------------------------


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "a.png")


def _zeros(folder: Path) -> None:
    (folder / "a.png").symlink_to("/dev/zero")


def _damaged(folder: Path) -> None:
    IMAGE(folder)
    for file in (copied(folder) / "checkpoints" / "1").rglob("*"):
        if file.is_file():
            halved(file)


def _without_meta(folder: Path) -> None:
    IMAGE(folder)
    shutil.rmtree(copied(folder) / "checkpoints" / "1" / "meta")


def _same_stem(folder: Path) -> None:
    IMAGE(folder)
    (folder / "other").mkdir()
    IMAGE(folder / "other")


def _out_is_file(folder: Path) -> None:
    IMAGE(folder)
    (folder / "out").write_text("x")


def _members(folder: Path, content: object) -> None:
    IMAGE(folder)
    (folder / "run").mkdir()
    (folder / "run" / "members.json").write_text(json.dumps(content))


# What is wrong: (files, what follows the workdir, what the sentence must have).
PREDICT: dict[str, tuple[Make, list[str], str]] = {
    "no such image": (_nothing, ["b.png"], r"b\.png does not exist"),
    "a glob of nothing": (_nothing, ["*.png"], r"\*\.png"),
    "an empty folder": (lambda d: (d / "in").mkdir(), ["in"], "in holds no image"),
    "no image": (_file("a.txt", b"x"), ["a.txt"], r"a\.txt"),
    "a name with a zero": (_nothing, ["a\0b.png"], r"a.{1,6}b\.png"),
    "an empty name": (_nothing, [""], "image|exist"),
    "a very long name": (_nothing, ["b" * 5000], "bbbb"),
    "an empty file": (_file("a.png", b""), ["a.png"], r"a\.png"),
    "a damaged file": (_file("a.png", saved(GREY)[:99]), ["a.png"], r"a\.png"),
    "a bomb": (_file("a.png", png_of(20000, 20000, bytes(10**6))), ["a.png"], "a.png"),
    "nan": (_file("a.npy", npy(GREY * np.nan)), ["a.npy"], r"a\.npy.*NaN"),
    "objects": (_file("a.npy", npy(np.array([{}], object))), ["a.npy"], r"a\.npy"),
    "a pickle": (_file("a.npy", pickle.dumps([1])), ["a.npy"], r"a\.npy"),
    "no pixels": (_file("a.npy", npy(np.zeros((0, 4)))), ["a.npy"], r"a\.npy"),
    "one axis": (_file("a.npy", npy(np.zeros(4))), ["a.npy"], r"a\.npy"),
    "five axes": (_file("a.npy", npy(np.zeros((2,) * 5))), ["a.npy"], r"a\.npy"),
    "seven channels": (
        _file("a.npy", npy(np.zeros((1, 9, 9, 7), np.uint8))),
        ["a.npy"],
        r"a\.npy.*7 channels",
    ),
    "text as NIfTI": (_file("a.nii", b"x" * 999), ["a.nii"], r"a\.nii"),
    "a pipe": (_fifo, ["a.png"], r"a\.png"),
    "an image without end": (_zeros, ["a.png"], r"a\.png"),
    "out over the input": (IMAGE, ["a.png", "--out=."], "overwrite"),
    "two of one name": (_same_stem, ["a.png", "other/a.png"], r"a\.png"),
    "out is a file": (_out_is_file, ["a.png"], "out"),
    "out that cannot be": (IMAGE, ["a.png", "--out=/dev/null/x"], "/dev/null"),
    "a negative tile": (IMAGE, ["a.png", "--tile=-16"], "tile"),
    "a tile of text": (IMAGE, ["a.png", "--tile=big"], "tile"),
    "an overlap of 1": (IMAGE, ["a.png", "--tile=16", "--overlap=1"], "overlap"),
    "an overlap of nan": (IMAGE, ["a.png", "--tile=16", "--overlap=nan"], "overlap"),
    "a negative overlap": (IMAGE, ["a.png", "--tile=16", "--overlap=-1"], "overlap"),
    "an unknown blend": (IMAGE, ["a.png", "--tile=16", "--blend=cosine"], "cosine"),
    "unknown views": (IMAGE, ["a.png", "--tta=crops"], "crops"),
    "unknown post-processing": (IMAGE, ["a.png", "--postprocess=shrink"], "shrink"),
    "small of nothing": (IMAGE, ["a.png", "--postprocess=small"], "small"),
    "small of text": (IMAGE, ["a.png", "--postprocess=small=big"], "small"),
    "small below 0": (IMAGE, ["a.png", "--postprocess=small=-3"], "small"),
    "an unknown method": (IMAGE, ["a.png", "--instances=magic"], "magic"),
    "a negative batch": (IMAGE, ["a.png", "--batch_size=-2"], "batch_size"),
    "no batch": (IMAGE, ["a.png", "--batch_size=0"], "batch_size"),
    "a mesh of text": (IMAGE, ["a.png", "--mesh=all"], "--mesh=all"),
    "a mesh of 99": (IMAGE, ["a.png", "--mesh=1x99"], "--mesh=1x99"),
    "a mesh of 0": (IMAGE, ["a.png", "--mesh=0x1"], "--mesh=0x1"),
    "an unknown checkpoint": (IMAGE, ["a.png", "--which=9"], "9"),
    "a checkpoint of text": (IMAGE, ["a.png", "--which=good"], "good"),
    "a checkpoint beyond all": (IMAGE, ["a.png", f"--which={'9' * 30}"], "999"),
    "no workdir": (IMAGE, ["a.png", "--workdir=nowhere"], "nowhere"),
    "an empty workdir": (
        lambda d: (IMAGE(d), (d / "w").mkdir()),
        ["a.png", "--workdir=w"],
        "no checkpoint in w",
    ),
    "a workdir of commas": (IMAGE, ["a.png", "--workdir=,,"], "workdir|checkpoint"),
    "a workdir that is a file": (IMAGE, ["a.png", "--workdir=a.png"], r"a\.png"),
    "one workdir of two": (IMAGE, ["a.png", "--workdir=WORKDIR,nowhere"], "nowhere"),
    "a damaged checkpoint": (_damaged, ["a.png"], "damaged"),
    "a checkpoint without its net": (_without_meta, ["a.png"], "damaged|meta"),
    "members that are no list": (
        partial(_members, content={"members": 3}),
        ["a.png"],
        r"members\.json",
    ),
    "members that are not there": (
        partial(_members, content={"members": ["fold_1"]}),
        ["a.png"],
        "fold_1",
    ),
    "members of numbers": (
        partial(_members, content={"members": [1, 2]}),
        ["a.png"],
        r"members\.json",
    ),
    "no members": (
        partial(_members, content={"members": []}),
        ["a.png"],
        r"members\.json|workdir",
    ),
    "nothing": (_nothing, [], "IMAGES"),
    "an unknown flag": (IMAGE, ["a.png", "--tiles=3"], "--tiles=3"),
}


# --- evaluate, prune -----------------------------------------------------------------

# What is wrong: (files, the rest of the command line, what the sentence must have).
EVALUATE: dict[str, tuple[Make, list[str], str]] = {
    "an unknown split": (_nothing, [RUN, "--split=tset["], r"tset\["),
    "a split beyond the end": (_nothing, [RUN, "--split=val[:9999]"], "9999"),
    "an empty split": (_nothing, [RUN, "--split="], "split"),
    "a negative batch": (_nothing, [RUN, "--batch_size=-1"], "batch_size"),
    "an unknown measure": (_nothing, [RUN, "--metrics=accuracy2"], "accuracy2"),
    "no samples": (_nothing, [RUN, "--bootstrap=0"], "bootstrap|samples"),
    "negative samples": (_nothing, [RUN, "--bootstrap=-5"], "bootstrap|samples"),
    "a negative tolerance": (
        _nothing,
        [RUN, "--metrics=boundary", "--tolerance=-1"],
        "tolerance",
    ),
    "a tolerance of nan": (
        _nothing,
        [RUN, "--metrics=boundary", "--tolerance=nan"],
        "tolerance",
    ),
    "an unknown method": (
        _nothing,
        [RUN, "--metrics=objects", "--instances=magic"],
        "magic",
    ),
    "against nothing": (_nothing, [RUN, "--against=nowhere"], "nowhere"),
    "an unknown score of nothing": (_nothing, [RUN, "--empty=two"], "two"),
    "no workdir": (_nothing, ["--workdir=nowhere"], "nowhere"),
    "no config": (_nothing, [RUN, "--config=nowhere.py"], r"nowhere\.py"),
    "a config that is no Python": (
        _file("my.py", b"train:\n  steps: 3\n"),
        [RUN, "--config=my.py"],
        r"my\.py",
    ),
    "an unknown key": (
        _nothing,
        [RUN, "--config=CONFIG", "--config.data.rot=a"],
        "rot",
    ),
    "another root": (
        _nothing,
        [RUN, "--config=CONFIG", "--config.data.source=folder", "--root=nowhere"],
        "nowhere",
    ),
    "data of other channels": (
        lambda d: (
            pairs(d / "data"),
            [
                (d / f"data/images/{k}.png").write_bytes(saved(RGB, ".png"))
                for k in "abcd"
            ],
        ),
        [
            RUN,
            "--config=CONFIG",
            "--config.data.source=folder",
            "--config.data.folder.label_names=('background','cell')",
            "--root=data",
            "--split=all",
        ],
        "channels",
    ),
    "data of other classes": (
        lambda d: pairs(d / "data"),
        [
            RUN,
            "--config=CONFIG",
            "--config.data.source=folder",
            "--root=data",
            "--split=all",
        ],
        "label_names",
    ),
    "an option of another kind": (
        _nothing,
        [RUN, "--config=CONFIG", "--config.data.cells.size=('a','b')"],
        "size",
    ),
}

PRUNE: dict[str, tuple[Make, list[str], str]] = {
    "no UNet++": (_nothing, [RUN], "deep supervision|UNet"),
    "a level without out": (_nothing, [RUN, "--level=1"], "--out"),
    "an out without level": (_nothing, [RUN, "--out=o"], "--level"),
    "a level of text": (_nothing, [RUN, "--level=top", "--out=o"], "level"),
    "no workdir": (_nothing, ["--workdir=nowhere"], "nowhere"),
    "no repeats": (_nothing, [RUN, "--repeats=0"], "repeats|deep supervision"),
}


# --- convert -------------------------------------------------------------------------


def _torch_zip(pickled: bytes, extra: bytes = b"") -> bytes:
    """A file as torch.save writes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/data.pkl", pickled)
        archive.writestr("net/version", "3\n")
        if extra:
            archive.writestr("net/data/0", extra)
    return file.getvalue()


def _code(folder: Path, zipped: bool) -> None:
    pickled = pickle.dumps({"state_dict": Code(folder)}, protocol=2)
    (folder / "net.pth").write_bytes(_torch_zip(pickled) if zipped else pickled)


def _safetensors(header: object, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (length or len(text)).to_bytes(8, "little") + text + bytes(64)


def _tensor(shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"x.weight": {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}}


N = "net.pth"
S = "net.safetensors"

CONVERT: dict[str, tuple[Make, list[str], str]] = {
    "no file": (_nothing, [N], r"net\.pth"),
    "empty": (_file(N, b""), [N], r"net\.pth"),
    "text": (_file(N, b"weights\n" * 99), [N], r"net\.pth"),
    "random bytes": (_file(N, np.random.default_rng(0).bytes(999)), [N], r"net\.pth"),
    "a web page": (_file(N, b"<!DOCTYPE html><html>"), [N], r"net\.pth.*web page"),
    "a Git LFS pointer": (
        _file(N, b"version https://git-lfs.github.com/spec/v1\n"),
        [N],
        r"net\.pth.*LFS",
    ),
    "a pickle that runs code": (partial(_code, zipped=False), [N], r"net\.pth"),
    "a zip that runs code": (partial(_code, zipped=True), [N], r"net\.pth"),
    "an empty zip": (_file(N, b"PK\5\6" + bytes(18)), [N], r"net\.pth"),
    "half a zip": (_file(N, _torch_zip(pickle.dumps({}))[:60]), [N], r"net\.pth"),
    "a zip bomb": (
        _file(N, _torch_zip(bytes(2**27), bytes(2**27))),
        [N],
        r"net\.pth",
    ),
    "no weights": (_file(N, _torch_zip(pickle.dumps({"a": 1}))), [N], r"net\.pth"),
    "a list": (_file(N, pickle.dumps([1, 2])), [N], r"net\.pth"),
    "a number": (_file(N, pickle.dumps(3)), [N], r"net\.pth"),
    "deep": (_file(N, b"\x80\x02" + b"]" * 10**5 + b"."), [N], r"net\.pth"),
    "no header": (_file(S, bytes(8)), [S], r"net\.safetensors"),
    "a header without end": (_file(S, _safetensors({}, 2**60)), [S], S),
    "a header of text": (_file(S, _safetensors(b"{nonsense")), [S], S),
    "offsets beyond the end": (_file(S, _safetensors(_tensor([9], 0, 999))), [S], S),
    "offsets backwards": (_file(S, _safetensors(_tensor([4], 16, 0))), [S], S),
    "another length": (_file(S, _safetensors(_tensor([99, 99], 0, 64))), [S], S),
    "negative sizes": (_file(S, _safetensors(_tensor([-4, -4], 0, 64))), [S], S),
    "weights of no U-Net": (_file(S, _safetensors(_tensor([16], 0, 64))), [S], S),
    "a folder of nothing": (
        lambda d: (d / "net").mkdir(),
        ["net", "--out=x.pth"],
        "net",
    ),
    "a workdir without out": (_nothing, ["WORKDIR"], "--out"),
    "an unknown ending": (
        _nothing,
        ["WORKDIR", "--out=x.onnx", "--family=milesial"],
        r"x\.onnx",
    ),
    "an unknown dtype": (
        _nothing,
        ["WORKDIR", "--out=x.safetensors", "--dtype=int8"],
        "int8",
    ),
    "an unknown family": (
        _nothing,
        ["WORKDIR", "--out=x.safetensors", "--family=lenet"],
        "lenet",
    ),
    "a mean of text": (_file(N, b"x"), [N, "--mean=a,b"], "mean|net"),
    "an option without value": (_file(N, b"x"), [N, "--option=depth"], "option|net"),
    "classes of a workdir": (_nothing, ["WORKDIR", "--classes=3"], "--classes"),
    "a module without an image": (_file(N, b"x"), [N, "--module=a.py:f()"], "--check"),
    "out that is there": (
        lambda d: (_file(N, b"x")(d), (d / "o").mkdir(), _file("o/x", b"x")(d)),
        [N, "--out=o"],
        "o",
    ),
}


# --- shapes, features, augment, inspect ----------------------------------------------

SHAPES: dict[str, tuple[Make, list[str], str]] = {
    "a size of text": (_nothing, ["--size=big"], "--size=big"),
    "a size of 0": (_nothing, ["--size=0"], "--size=0"),
    "a negative size": (_nothing, ["--size=-5"], "--size=-5"),
    "a size of halves": (_nothing, ["--size=5.5x3"], r"--size=5\.5x3"),
    "a size of four axes": (_nothing, ["--size=2x2x2x2"], "--size=2x2x2x2"),
    "an empty size": (_nothing, ["--size="], "--size="),
    "a size too small": (_nothing, ["--size=20", "--config.model.padding=valid"], "20"),
    "a size of odd digits": (_nothing, ["--size=\u0663\u00b2"], "--size"),
    "an absurd size": (_nothing, [f"--size={'9' * 5000}"], "--size"),
    "no channels": (_nothing, ["--size=16", "--channels=0"], "channel"),
    "no classes": (_nothing, ["--size=16", "--classes=0"], "classes"),
    "an unknown net": (_nothing, ["--config.model.name=resnet"], "resnet"),
    "an unknown field": (_nothing, ["--config.model.depth=3"], "depth"),
    "another section": (_nothing, ["--config.train.steps=3"], "steps"),
    "a field without value": (_nothing, ["--config.model.act"], "act"),
    "features of text": (_nothing, ["--config.model.features=many"], "features"),
    "no config": (_nothing, ["--config=nowhere.py"], r"nowhere\.py"),
    "a config and a workdir": (_nothing, [RUN, "--config=CONFIG"], "--config"),
    "another format": (_nothing, ["--size=16", "--out=net.pdf"], r"\.svg"),
    "out that cannot be": (
        _nothing,
        ["--size=16", "--out=/dev/null/x.png"],
        "/dev/null",
    ),
}

FEATURES: dict[str, tuple[Make, list[str], str]] = {
    "no image": (_nothing, [RUN, "b.png"], r"b\.png"),
    "a damaged image": (_file("a.png", saved(GREY)[:99]), [RUN, "a.png"], r"a\.png"),
    "no maps": (IMAGE, [RUN, "a.png", "--maps=0"], "channels|maps"),
    "a pixel of text": (IMAGE, [RUN, "a.png", "--pixel=here"], "here"),
    "a pixel outside": (IMAGE, [RUN, "a.png", "--pixel=999,3"], "999"),
    "a pixel of three": (IMAGE, [RUN, "a.png", "--pixel=1,2,3"], "1, 2, 3|1,2,3"),
    "another format": (IMAGE, [RUN, "a.png", "--out=a.docx"], r"a\.docx"),
    "out that cannot be": (IMAGE, [RUN, "a.png", "--out=/dev/null/x.png"], "/dev/null"),
}

FEW = ["--config.data.cells.size=(16,16)", "--config.data.cells.examples=2"]
FEW += ["--config.train.crop=(16,16)"]

AUGMENT: dict[str, tuple[Make, list[str], str]] = {
    "no config": (_nothing, ["--config=nowhere.py"], r"nowhere\.py"),
    "another format": (_nothing, ["--config=CONFIG", "--out=a.gif"], r"a\.gif"),
    "no examples": (_nothing, ["--config=CONFIG", *FEW, "--examples=0"], "examples"),
    "negative draws": (_nothing, ["--config=CONFIG", *FEW, "--draws=-1"], "draws"),
    "an unknown key": (
        _nothing,
        ["--config=CONFIG", "--config.augment.rotat=3"],
        "rotat",
    ),
    "an option of another kind": (
        _nothing,
        ["--config=CONFIG", "--config.augment.rotate=much"],
        "rotate",
    ),
    "another section": (_nothing, ["--config=CONFIG", "--config.model=3"], "model"),
    "no data": (
        _nothing,
        ["--config=CONFIG", "--config.data.source=folder"],
        r"data\.root",
    ),
}


def _with_config(folder: Path) -> None:
    (folder / "mine.py").write_text("taken")
    pairs(folder / "data")


INSPECT: dict[str, tuple[Make, list[str], str]] = {
    "nothing": (_nothing, [], "folder"),
    "no folder": (_nothing, ["nowhere"], "nowhere"),
    "an empty folder": (lambda d: (d / "x").mkdir(), ["x"], "x"),
    "a file": (_file("a.png", saved(GREY)), ["a.png"], r"a\.png"),
    "a folder of texts": (
        lambda d: ((d / "x").mkdir(), _file("x/a.txt", b"x")(d)),
        ["x"],
        "x",
    ),
    "images alone": (
        lambda d: (pairs(d / "x"), shutil.rmtree(d / "x" / "masks")),
        ["x"],
        "mask",
    ),
    "an unknown TFDS": (_nothing, ["tfds:no_such_set"], "no_such_set"),
    "a TFDS without name": (_nothing, ["tfds:"], "tfds|name"),
    "a folder and a config": (_nothing, ["x", "--config=CONFIG"], "--config"),
    "no limit": (lambda d: pairs(d / "x"), ["x", "--limit=0"], "--limit=0"),
    "another picture": (lambda d: pairs(d / "x"), ["x", "--out=a.gif"], "--out=a"),
    "another config": (
        lambda d: pairs(d / "x"),
        ["x", "--write-config=a.json"],
        "--write-config",
    ),
    "a config that is there": (
        _with_config,
        ["data", "--write-config=mine.py"],
        r"mine\.py exists",
    ),
    "out that cannot be": (
        lambda d: pairs(d / "x"),
        ["x", "--out=/dev/null/x.png"],
        "/dev/null",
    ),
    "JSON that cannot be": (
        lambda d: pairs(d / "x"),
        ["x", "--json=/dev/null/x.json"],
        "/dev/null",
    ),
    "every image damaged": (
        lambda d: (
            pairs(d / "x"),
            [(d / f"x/images/{k}.png").write_bytes(b"x") for k in "abcd"],
        ),
        ["x"],
        r"\.png",
    ),
    "an image that leads out": (
        lambda d: (
            pairs(d / "x"),
            (d / "x/images/b.png").rename(d / "b.png"),
            (d / "x/images/b.png").symlink_to(d / "b.png"),
        ),
        ["x"],
        r"b\.png",
    ),
}

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "default.py")


def _predict(folder: Path, make: Make, line: list[str]) -> list[str]:
    given = {word.split("=")[0] for word in line}
    more = [flag for flag in (RUN, "--out=out") if flag.split("=")[0] not in given]
    return _command(folder, make, ["predict", *more, *line])


def _cases(
    command: str, table: dict[str, tuple[Make, list[str], str]], *, harm: bool = False
) -> list[Case]:
    found = []
    for name, (make, words, says) in table.items():
        line = [command, *(word.replace("CONFIG", CONFIG) for word in words)]
        case = Case(command, name, partial(_command, make=make, line=line), says)
        found.append(case._replace(harm=harmed) if harm else case)
    return found


CASES = [
    *(
        Case("predict", name, partial(_predict, make=make, line=line), says)
        for name, (make, line, says) in PREDICT.items()
    ),
    *_cases("evaluate", EVALUATE),
    *_cases("prune", PRUNE),
    *_cases("convert", CONVERT, harm=True),
    *_cases("shapes", SHAPES),
    *_cases("features", FEATURES),
    *_cases("augment", AUGMENT),
    *_cases("inspect", INSPECT),
]
