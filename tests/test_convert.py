"""From PyTorch to a workdir and back, beside PyTorch, and training from weights."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

import train
from configs import default
from unet_jax import (
    cli,
    convert,
    models,
    normalisation,
    parity,
    run,
    sharding,
    torch_weights,
    transfer,
)
from unet_jax.checkpoint import load_for_inference
from unet_jax.predict import Predictor
from unet_jax.torch_weights import containers
from unet_jax.types import InputError

TINY = {
    "data.cells.size": (16, 16),
    "data.cells.examples": 4,
    "train.crop": (16, 16),
    "train.batch_size": 2,
    "train.eval_batch_size": 2,
    "train.steps": 2,
    "train.log_every": 1,
    "optim.warmup_steps": 0,
    "mesh.data": 1,
}
CELLS = [
    "--config=configs/default.py",
    "--config.data.cells.size=(16,16)",
    "--config.data.cells.examples=3",
]


def randomised(model, channels=1, size=16, seed=0):
    """Variables of a net as if it had been trained: no statistic is 0 or 1."""
    image = np.zeros((1, size, size, channels), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    rng = np.random.default_rng(seed)

    def draw(path, x):
        value = rng.normal(scale=0.3, size=x.shape)
        return np.asarray(abs(value) + 0.5 if path[-1].key == "var" else value, "f4")

    return jax.tree_util.tree_map_with_path(draw, shapes)


def unet(**fields):
    fields = {"num_classes": 2, "features": (4, 8, 8), **fields}
    return models.build("unet", norm="batch_unbiased", **fields)


def weights(path, *, dtype="float32", channels=1, **fields):
    """A PyTorch file of a small U-Net in milesial's names: (model, variables)."""
    model = unet(**fields)
    variables = randomised(model, channels)
    torch_weights.save(path, model, variables, "milesial", dtype=dtype)
    return model, variables


def picture(path, *shape, seed=0):
    image = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(image).save(path)
    return image


def config(**changes):
    found = default.get_config()
    with found.unlocked():
        for key, value in {**TINY, **changes}.items():
            found.update_from_flattened_dict({key: value})
    return train.chosen(found)


def main(*arguments):
    return cli.main(["convert", *map(str, arguments)])


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def leaves(tree):
    return {
        "/".join(part.key for part in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


# --- In ------------------------------------------------------------------------------


def test_a_workdir_says_what_the_net_says(tmp_path, capsys):
    model, variables = weights(tmp_path / "unet.safetensors")
    out = tmp_path / "runs" / "unet"
    names = "--classes=background,cell"
    assert main(tmp_path / "unet.safetensors", f"--out={out}", names) == 0
    text = capsys.readouterr().out
    assert "do not say: merge = 'concat', padding = 'same', act = 'relu'" in text
    for part in ("milesial", "features = (4, 8, 8)", "1 channel", f"--workdir={out}"):
        assert part in text
    assert "starts anew" not in text
    _, found, meta, step = load_for_inference(out)
    assert_same(found, variables)
    assert (step, meta.task, meta.label_names) == (0, "classes", ("background", "cell"))
    assert meta.torch["source"] == "unet.safetensors" and meta.config == {}
    # White is 1 in every type, and floats are as they are.
    grey = np.random.default_rng(0).random((16, 20)).astype(np.float32)
    pixels = {np.uint8: 255, np.uint16: 65535}
    images = [np.rint(grey * white).astype(kind) for kind, white in pixels.items()]
    predictor = Predictor(out)
    for image in (*images, grey):
        scale = pixels.get(image.dtype.type, 1)
        given = image[None, ..., None].astype(np.float32) / np.float32(scale)
        expected = jax.nn.softmax(model.apply(variables, given)[0])
        _, probability = predictor(image)
        np.testing.assert_allclose(probability, expected[0], atol=2e-6)
    # There is no other file beside it, and it is not written over.
    assert [p.name for p in out.parent.iterdir()] == ["unet"]
    assert main(tmp_path / "unet.safetensors", f"--out={out}") == 2
    assert "already there" in capsys.readouterr().err


def test_mean_and_deviation_are_of_pixels_up_to_1():
    stats = normalisation.stated(None, 3, mean=(0.5, 0.25, 0.0), std=(0.5,))
    assert stats["kind"] == "standard" and json.loads(json.dumps(stats))
    image = np.full((1, 2, 2, 3), 255, np.uint8)
    for pixels in (image, (image * np.float32(1 / 255)).astype(np.float32)):
        out = jax.jit(lambda x: normalisation.normalise(x, stats))(pixels)
        np.testing.assert_allclose(out[0, 0, 0], [1.0, 1.5, 2.0], rtol=1e-6)
    example = normalisation.stated("example", 2)
    assert example["kind"] == "example" and example["shift"] == (0.0, 0.0)


def test_another_number_of_classes_renews_the_head_alone(tmp_path, capsys):
    path = tmp_path / "unet.safetensors"
    _, variables = weights(path)
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        assert main(path, f"--out={out}", "--classes=3", f"--seed={seed}") == 0
        assert "head starts anew, for 3 class(es) instead of 2" in (
            capsys.readouterr().out
        )
    first, same, other = (
        load_for_inference(tmp_path / name) for name in ("1", "2", "3")
    )
    assert first[2].label_names == ("background", "class_1", "class_2")
    assert_same(first[1], same[1])
    old, new, others = leaves(variables), leaves(first[1]), leaves(other[1])
    changed = {key for key in old if not np.array_equal(old[key], new[key])}
    assert changed == {"params/head/kernel", "params/head/bias"}
    assert not np.array_equal(new["params/head/kernel"], others["params/head/kernel"])


def test_names_and_tasks(tmp_path):
    path = tmp_path / "unet.safetensors"
    weights(path, num_classes=1)
    found = torch_weights.read(path)
    meta = convert.meta_of(found, path)
    assert (meta.task, meta.label_names) == ("labels", ("foreground",))
    meta = convert.meta_of(found, path, classes=2)
    assert (meta.task, meta.label_names) == ("classes", ("background", "foreground"))
    meta = convert.meta_of(found, path, classes=("a", "b"), task="labels")
    assert (meta.task, meta.label_names) == ("labels", ("a", "b"))
    assert convert.label_names("labels", 2) == ("class_1", "class_2")
    meta = convert.meta_of(found, path, kind="standard", config=config())
    assert meta.normalisation["dtype"] == "uint8"
    with pytest.raises(InputError, match="use labels"):
        convert.meta_of(found, path, task="classes")


def test_evaluate_takes_data_from_a_config(tmp_path, capsys):
    path = tmp_path / "unet.safetensors"
    weights(path)
    bare, whole = tmp_path / "bare", tmp_path / "whole"
    assert main(path, f"--out={bare}") == 0
    assert main(path, f"--out={whole}", "--classes=background,cell", *CELLS) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", f"--workdir={bare}"]) == 2
    assert "--config=FILE" in capsys.readouterr().err
    assert cli.main(["evaluate", f"--workdir={whole}", "--split=val"]) == 0
    text = capsys.readouterr().out.splitlines()
    assert cli.main(["evaluate", f"--workdir={bare}", "--split=val", *CELLS]) == 0
    # Nobody had named the classes: they have the names of the data.
    assert capsys.readouterr().out.splitlines()[2:] == text[2:]
    wrong = "--config.data.cells.sise=3"
    assert cli.main(["evaluate", f"--workdir={bare}", *CELLS, wrong]) == 2
    assert "sise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing.pth", "--out=w"], "there is no nothing.pth"),
        (["FILE", "--out=w", "--family=nested"], "not of the family 'nested'"),
        (["FILE", "--out=w", "--classes=a,,b"], "names with commas"),
        (["FILE", "--out=w", "--classes=0"], "names with commas"),
        (["FILE", "--out=w", "--mean=0.5"], "go together"),
        (["FILE", "--out=w", "--mean=a", "--std=1"], "--mean=a must be numbers"),
        (["FILE", "--out=w", "--mean=1,2", "--std=1"], "--mean has 2 numbers"),
        (["FILE", "--out=w", "--mean=1", "--std=0"], "must be above 0"),
        (["FILE", "--out=w", "--normalisation=standard"], "give --mean and --std"),
        (["FILE", "--out=w", "--normalisation=minmax"], "range"),
        (["FILE", "--out=w", "--task=class"], "--task ="),
        (["FILE", "--out=w", "--option=up"], "--option=KEY=VALUE"),
        (["FILE", "--out=w", "--option=act=rellu"], "relu"),
        (["FILE", "--out=w", "--config=none.py"], "none.py"),
        (["FILE", "--out=x.safetensors"], "give a folder"),
        (["FILE", "--out=w", "--dtype=float16"], "--dtype is not for a file"),
        (["FILE", "--module=a.py:b"], "give --check=IMAGE"),
        (["FILE", "--check=none.png"], "none.png"),
        (["empty", "--out=x.safetensors"], "no checkpoint in empty"),
        (["empty"], "which file to write"),
        (["empty", "--out=x.safetensors", "--classes=2"], "--classes is not for a"),
    ],
)
def test_refusals_are_one_sentence_and_leave_nothing(
    arguments, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    weights("unet.safetensors")
    (tmp_path / "empty").mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    if "--check=none.png" in arguments and importlib.util.find_spec("torch") is None:
        says = "pip install torch"
    assert main(*(a.replace("FILE", "unet.safetensors") for a in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("unet-jax: error: ") and says in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "unet.safetensors"
    weights(path)
    found = torch_weights.read(path)
    meta = convert.meta_of(found, path)

    def fail(*args):
        raise InputError("the disk is full")

    monkeypatch.setattr(convert.Checkpoints, "save_variables", fail)
    with pytest.raises(InputError, match="full"):
        convert.workdir(found, meta, tmp_path / "w")
    assert [p.name for p in tmp_path.iterdir()] == ["unet.safetensors"]


# --- Out -----------------------------------------------------------------------------


def state(path):
    """What is in a file but for the counters, which are not kept."""
    tensors = containers.read(path).tensors
    return {k: v for k, v in tensors.items() if not k.endswith("batches_tracked")}


def assert_same_bits(a, b):
    assert set(a) == set(b)
    for key, value in a.items():
        assert value.dtype == b[key].dtype and value.shape == b[key].shape, key
        assert value.tobytes() == b[key].tobytes(), key


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_back_to_pytorch_bit_for_bit(dtype, tmp_path, capsys):
    path, out, back = (tmp_path / name for name in ("a.safetensors", "w", "b.pth"))
    weights(path, dtype=dtype)
    if dtype != "bfloat16":  # without PyTorch
        back = back.with_suffix(".safetensors")
    else:
        pytest.importorskip("torch")
    assert main(path, f"--out={out}") == 0
    assert main(out, f"--out={back}") == 0
    assert f"{dtype}, of the family milesial" in capsys.readouterr().out
    assert_same_bits(state(path), state(back))
    assert next(iter(state(back).values())).dtype == np.dtype(
        getattr(ml_dtypes, dtype, dtype)
    )
    assert main(out, f"--out={back}") == 2
    assert "already there" in capsys.readouterr().err
    whole = tmp_path / "c.safetensors"
    assert main(out, f"--out={whole}", "--dtype=float32") == 0
    assert {v.dtype for v in state(whole).values()} == {np.dtype(np.float32)}


def own(folder, **fields):
    """A workdir of train.py's, but for the training."""
    from test_predict import save

    from unet_jax.checkpoint import Meta

    model = models.build("unet", num_classes=2, features=(4, 8, 8), **fields)
    meta = Meta(
        model={"name": "unet", **models.fields(model)},
        task="classes",
        label_names=("background", "cell"),
        normalisation=normalisation.stated("range", 1),
        channels=1,
        rank=2,
    )
    save(folder, randomised(model), meta, step=3)
    return folder


def test_nets_of_our_own_go_to_families_they_are_in(tmp_path, capsys):
    run = own(tmp_path / "run")
    assert main(run, f"--out={tmp_path / 'a.safetensors'}") == 2
    assert "give --family, of which milesial" in capsys.readouterr().err
    assert main(run, f"--out={tmp_path / 'a.safetensors'}", "--family=nested") == 2
    assert "cannot be a nested net" in capsys.readouterr().err
    assert main(run, f"--out={tmp_path / 'a.safetensors'}", "--family=milesial") == 0
    model, variables, _, _ = load_for_inference(run)
    there, theirs = torch_weights.load(tmp_path / "a.safetensors")
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 1)).astype(np.float32)
    np.testing.assert_allclose(
        there.apply(theirs, image)[0], model.apply(variables, image)[0], atol=1e-5
    )


def test_shapes_that_fit_are_not_enough(tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    run = own(tmp_path / "wide", order="can")
    assert main(run, f"--out={out}", "--family=milesial") == 2
    error = capsys.readouterr().err
    assert "order = 'can'" in error and error.count("\n") == 1
    assert not out.exists()
    # What the family has no word for is refused, what it has one for is said.
    run = own(tmp_path / "elu", act="elu")
    assert main(run, f"--out={out}", "--family=milesial") == 0
    assert "they do not say that it has act = 'elu'" in capsys.readouterr().out
    run = own(tmp_path / "residual", block="residual")
    assert main(run, f"--out={out.with_name('b.pt')}") == 2
    assert "none of the families" in capsys.readouterr().err


# --- Beside PyTorch ------------------------------------------------------------------

MODULE = """
import torch
from torch import nn


class DoubleConv(nn.Module):
    def __init__(self, c, k, slope):
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(c, k, 3, padding=1, bias=False), nn.BatchNorm2d(k),
            nn.LeakyReLU(slope, inplace=True),
            nn.Conv2d(k, k, 3, padding=1, bias=False), nn.BatchNorm2d(k),
            nn.LeakyReLU(slope, inplace=True))

    def forward(self, x):
        return self.double_conv(x)


class Down(nn.Module):
    def __init__(self, c, k, slope):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(c, k, slope))

    def forward(self, x):
        return self.maxpool_conv(x)


class Up(nn.Module):
    def __init__(self, c, k, slope):
        super().__init__()
        self.up = nn.ConvTranspose2d(c, k, 2, 2)
        self.conv = DoubleConv(2 * k, k, slope)

    def forward(self, x, skip):
        return self.conv(torch.cat([skip, self.up(x)], 1))


class OutConv(nn.Module):
    def __init__(self, c, k):
        super().__init__()
        self.conv = nn.Conv2d(c, k, 1)

    def forward(self, x):
        return self.conv(x)


class UNet(nn.Module):
    def __init__(self, c, k, slope=0.0, squash=False):
        super().__init__()
        self.inc = DoubleConv(c, 4, slope)
        self.down1 = Down(4, 8, slope)
        self.down2 = Down(8, 8, slope)
        self.up1 = Up(8, 8, slope)
        self.up2 = Up(8, 4, slope)
        self.outc = OutConv(4, k)
        self.squash = squash

    def forward(self, x):
        a = self.inc(x)
        b = self.down1(a)
        y = self.outc(self.up2(self.up1(self.down2(b), b), a))
        return {"out": torch.sigmoid(y) if self.squash else y}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with weights, an image and the module that they are of."""
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    weights("unet.safetensors")
    picture("a.png", 19, 22)
    Path("unet.py").write_text(MODULE)
    return tmp_path


def test_each_layer_agrees_by_itself(folder, capsys):
    check = "--check=a.png"
    assert main("unet.safetensors", "--out=w", check) == 0
    text = capsys.readouterr().out
    assert "20 x 24 x 1" in text and "each layer by itself" in text
    assert "down2.maxpool_conv.1.double_conv.3" in text
    assert "all 23 agree to 2e-05" in text and Path("w").is_dir()
    assert main("unet.safetensors", "--out=v", check, "--tolerance=0") == 1
    text = capsys.readouterr().out
    assert text.count("<- the first over the tolerance") == 1
    assert "is the first that differs" in text and "v is not written" in text
    assert not Path("v").exists()


def test_a_layer_that_was_tampered_with_is_named(folder):
    found = torch_weights.read("unet.safetensors")
    image = np.random.default_rng(0).random((1, 16, 20, 1)).astype(np.float32)
    assert parity.first_over(parity.layers(found, image)) is None
    for path in ("decoder/up1/conv", "encoder/level2/norm0", "head"):
        wrong = jax.tree.map(np.array, found.variables)
        node = wrong["params"]
        for part in path.split("/"):
            node = node[part]
        node["bias"][1] += 1e-2
        rows = parity.layers(found, image, wrong)
        assert [row.path for row in rows if row.relative > 2e-5] == [path]
        bad = parity.first_over(rows)
        assert bad is not None and path in parity.verdict(rows)
        assert parity.table(rows).count("<-") == 1


def test_the_users_own_module_from_end_to_end(folder, capsys):
    file = ["unet.safetensors", "--check=a.png"]
    assert main(*file, "--module=unet.py:UNet(1, 2)") == 0
    text = capsys.readouterr().out
    assert "order of execution of unet.py" in text and "all 24 agree" in text
    assert "output['out']" in text
    assert main(*file, "--module=unet.py:UNet(1, 2, squash=True)") == 0
    assert "sigmoid of logits" in capsys.readouterr().out
    # Another activation, which the weights do not say: seen by the layer after it.
    assert main(*file, "--module=unet.py:UNet(1, 2, slope=0.1)") == 1
    text = capsys.readouterr().out
    assert "encoder/level0/conv1 (inc.double_conv.3) is the first that differs" in text


def test_a_module_in_a_package_finds_its_neighbours(folder, capsys):
    Path("net").mkdir()
    Path("net/__init__.py").write_text("")
    Path("net/parts.py").write_text(MODULE)
    Path("net/whole.py").write_text("from .parts import UNet\n")
    text = "--module=net/whole.py:UNet(1, 2)"
    assert main("unet.safetensors", "--check=a.png", text) == 0


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("unet.py", "a file and an expression"),
        ("other.py:UNet()", "there is no file other.py"),
        ("unet.py:UNet()", "did not run (TypeError"),
        ("unet.py:3", "gives a int"),
        ("unet.py:UNet(1, 3)", "are not those of the module"),
    ],
)
def test_modules_that_do_not_do(module, says, folder, capsys):
    arguments = ["--check=a.png", f"--module={module}"]
    assert main("unet.safetensors", *arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_every_kind_of_layer_has_its_counterpart():
    """Strides, wide kernels, groups, shuffles: nets of no family, by our own names."""
    pytest.importorskip("torch")
    cases = [
        {"norm": "group", "norm_groups": 2, "act": "prelu", "up": "pixel_shuffle"},
        {"norm": "instance", "padding": "reflect", "kernels": (3, 5, 3)},
        {"norm": "none", "down": "strided", "up": "transpose_wide"},
        {"up": "transpose_wide_short", "head_kernel": 3, "excite": "scse"},
        {"block": "recurrent", "merge": "gated", "up": "nearest_conv"},
    ]
    for fields in cases:
        fields = {"norm": "batch_unbiased", **fields}
        model = models.build("unet", num_classes=2, features=(4, 8, 8), **fields)
        variables = randomised(model, channels=2)
        names = {
            "/".join(path[1:-1]): ".".join(path[1:-1])
            for path in sorted(
                (tuple(key.split("/")) for key in leaves(variables)),
                key=lambda path: path[-2] != "project",  # which comes first
            )
        }
        tensors = torch_weights.state_dict(model, variables, names=names)
        found = torch_weights.read(tensors, model=model, names=names)
        image = np.random.default_rng(0).random((1, 16, 20, 2)).astype(np.float32)
        rows = parity.layers(found, image)
        assert {row.path for row in rows} == set(names), fields
        assert parity.first_over(rows) is None, parity.table(rows)


# --- Training from weights -----------------------------------------------------------


@pytest.mark.slow
def test_fine_tuning_with_other_classes_and_on(tmp_path, capsys):
    path, out, tuned = tmp_path / "a.safetensors", tmp_path / "w", tmp_path / "tuned"
    weights(path, num_classes=3, dtype="float16")
    assert main(path, f"--out={out}") == 0
    changes = {"model.weights": str(out), "train.ema": 0.9, "model.dropout": 0.1}
    train.train_and_evaluate(config(**changes), tuned)
    text = capsys.readouterr().out
    assert f"of {out} (step 0); head starts anew, for 2 class(es) instead of 3" in text
    model, _, meta, step = load_for_inference(tuned, which="latest")
    assert step == 2 and model.features == (4, 8, 8) and model.dropout == 0.1
    assert meta.torch == load_for_inference(out)[2].torch
    assert meta.label_names == ("background", "cell")
    # It goes on without them, and back under the names and in the type they came in.
    shutil.rmtree(out)
    longer = {**changes, "train.steps": 3}
    train.train_and_evaluate(config(**longer), tuned)
    assert "going on from step 2" in capsys.readouterr().out
    back = tmp_path / "back.safetensors"
    assert main(tuned, f"--out={back}", "--which=latest") == 0
    found = state(back)
    assert set(found) == set(state(path))
    assert {value.dtype for value in found.values()} == {np.dtype(np.float16)}
    # But not with other ones, nor without saying so.
    for other, says in [
        ({**longer, "model.weights": ""}, f"began with model.weights = {out}"),
        ({**longer, "model.dropout": 0.2}, r"model\.dropout"),
    ]:
        with pytest.raises(InputError, match=says):
            train.train_and_evaluate(config(**other), tuned)


def build(**changes):
    built = run.build(config(**changes), sharding.make_mesh(data=1))
    return built, built.begin()


def test_a_run_begins_with_the_weights_bit_for_bit(tmp_path):
    path = tmp_path / "a.safetensors"
    _, variables = weights(path)
    built, state = build(**{"model.weights": str(path), "train.ema": 0.9})
    assert_same(state.params, variables["params"])
    assert_same(dict(state.variables), variables)  # of the average
    assert int(state.step) == 0 and built.meta.torch["family"] == "milesial"
    assert "nothing starts anew" in built.start.text
    # Every array is its own memory, for the step gives all of it away.
    state, stats = built.train_step(state, next(built.train_batches(0)))
    assert np.isfinite(stats["loss"])


def test_a_converted_workdir_is_not_trained_in(tmp_path):
    path = tmp_path / "a.safetensors"
    weights(path)
    assert main(path, f"--out={tmp_path / 'w'}") == 0
    with pytest.raises(InputError, match=r"--config\.model\.weights="):
        train.train_and_evaluate(config(), tmp_path / "w")


def resnet18(widths=(4, 4, 8, 8, 12), channels=3, seed=0):
    """A state dict like torchvision's, narrow."""
    rng = np.random.default_rng(seed)
    stem, *stages = widths
    tensors = {}

    def conv(name, out, into, size):
        tensors[f"{name}.weight"] = rng.normal(size=(out, into, size, size))

    def norm(name, width):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{name}.{leaf}"] = rng.uniform(0.5, 1.5, size=width)
        tensors[f"{name}.num_batches_tracked"] = np.int64(7)

    conv("conv1", stem, channels, 7)
    norm("bn1", stem)
    into = stem
    for number, width in enumerate(stages, start=1):
        for i in range(2):
            block = f"layer{number}.{i}"
            for n, given in ((1, into), (2, width)):
                conv(f"{block}.conv{n}", width, given, 3)
                norm(f"{block}.bn{n}", width)
            if i == 0 and number > 1:
                conv(f"{block}.downsample.0", width, into, 1)
                norm(f"{block}.downsample.1", width)
            into = width
    tensors["fc.weight"], tensors["fc.bias"] = rng.normal(size=(5, into)), np.zeros(5)
    cast = {k: np.asarray(v) for k, v in tensors.items()}
    return {
        k: v if v.dtype.kind == "i" else v.astype(np.float32) for k, v in cast.items()
    }


RESNET = {"norm": "batch", "features": (0, 4, 4, 8, 8, 12)}
RESNET |= {"decoder_features": (4, 4, 4, 4, 4), "num_classes": 2}


def write(path, tensors):
    from unet_jax.torch_weights.writing import write

    write(path, tensors)
    return path


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_an_encoder_for_images_of_other_channels(channels, tmp_path):
    tensors = resnet18()
    path = write(tmp_path / "r.safetensors", tensors)
    model = models.build("unet_resnet18", **RESNET)
    start = transfer.encoder(model, path, channels=channels, rank=2)
    fresh = jax.tree.map(jnp.asarray, randomised(model, channels, 32))
    variables = transfer.overlay(fresh, start.variables)
    assert set(start.variables["params"]) == {"encoder"}
    assert "decoder, head starts anew" in start.text
    kernel = variables["params"]["encoder"]["conv_stem"]["kernel"]
    old = np.moveaxis(tensors["conv1.weight"], (0, 1), (3, 2))
    if channels == 5:
        expected = old[:, :, [0, 1, 2, 0, 1]] * np.float32(3 / 5)
        np.testing.assert_allclose(kernel, expected, rtol=1e-6)
    stats = variables["batch_stats"]["encoder"]["level3_0"]["shortcut_norm"]["var"]
    np.testing.assert_array_equal(stats, tensors["layer2.0.downsample.1.running_var"])
    # Whatever the channels: grey in all of them gets one response.
    fresh = jax.tree.map(jnp.asarray, randomised(model, 3, 32))
    taken = transfer.encoder(model, path, channels=3, rank=2).variables
    three = transfer.overlay(fresh, taken)
    grey = np.random.default_rng(0).random((1, 32, 32, 1)).astype(np.float32)
    if channels == 1:
        pyramids = [
            model.apply(v, jnp.repeat(grey, n, -1))[1]["encoder"]
            for v, n in ((variables, channels), (three, 3))
        ]
        for a, b in zip(*pyramids, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(initial=0.0))


@pytest.mark.slow
def test_an_encoder_in_a_run(tmp_path, capsys):
    smp = {f"model.encoder.{k}": v for k, v in resnet18().items() if "fc" not in k}
    smp["model.decoder.blocks.0.conv1.0.weight"] = np.zeros((4, 4, 3, 3), np.float32)
    path = write(tmp_path / "smp.safetensors", smp)
    changes = {f"model.{k}": v for k, v in RESNET.items() if k != "num_classes"}
    changes |= {"model.name": "unet_resnet18", "model.encoder_weights": str(path)}
    changes |= {"train.crop": (32, 32), "data.cells.size": (32, 32)}
    changes |= {"optim.freeze": ("encoder",)}
    train.train_and_evaluate(config(**changes), tmp_path / "run")
    text = capsys.readouterr().out
    assert "its first kernel made for 1 channel(s) instead of 3" in text
    _, variables, _, _ = load_for_inference(tmp_path / "run")
    kernel = variables["params"]["encoder"]["level5_1"]["conv1"]["kernel"]
    expected = smp["model.encoder.layer4.1.conv2.weight"]
    np.testing.assert_array_equal(kernel, expected.transpose(2, 3, 1, 0))
    path.unlink()  # no longer needed
    train.train_and_evaluate(config(**changes, **{"train.steps": 3}), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.encoder": "plain"}, "for a ResNet encoder"),
        ({"model.encoder": "resnet34"}, "is a resnet18"),
        ({"model.features": (0, 4, 8, 8, 8, 12)}, r"features = \(0, 4, 4, 8, 8, 12\)"),
        ({"model.norm": "group", "model.norm_groups": 2}, "use batch"),
        ({"model.conv_bias": True}, "lacks conv1.bias"),
        ({"model.encoder_weights": "unet.safetensors"}, "holds no ResNet"),
        ({"model.encoder_weights": "none.pth"}, "none.pth does not exist"),
        ({"model.weights": "unet.safetensors"}, "leave out model.encoder_weights"),
        ({"data.cells.rank": 3}, "3-D images"),
        ({"model.weights": "rgb.safetensors"}, r"images of 3 channel\(s\)"),
        ({"model.weights": "unet.safetensors", "model.dtype": "f16"}, "bfloat16"),
        ({"model.weights": "w"}, "no checkpoint in w"),
    ],
)
def test_starts_that_cannot_be_are_one_sentence(changes, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w").mkdir()
    weights("unet.safetensors")
    weights("rgb.safetensors", channels=3)
    write("r.safetensors", resnet18())
    fields = {f"model.{k}": v for k, v in RESNET.items() if k != "num_classes"}
    fields |= {"model.name": "unet_resnet18"}
    fields |= {"data.cells.size": (32, 32), "train.crop": (32, 32)}
    if "model.weights" not in changes or "leave out" in says:
        fields["model.encoder_weights"] = "r.safetensors"
    if "data.cells.rank" in changes:
        fields |= {"data.cells.size": (32,) * 3, "train.crop": (32,) * 3}
    if changes.get("model.encoder") == "plain":
        changes = {**changes, "model.features": (4, 8, 8, 8, 8, 12)}
    with pytest.raises(InputError, match=says):
        build(**{**fields, **changes})


# --- Files of PyTorch's own ----------------------------------------------------------


def golden(name):
    here = Path(__file__).resolve().parents[1]
    place = os.environ.get("UNET_JAX_DATA", here.parent / "shared" / "data")
    place = Path(place).parent / "golden" / name / "weights.safetensors"
    if not place.is_file():
        pytest.skip(f"{place} is not there (set UNET_JAX_DATA)")
    return place


@pytest.mark.parametrize(
    "name",
    [
        "milesial__convt",
        "buda__unet",
        "nested__nestedunet_ds",
        "monai__unet_2d_res2_instance",
        "dna__plain_3d_aniso_ds",
        "smp__unet_resnet34",
    ],
)
def test_nets_of_others_in_and_out(name, tmp_path, capsys):
    path, out = golden(name), tmp_path / "w"
    found = torch_weights.read(path)
    assert main(path, f"--out={out}") == 0
    model, variables, meta, _ = load_for_inference(out)
    assert model == found.model
    assert_same(variables, {"batch_stats": {}, **found.variables})
    assert meta.task == ("labels" if name == "buda__unet" else "classes")
    assert main(out, f"--out={tmp_path / 'b.safetensors'}") == 0
    back = state(tmp_path / "b.safetensors")  # has what this file has under two names
    assert_same_bits(state(path), {key: back[key] for key in state(path)})
    more = tmp_path / "more"
    count = model.num_classes + 1
    assert main(path, f"--out={more}", f"--classes={count}") == 0
    assert "starts anew" in capsys.readouterr().out
    model, variables, _, _ = load_for_inference(more)
    size = [1 + sum(pad) for pad in models.pads(model, (1,) * meta.rank)]
    image = np.zeros((1, *size, meta.channels), np.float32)
    shape = jax.eval_shape(model.apply, variables, image)[0].shape
    assert shape[-1] == count
