"""unet_jax.inspection and its command: what is found in folders with known faults."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unet_jax import cli
from unet_jax.inspection import Inspection, inspect, layouts, report, settings
from unet_jax.inspection.examples import Look
from unet_jax.inspection.layout import Layout

SIZE = (40, 56)


def discs(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Three discs of foreground away from the border, ``bool[H, W]``."""
    rng = np.random.default_rng(seed)
    y, x = np.indices(size)
    mask = np.zeros(size, bool)
    for _ in range(3):
        cy, cx = rng.integers(8, size[0] - 8), rng.integers(8, size[1] - 8)
        mask |= (y - cy) ** 2 + (x - cx) ** 2 < rng.integers(3, 7) ** 2
    return mask


def photo(mask: np.ndarray, seed: int) -> np.ndarray:
    """What a camera would make of it, u8."""
    noise = np.random.default_rng(seed).normal(80, 10, mask.shape)
    return np.clip(noise + 100 * mask, 0, 255).astype(np.uint8)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)


def fill(root: Path, coded=lambda mask: mask * np.uint8(255), *, n=10, ending=".png"):
    """Pairs a .. of images and masks written as ``coded`` says; the masks as bools."""
    masks = [discs(i) for i in range(n)]
    for i, mask in enumerate(masks):
        save(root / "images" / f"{'abcdefghijkl'[i]}.png", photo(mask, i))
        save(root / "masks" / f"{'abcdefghijkl'[i]}{ending}", coded(mask))
    return masks


def of(root: Path, **options) -> Inspection:
    return inspect(layouts.find(root), **options)


def texts(found: Inspection, level: str = "") -> str:
    return "\n".join(f.text for f in found.findings if f.level.startswith(level))


def test_a_clean_folder(tmp_path):
    masks = fill(tmp_path)
    found = of(tmp_path)
    assert found.findings == () and found.usable
    assert found.kind.name == "binary 0/255"
    assert found.label_names == ("background", "foreground")
    part = np.mean(masks)
    assert settings.shares(found.examples) == pytest.approx([1 - part, part])
    assert [look.part for look in found.examples].count("train") == 8
    images = np.stack([photo(mask, i) for i, mask in enumerate(masks)]).astype(float)
    (row,) = report.json_of(found)["channels"]
    for key in ("min", "max", "mean", "std"):
        assert row[key] == pytest.approx(getattr(images, key)())
    text = report.text_of(found)
    assert "all 40 x 56" in text and "nothing is odd" in text


def test_every_fault_is_found_and_named(tmp_path):
    masks = fill(tmp_path, n=12)
    images, labels = tmp_path / "images", tmp_path / "masks"
    # b is broken, c is turned, d is cut, e is inverted, f is empty, g is flat,
    # l is a copy of a.
    (labels / "b.png").write_bytes((labels / "b.png").read_bytes()[:70])
    save(labels / "c.png", masks[2].T * np.uint8(255))
    save(labels / "d.png", masks[3][:20] * np.uint8(255))
    save(labels / "e.png", ~masks[4] * np.uint8(255))
    save(labels / "f.png", np.zeros(SIZE, np.uint8))
    save(images / "g.png", np.full(SIZE, 9, np.uint8))
    save(images / "l.png", photo(masks[0], 0))
    save(images / "x.png", photo(masks[0], 50))
    save(labels / "y.png", np.zeros(SIZE, np.uint8))
    found = of(tmp_path)
    errors = texts(found, "error")
    for words in (
        "b.png cannot be read",
        "images/c.png is turned on its side: 56 x 40 for an image of 40 x 56",
        "images/d.png is of another size: 20 x 56",
        "training and in the evaluation part",
        "images/a.png = images/l.png",
    ):
        assert words in errors
    warnings = texts(found, "warning")
    assert "no mask (images/x.png)" in warnings
    assert "one colour in 1 example (images/g.png)" in warnings
    assert "Black and white exchanged" in warnings and "images/e.png" in warnings
    notes = texts(found, "note")
    assert "no image (masks/y.png)" in notes
    assert "nothing but background in 1 example (images/f.png)" in notes
    assert len(found.findings) == 9  # and each of them once
    assert found.usable and found.lines["data.on_error"] == "skip"
    assert [f.level for f in found.findings] == sorted(f.level for f in found.findings)[
        :4
    ] + ["warning"] * 3 + ["note"] * 2


def test_jpeg_masks_are_read_as_black_and_white(tmp_path):
    masks = fill(tmp_path, ending=".jpg")
    found = of(tmp_path)
    assert "JPEG" in found.kind.name and found.layout.options["mask"] == "binary"
    assert "save masks as PNG" in texts(found, "warning")
    # What would be trained on is the mask before the damage, but for a few pixels.
    assert settings.shares(found.examples)[1] == pytest.approx(np.mean(masks), rel=0.05)


def test_instances_classes_void_and_colours(tmp_path):
    from scipy import ndimage

    def void(mask):
        ids = mask.astype(np.uint8)
        ids[:, :28] *= 2
        ids[0] = 255
        return ids

    def colour(mask):
        picture = np.zeros((*SIZE, 3), np.uint8)
        picture[mask] = (250, 0, 0)
        return picture

    def numbered(mask):
        return ndimage.label(mask)[0].astype(np.uint16)

    def far_apart(mask):  # so many that they can be nothing but objects
        numbers = np.zeros(SIZE, np.uint16)
        numbers[::2, ::2] = np.arange(numbers[::2, ::2].size).reshape(20, 28)
        return numbers

    for name, coded, options, labels in (
        ("void", void, {"ignore": 255}, ("background", "class_1", "class_2")),
        (
            "colour",
            colour,
            {"mask": "colors", "colors": ((0, 0, 0), (250, 0, 0))},
            ("background", "#fa0000"),
        ),
        ("apart", far_apart, {"mask": "instances"}, ("background", "foreground")),
    ):
        root = tmp_path / name
        fill(root, coded, n=4)
        found = of(root)
        assert options.items() <= dict(found.layout.options).items()
        assert found.label_names == labels and found.usable
    void_found = of(tmp_path / "void")
    assert sum(look.void for look in void_found.examples) == 4 * SIZE[1]
    assert "not counted" in report.text_of(void_found)
    fill(tmp_path / "few", numbered, n=4)
    assert of(tmp_path / "few").usable


def test_one_file_an_object_is_one_look_at_each_image(tmp_path):
    whole = []
    for name in "abcde":
        mask = discs(ord(name))
        whole.append(mask)
        save(tmp_path / "s" / name / "images" / f"{name}.png", photo(mask, 1))
        half = mask.copy()
        half[:, 28:] = False
        for k, part in enumerate((half, mask & ~half)):
            save(tmp_path / "s" / name / "masks" / f"{k}.png", part * np.uint8(255))
    found = of(tmp_path)
    assert "10 mask files for 5 images" in found.kind.why
    assert settings.shares(found.examples)[1] == pytest.approx(np.mean(whole))
    assert found.lines["data.folder.mask"] == "objects"


def test_overlapping_labels(tmp_path):
    for i, name in enumerate("abcde"):
        save(tmp_path / "images" / f"{name}.png", photo(discs(i), i))
        for k, label in enumerate(("vessel", "tumour")):
            mask = discs(i + 10 * k)
            save(tmp_path / "masks" / label / f"{name}.png", mask * np.uint8(255))
    found = of(tmp_path)
    assert found.planes and found.label_names == ("tumour", "vessel")
    want = [np.mean([discs(i + 10 * k) for i in range(5)]) for k in (1, 0)]
    assert settings.shares(found.examples) == pytest.approx(want)
    assert found.lines["task"] == "labels"
    assert found.lines["loss.binary_cross_entropy"] == 1.0
    assert "may overlap" in report.text_of(found)


def test_what_cannot_be_trained_on(tmp_path):
    def clear(mask):
        picture = np.zeros((*SIZE, 4), np.uint8)
        picture[..., 3] = mask * 255
        return picture

    fill(tmp_path / "alpha", clear)
    found = of(tmp_path / "alpha")
    assert not found.usable and "transparency" in texts(found)
    fill(tmp_path / "copy", n=4)
    for path in (tmp_path / "copy" / "images").iterdir():
        (tmp_path / "copy" / "masks" / path.name).write_bytes(path.read_bytes())
    found = of(tmp_path / "copy")
    assert not found.usable and "the image itself in 4 examples" in texts(found)
    fill(tmp_path / "types", n=5)
    save(tmp_path / "types/images/b.png", photo(discs(1), 1).astype(np.uint16) * 9)
    found = of(tmp_path / "types")
    assert not found.usable and "4 uint8, 1 uint16" in texts(found, "error")
    save(tmp_path / "nan/images/a.npy", np.full(SIZE, np.nan, np.float32))
    save(tmp_path / "nan/masks/a.png", discs(1) * np.uint8(255))
    found = of(tmp_path / "nan")
    assert not found.usable and "2240 of 2240 values" in texts(found, "error")


def test_channels_and_depth(tmp_path):
    fill(tmp_path / "mixed", n=5)
    colour = np.stack([photo(discs(1), k) for k in range(3)], -1)
    save(tmp_path / "mixed/images/b.png", colour)
    found = of(tmp_path / "mixed")
    assert found.lines["data.folder.channels"] == 3
    assert "Another number of channels" in texts(found, "warning")
    masks = fill(tmp_path / "deep", n=5)
    for i, name in enumerate("abcde"):
        twelve = photo(masks[i], i).astype(np.uint16) * 16
        save(tmp_path / "deep" / "images" / f"{name}.png", twelve)
    found = of(tmp_path / "deep")
    assert "use 12 bits" in texts(found, "note")
    assert found.lines["data.normalisation"] == "standard"


def test_of_many_an_even_spread_is_looked_at(tmp_path):
    fill(tmp_path, n=10)
    found = of(tmp_path, limit=4)
    assert len(found.examples) == len(found.masks) == 4
    assert [look.name for look in found.masks] == [f"images/{n}.png" for n in "adgj"]
    assert "looked at 4 of 10" in report.text_of(found)
    (note,) = (f for f in found.findings if "not looked at" in f.text)
    assert note.level == "note" and note.text.startswith("6 examples were not")
    assert "data.on_error=skip" in note.text and "data.on_error" not in found.lines
    assert "1 example was not" in texts(of(tmp_path, limit=9))
    assert "not looked at" not in texts(of(tmp_path, limit=10))


def test_built_in_cells_and_a_config():
    options = {"examples": 3, "size": (16, 16)}
    found = inspect(Layout("cells", None, options, "train", "val"), limit=6)
    assert found.kind is None and found.usable and len(found.examples) == 6
    data = {"source": "cells", "train": "train", "evaluation": "val", "links": True}
    layout, links = layouts.of_config(data, "a.py")
    assert layout.source == "cells" and links


@pytest.mark.parametrize(
    ("sizes", "crop", "strides"),
    [
        ([(256, 256)], (128, 128), ((2, 2),) * 3),
        ([(100, 70)], (96, 64), ((2, 2),) * 3),
        ([(20, 300)], (16, 128), ((2, 2),) * 3),
        ([(5, 40)], (4, 32), ((1, 2), (2, 2), (2, 2))),
        ([(1, 9)], (1, 8), ((1, 2), (1, 2), (1, 2))),
        ([(3, 3)], (2, 2), ((2, 2),)),
        ([(35, 50, 36)], (32, 48, 32), ((2, 2, 2),) * 3),
        ([(512, 512, 300)], (48, 48, 48), ((2, 2, 2),) * 3),
        ([(20, 512, 512)], (16, 64, 64), ((2, 2, 2),) * 3),
        ([(64, 64), (128, 128), (512, 512)], (128, 128), ((2, 2),) * 3),
    ],
)
def test_crops_fit_the_images_and_the_net(sizes, crop, strides):
    assert settings.crop_of(sizes) == (crop, strides)
    for axis, length in enumerate(crop):
        assert length <= max(size[axis] for size in sizes)
        assert length % np.prod([stride[axis] for stride in strides]) == 0


def test_steps_are_about_twenty_epochs_within_bounds():
    assert settings.steps_of(10, 8) == 200
    assert settings.steps_of(400, 8) == 1000
    assert settings.steps_of(10**6, 8) == 2000
    for examples in range(1, 2000, 77):
        assert settings.steps_of(examples, 8) % 50 == 0


def look(size: tuple[int, ...], dtype: str, low: float, counts=(90, 10)) -> Look:
    return Look("train", 0, "a", size=size, dtype=dtype, low=(low,), counts=counts)


@pytest.mark.parametrize(
    ("size", "dtype", "low", "kind"),
    [
        ((9, 9), "uint8", 0, "range"),
        ((9, 9, 9), "uint8", 0, "range"),
        ((9, 9), "uint16", 0, "standard"),
        ((9, 9), "float32", 0, "standard"),
        ((9, 9, 9), "float32", 0, "example"),
        ((9, 9, 9), "float32", -1024, "standard"),
    ],
)
def test_normalisation(size, dtype, low, kind):
    assert settings.normalisation([look(size, dtype, low)]) == kind


def test_rare_classes_in_large_images_want_foreground():
    rare = [look((100, 100), "uint8", 0, (9900, 100))]
    assert settings.wants_foreground(rare, (64, 64), planes=False)
    assert not settings.wants_foreground(rare, (96, 96), planes=False)
    common = [look((100, 100), "uint8", 0, (5000, 5000))]
    assert not settings.wants_foreground(common, (64, 64), planes=False)


def run(*arguments: str) -> int:
    return cli.main(["inspect", *arguments])


def test_the_command_writes_a_config_that_gives_the_same_data(
    tmp_path, monkeypatch, capsys
):
    from unet_jax import data
    from unet_jax.cli import arguments as flags

    root = tmp_path / 'a "data" set'
    fill(root)
    monkeypatch.chdir(tmp_path)
    assert run(str(root), "--write-config=deep/my.py", "--json=found.json") == 0
    text = capsys.readouterr().out
    assert "train.py --config=deep/my.py --workdir=runs/my" in text
    with Image.open("inspect.png") as sheet:
        assert sheet.width > 800
    config = flags.read_config("deep/my.py")
    assert config["train"]["crop"] == (32, 48)
    wanted = {k: v for k, v in config["data"].items() if k != "border"}
    dataset = data.build(task=config["task"], **wanted)
    assert (len(dataset.train), len(dataset.evaluation)) == (8, 2)
    found = json.loads(Path("found.json").read_text())
    assert found["usable"] and found["config"]["data.root"] == str(root)
    # Once more is the same; what a person changed is not written over.
    assert run(str(root), "--write-config=deep/my.py") == 0
    Path("deep/my.py").write_text("mine = 1\n")
    assert run(str(root), "--write-config=deep/my.py") == 2
    assert "exists" in capsys.readouterr().err
    assert Path("deep/my.py").read_text() == "mine = 1\n"


def test_splits_below_are_written_as_one_pattern(tmp_path, monkeypatch, capsys):
    from unet_jax import data
    from unet_jax.cli import arguments as flags

    fill(tmp_path / "all", n=5)
    for side in ("images", "masks"):
        for k, name in enumerate("abcde"):
            split = "train" if k < 3 else "val"
            place = tmp_path / "set" / side / split / f"{name}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "all" / side / f"{name}.png").rename(place)
    monkeypatch.chdir(tmp_path)
    assert run("set", "--write-config=my.py") == 0
    assert "3 for training (train), 2 for evaluation (val)" in capsys.readouterr().out
    wanted = flags.read_config("my.py")["data"]
    assert wanted["folder"]["images"] == "images/{split}"
    wanted = {k: v for k, v in wanted.items() if k != "border"}
    dataset = data.build(task="classes", **wanted)
    assert [len(dataset.train), len(dataset.evaluation)] == [3, 2]
    assert dataset.evaluation.name(0) == "images/val/d.png"


def test_the_command_on_a_config_and_without_a_file(tmp_path, monkeypatch, capsys):
    fill(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    assert run("set", "--json") == 0
    assert json.loads(capsys.readouterr().out)["layout"]["source"] == "folder"
    assert run("set") == 0
    text = capsys.readouterr().out
    assert "\"--config.data.folder.label_names=('background', 'foreground')\"" in text
    assert run("set", "--write-config=my.py") == 0
    assert run("--config=my.py", "--config.data.train=train[:50%]") == 0
    text = capsys.readouterr().out
    assert "5 for training" in text and "as my.py says" in text
    assert "--config=my.py --workdir=runs/my '--config.data.train" in text


@pytest.mark.parametrize("name", ["it's", 'a "b" c', 'it\'s "so" $HOME `x` \\!', "é"])
def test_what_is_printed_is_read_as_it_is_meant(name, tmp_path, monkeypatch, capsys):
    import train

    root = tmp_path / f"set of {name}"
    for i, image in enumerate("abcde"):
        save(root / "images" / f"{image}.png", photo(discs(i), i))
        for k, label in enumerate((name, "other")):
            mask = discs(i + 10 * k) * np.uint8(255)
            save(root / "masks" / label / f"{image}.png", mask)
    monkeypatch.chdir(tmp_path)
    assert run(str(root)) == 0
    text = capsys.readouterr().out
    found = of(root)
    (command,) = text.split("To train:\n\n")[1:]
    command = command.split("\n\n")[0]
    assert command == settings.flags_of(found.lines)
    shell = ["sh", "-c", command.replace("python", r"printf '%s\0'", 1)]
    said = subprocess.run(shell, capture_output=True, check=True).stdout.decode()
    argv = said.split("\0")[:-1]
    monkeypatch.setattr(sys, "argv", argv)  # ml_collections looks there for overrides
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how ml_collections loads a file
        config = train.parse(argv).config
    assert dict(config["data"]["folder"]["label_masks"])[name] == f"masks/{name}"
    for key, value in found.lines.items():
        part = config
        for step in key.split("."):
            part = part[step]
        assert part == value, key


def test_names_that_are_no_text(tmp_path, monkeypatch, capsys):
    fill(tmp_path, n=10)
    strange = os.fsdecode(b"new\nline \xff [x]*?'\"")
    for side in ("images", "masks"):
        (tmp_path / side / "b.png").rename(tmp_path / side / f"{strange}.png")
    (tmp_path / "images" / f"{strange}.png").write_bytes(b"junk")
    monkeypatch.chdir(tmp_path)
    assert run(".", "--json=a.json") == 0
    assert "\\udcff" in capsys.readouterr().out
    json.loads(Path("a.json").read_text())


def test_the_command_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, words in (
        ([], "give a folder"),
        (["a", "--config=b.py"], "one of the two"),
        (["nowhere"], "does not exist"),
        (["a", "--out=a.jpg"], "--out=a.jpg"),
        (["a", "--write-config=a"], "--write-config=a"),
        (["a", "--limit=0"], "--limit=0"),
        (["."], "none of the layouts"),
    ):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    fill(tmp_path / "empty", lambda mask: np.zeros_like(mask, np.uint8), n=4)
    assert run("empty", "--write-config=my.py") == 1
    assert "cannot be trained on" in capsys.readouterr().out
    assert not Path("my.py").exists()


@pytest.mark.parametrize(
    ("name", "source", "lines"),
    [
        ("dsb2018", "folder", {"data.folder.mask": "objects"}),
        ("isbi2012", "volumes", {"train.crop": (128, 128)}),
        ("msd_hippocampus", "volumes", {"train.crop": (32, 48, 32)}),
    ],
)
def test_real_data(name, source, lines):
    here = Path(__file__).resolve().parents[1]
    place = os.environ.get("UNET_JAX_DATA", here.parent / "shared" / "data")
    root = Path(place) / name
    if not root.is_dir():
        pytest.skip(f"{root} is not there (set UNET_JAX_DATA)")
    found = of(root, limit=12)
    assert found.usable and found.layout.source == source
    assert lines.items() <= found.lines.items()
    assert not texts(found, "error") and not texts(found, "warning")
