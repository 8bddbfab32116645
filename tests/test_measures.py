"""What evaluate can measure: rows that add up to the figures of their own modules."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image
from test_predict import make, save

from unet_jax import boundary, cli, measures, metrics, objects, partition
from unet_jax.data import cells
from unet_jax.data.border import instances_of
from unet_jax.data.source import Labelled
from unet_jax.predict import Prediction, Predictor
from unet_jax.types import InputError


class Plain:
    """A source of pictures made here, without instances."""

    label_names = ("membrane", "cell")

    def __init__(self, labels, weight=None):
        self.labels, self.weight = labels, weight

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        label = self.labels[i]
        grey = np.random.default_rng(i).integers(0, 99, label.shape)
        image = (100 * label + grey).astype(np.uint8)[..., None]
        weight = np.ones(label.shape) if self.weight is None else self.weight
        weight = weight.astype(np.float32)
        return {"image": image, "label": label.astype(np.uint8), "weight": weight}

    def name(self, i):
        return f"picture {i}"

    def size(self, i):
        return self.labels[i].shape


def setting(task="classes", names=("membrane", "cell"), **options):
    model, variables, meta = make(task=task, names=names)
    predictor = Predictor.from_model(model, variables, meta)
    return measures.Setting(
        predictor=predictor, task=task, label_names=names, **options
    )


def found(name, chosen, source):
    """The rows of one measure and its figures."""
    rows, measure = measures.rows([name], chosen, source).of[name]
    return rows, measure.summarise(rows)


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    smooth = scipy.ndimage.gaussian_filter(rng.normal(size=(3, 20, 24)), (0, 1, 1))
    return Plain(smooth > -0.05)


@pytest.mark.parametrize("task", ["classes", "labels"])
def test_pixels_are_counted_as_on_the_device(source, task):
    names = ("membrane", "cell") if task == "classes" else ("cell",)
    chosen = setting(task, names)
    weight = np.random.default_rng(1).uniform(-1, 1, (20, 24)).clip(0)
    labelled = Labelled(Plain(source.labels, weight), task=task)
    rows, figures = found("pixels", chosen, labelled)
    for i, row in enumerate(rows):
        example = labelled[i]
        probability = chosen.predictor(example["image"]).probability.clip(1e-6, 1)
        logits = np.log(probability)
        if task == "labels":
            logits -= np.log1p(-probability.clip(0, 1 - 1e-6))
        args = (logits, example["label"], example["weight"])
        want = metrics.confusion(*(np.asarray(a)[None] for a in args), task=task)
        np.testing.assert_array_equal(row, want[0])
    want = metrics.summarise(rows, task=task, label_names=names)
    np.testing.assert_equal(figures, want)  # also where both are NaN


def test_isbi2012_is_of_the_cells_probability(source):
    chosen = setting()
    rows, figures = found("isbi2012", chosen, source)
    for i, row in enumerate(rows):
        probability = chosen.predictor(source[i]["image"]).probability
        cell = 1 - probability[..., 0]
        want = partition.isbi2012_counts(cell, source.labels[i])
        np.testing.assert_array_equal(row, want)
    assert figures == partition.isbi2012(rows)


def test_objects_are_those_of_the_source_or_the_parts_of_its_label(source, monkeypatch):
    chosen = setting()
    rows, _ = found("objects", chosen, source)
    for i, row in enumerate(rows):
        prediction = chosen.predictor(source[i]["image"])
        inside = 1 - prediction.probability[..., 0] > 0.5
        said = scipy.ndimage.label(inside)[0]
        truth = instances_of(source.labels[i].astype(int))
        np.testing.assert_array_equal(row, objects.counts(truth, said))
    split = cells.open(split="val[:1]", size=(32, 32), radius=(4, 6))
    rows, _ = found("objects", chosen, Labelled(split, task="classes"))
    prediction = chosen.predictor(split[0]["image"])
    said = scipy.ndimage.label(1 - prediction.probability[..., 0] > 0.5)[0]
    want = objects.counts(split.instances(0), said)
    np.testing.assert_array_equal(rows[0], want)
    assert (
        len(np.unique(split.instances(0)))
        > scipy.ndimage.label(split.instances(0) > 0)[1]
    )


def perfect(chosen, source):
    """A predictor that knows the answer."""

    class Knowing:
        meta = chosen.predictor.meta
        nets = chosen.predictor.nets
        model = chosen.predictor.model

        def __call__(self, image, *, name):
            label = source.labels[int(name.split()[-1])]
            probability = np.stack([~label, label], -1).astype(np.float32)
            return Prediction(label.astype(np.uint8), probability)

    return dataclasses.replace(chosen, predictor=Knowing())


def test_the_right_answer_has_full_marks(source):
    knowing = perfect(setting(), source)
    names = ["pixels", "isbi2012", "objects", "boundary", "roads"]
    rows = measures.rows(names, knowing, source).of
    figures = {}
    for counted, measure in rows.values():
        assert len(counted) == 3
        figures |= measure.summarise(counted)
    full = ("dice", "v_rand", "v_info", "pq", "seg", "ap", "break_even")
    np.testing.assert_allclose([figures[key] for key in full], 1.0, rtol=1e-12)
    assert figures["pixel_error"] == figures["rand_error"] == 0
    assert figures["hausdorff95/cell"] == 0
    assert figures["surface_dice/membrane"] == 1


@pytest.mark.parametrize("task", ["classes", "labels"])
def test_boundaries_of_each_class_where_there_is_weight(source, task):
    names = ("background", "cell") if task == "classes" else ("cell",)
    weight = np.ones((20, 24))
    weight[:, 18:] = 0
    chosen = setting(task, names, tolerance=2.0, spacing=(1.0, 3.0))
    plain = Plain(source.labels, weight)
    plain.label_names = ("background", "cell")
    labelled = Labelled(plain, task=task)
    rows, figures = found("boundary", chosen, labelled)
    distances = []
    for i in range(3):
        said = chosen.predictor(plain[i]["image"]).label.reshape(20, 24) == 1
        inside = (source.labels[i] & (weight > 0), said & (weight > 0))
        distances.append(boundary.hausdorff(*inside, spacing=(1.0, 3.0)))
        near = boundary.surface_dice(*inside, tolerance=2.0, spacing=(1.0, 3.0))
        np.testing.assert_allclose(rows[i], [[distances[-1], near]])
    assert set(figures) == {"hausdorff95/cell", "surface_dice/cell"}
    assert figures["hausdorff95/cell"] == pytest.approx(np.mean(distances))


def test_roads(source):
    chosen = setting(tolerance=1.0)
    rows, figures = found("roads", chosen, source)
    probability = 1 - chosen.predictor(source[0]["image"]).probability[..., 0]
    want = boundary.relaxed_counts(probability, source.labels[0], tolerance=1.0)
    np.testing.assert_array_equal(rows[0], want)
    assert set(figures) == {"break_even", "break_even_threshold"}


def test_nvidias_dice_by_its_definition():
    """The picture at 388, grey around it, squares in the denominator, both classes."""
    rng = np.random.default_rng(3)
    label = scipy.ndimage.gaussian_filter(rng.normal(size=(512, 512)), 9) > 0
    source = Plain(label[None])
    chosen = setting()
    rows, figures = found("nvidia", chosen, source)
    example = source[0]

    def half_pixels(x):
        """Linear interpolation at the middles of 388 pixels, point by point."""
        at = (np.arange(388) + 0.5) * 512 / 388 - 0.5
        low = np.clip(np.floor(at).astype(int), 0, 510)
        part = np.clip(at - low, 0, 1)
        x = x[low] * (1 - part)[:, None] + x[low + 1] * part[:, None]
        return x[:, low] * (1 - part) + x[:, low + 1] * part

    framed = np.full((572, 572, 1), 127.5, np.float32)
    framed[92:480, 92:480, 0] = half_pixels(example["image"][..., 0].astype(float))
    net = chosen.predictor
    logits, _ = net.model.apply(net.variables, framed[None] / np.float32(255))
    said = np.asarray(jax.nn.softmax(logits))[0, 92:480, 92:480].astype(float)
    true = half_pixels(label.astype(float)) >= 0.5
    true = np.stack([~true, true], -1).astype(float)
    want = [
        2 * (p * t).sum() / ((p * p).sum() + (t * t).sum())
        for p, t in zip(np.moveaxis(said, -1, 0), np.moveaxis(true, -1, 0), strict=True)
    ]
    # A pixel of 150,544 may fall on the other side of a half, which is 1e-5.
    np.testing.assert_allclose(rows[0], want, atol=3e-5)
    assert figures == {"nvidia_dice": pytest.approx(np.mean(want), abs=3e-5)}


def test_what_does_not_fit_the_measure_is_refused(source):
    three = setting(names=("a", "b", "c"))
    with pytest.raises(InputError, match="two classes, and this net has a, b, c"):
        measures.rows(["isbi2012"], three, source)
    several = setting("labels", ("a", "b"))
    with pytest.raises(InputError, match="one foreground"):
        measures.rows(["objects"], several, source)
    with pytest.raises(InputError, match="--metrics = 'dice' is not known"):
        measures.rows(["dice"], setting(), source)


@pytest.mark.parametrize("task", ["classes", "labels"])
def test_what_nothing_counts_of_is_left_out(source, task):
    """As if it were not there, by measures that ask for the weight and that do not."""
    names = ("membrane", "cell") if task == "classes" else ("cell",)
    chosen = setting(task, names)
    weight = np.ones((3, 20, 24))
    weight[1] = 0

    class Holed(Plain):
        def __getitem__(self, i):
            return super().__getitem__(i) | {"weight": weight[i].astype(np.float32)}

    class Sound(Plain):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return super().__getitem__(2 * i)

        def name(self, i):
            return super().name(2 * i)

    which, seen = list(measures.MEASURES), []
    which.remove("nvidia")  # of other sizes
    holed = Labelled(Holed(source.labels), task=task)
    found = measures.rows(which, chosen, holed, done=seen.append)
    sound = measures.rows(which, chosen, Labelled(Sound(source.labels), task=task))
    assert seen == [0, 1, 2]
    assert (found.index.tolist(), sound.index.tolist()) == ([0, 2], [0, 1])
    for name in which:
        np.testing.assert_array_equal(found.of[name][0], sound.of[name][0])
    last = found.only(np.asarray([1, 2]))
    assert last.index.tolist() == [2]
    for rows, (whole, _) in zip(last.of.values(), found.of.values(), strict=True):
        np.testing.assert_array_equal(rows[0], whole[1:])
    weight[:] = 0
    with pytest.raises(InputError, match="nothing counts in any of the 3 examples"):
        measures.rows(["pixels"], chosen, holed)


CONFIG = {
    "data": {
        "source": "cells",
        "train": "train",
        "evaluation": "val[:3]",
        "cells": {"size": (16, 16), "examples": 3, "radius": (3, 5)},
    },
    "loss": {"cross_entropy": 1.0},
    "train": {"eval_batch_size": 3},
}


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    paths = []
    for factor in (1.0, 0.7):
        path = tmp_path_factory.mktemp("run")
        _, variables, meta = make()
        variables = jax.tree.map(lambda x, f=factor: x * np.float32(f), variables)
        save(path, variables, dataclasses.replace(meta, config=CONFIG), step=7)
        paths.append(str(path))
    return paths


def evaluated(capsys, *arguments):
    assert cli.main(["evaluate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_measures_the_same_by_either_way(workdirs, capsys):
    plain = evaluated(capsys, f"--workdir={workdirs[0]}")["results"]
    other = evaluated(capsys, f"--workdir={workdirs[0]}", "--metrics=objects,boundary")
    for key, value in other["results"].items():
        if key in plain:
            assert value == plain[key], key
    assert {"pq", "hausdorff95/cell"} <= set(other["results"])
    whole = evaluated(capsys, f"--workdir={workdirs[0]}", "--tile=16", "--tta=flips")
    assert whole["results"].keys() <= plain.keys()


def test_evaluate_with_intervals_and_a_comparison(workdirs, capsys):
    here, there = workdirs
    options = ["--bootstrap=50", f"--against={there}", "--metrics=objects"]
    found = evaluated(capsys, f"--workdir={here}", *options)
    other = evaluated(capsys, f"--workdir={there}", "--metrics=objects")
    for key, value in found["results"].items():
        gain = found["against"]["differences"][key]
        if value is not None:
            assert gain["value"] == pytest.approx(other["results"][key] - value)
        low, high = found["intervals"][key]
        if None not in (low, high, value) and key.startswith("dice"):
            assert low <= value <= high
    assert cli.main(["evaluate", f"--workdir={here}", *options]) == 0
    text = capsys.readouterr().out
    assert "against:" in text
    assert "95 % of 50 samples" in text
    assert text.index("image_dice") < text.index("pq ")


def test_evaluate_leaves_out_what_cannot_be_read(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for i in range(4):
        image = rng.integers(0, 256, (24, 20), np.uint8)
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
        mask = (scipy.ndimage.gaussian_filter(image * 1.0, 2) > 127) * np.uint8(255)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.png")
    data = {
        "source": "folder",
        "root": str(tmp_path),
        "train": "train[:1]",
        "evaluation": "train[1:]",
        "on_error": "skip",
    }
    _, variables, meta = make(names=("background", "foreground"))
    run = f"--workdir={tmp_path / 'run'}"
    meta = dataclasses.replace(meta, config=CONFIG | {"data": data})
    save(tmp_path / "run", variables, meta, step=7)
    image = tmp_path / "images" / "2.png"
    image.write_bytes(image.read_bytes()[:200])
    ways = ["--batch_size=2"], ["--metrics=isbi2012,boundary", "--bootstrap=20"]
    found = [evaluated(capsys, run, *way) for way in ways]
    assert cli.main(["evaluate", run]) == 0
    said = "step 7, 2 examples of train[1:]; 1 left out, of which nothing counts"
    assert said in capsys.readouterr().out
    for path in (image, tmp_path / "masks" / "2.png"):
        path.unlink()
    for way, one in zip(ways, found, strict=True):
        sound = evaluated(capsys, run, *way)
        assert (one.pop("examples"), one.pop("left_out")) == (2, 1)
        assert (sound.pop("examples"), sound.pop("left_out")) == (2, 0)
        assert one == sound


def test_evaluate_compares_the_same_images_only(workdirs, tmp_path, capsys):
    here = workdirs[0]
    _, variables, meta = make()
    data = CONFIG["data"] | {"evaluation": "val[1:3]"}
    meta = dataclasses.replace(meta, config=CONFIG | {"data": data})
    save(tmp_path / "run", variables, meta, step=7)
    other = f"--against={tmp_path / 'run'}"
    assert cli.main(["evaluate", f"--workdir={here}", other]) == 2
    words = r"2 examples and the workdir 3, .* 1 is cells-val-0001 .* cells-val-0000"
    assert re.search(words, capsys.readouterr().err)
    found = evaluated(capsys, f"--workdir={here}", other, "--split=val[:2]")
    assert found["against"]["workdir"] == str(tmp_path / "run")


def test_evaluate_an_ensemble(workdirs, capsys):
    found = evaluated(capsys, f"--workdir={','.join(workdirs)}")
    assert set(found["results"]) >= {"dice", "dice/cell"}
    assert found["examples"] == 3
