"""The predictor: any size, any type, the evaluation's numbers, tiles."""

import functools
import logging
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

import unet_jax
from unet_jax import losses, models
from unet_jax.checkpoint import Checkpoints, Meta
from unet_jax.data import eval_batches
from unet_jax.evaluation import make_eval_step
from unet_jax.normalisation import normalise, standardise
from unet_jax.predict import Predictor, decide
from unet_jax.training import TrainState
from unet_jax.types import InputError

STATS = {"kind": "range", "dtype": "uint8", "shift": (0.0,), "scale": (1 / 255,)}


@functools.cache
def make(*, task="classes", names=("background", "cell"), channels=1, rank=2, **fields):
    """A tiny net with random weights: (model, variables, meta)."""
    keys = ("kind", "dtype", "shift", "scale", "threshold", "spacing")
    other = {k: fields.pop(k) for k in keys if k in fields}
    fields = {"num_classes": len(names), "features": (4, 8), "norm": "none", **fields}
    model = models.build("unet", **fields)
    stats = STATS | {"shift": (0.0,) * channels, "scale": (1 / 255,) * channels}
    stats |= {k: v for k, v in other.items() if k in STATS}
    meta = Meta(
        model={"name": "unet", **fields},
        task=task,
        label_names=names,
        normalisation=stats,
        channels=channels,
        rank=rank,
        threshold=other.get("threshold", 0.5),
        spacing=other.get("spacing", ()),
    )
    ((before, after),) = models.pads(model, (4,))
    shape = (1, *(before + 4 + after,) * rank, channels)
    shapes = jax.eval_shape(model.init, jax.random.key(1), np.zeros(shape, np.float32))
    rng = np.random.default_rng(1)  # compiles nothing
    variables = jax.tree.map(
        lambda x: rng.normal(scale=0.3, size=x.shape).astype(np.float32), shapes
    )
    return model, variables, meta


def save(workdir, variables, meta, *, step=0, score=0.5):
    """A checkpoint of these weights."""
    params = jax.device_put(variables["params"])
    tx = optax.sgd(0.1)
    state = TrainState(
        step=np.int32(step) + jax.numpy.zeros((), np.int32),
        params=params,
        batch_stats=jax.device_put(variables.get("batch_stats", {})),
        opt_state=tx.init(params),
        ema=None,
        lr_scale=jax.numpy.ones((), np.float32),
        key=jax.random.key(0),
    )
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(state, meta, score=score)
        checkpoints.wait()


def picture(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


class Examples:
    """A source of images with a label of zeros."""

    label_names = ("background", "cell")

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        size = self.images[i].shape[:-1]
        return {
            "image": self.images[i],
            "label": np.zeros(size, np.uint8),
            "weight": np.ones(size, np.float32),
        }

    def size(self, i):
        return self.images[i].shape[:-1]


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("size", [(13, 22), (1, 9), (7, 1), (1, 1)])
def test_any_size_gives_the_evaluations_numbers(padding, size):
    model, variables, meta = make(padding=padding)
    image = picture(*size, 1)
    label, probability = Predictor.from_model(model, variables, meta)(image)
    assert label.shape == size
    assert label.dtype == np.uint8
    assert probability.shape == (*size, 2)
    assert probability.dtype == np.float32
    np.testing.assert_allclose(probability.sum(-1), 1, rtol=1e-5)
    step = make_eval_step(
        model,
        losses.build(task="classes", cross_entropy=1.0),
        task="classes",
        stats=meta.normalisation,
    )
    (batch,) = eval_batches(
        Examples([image]), batch_size=1, pads=lambda s: models.pads(model, s), threads=0
    )
    out = jax.jit(step)(variables, batch)
    logits, _ = jax.jit(model.apply)(
        variables, normalise(batch["image"], meta.normalisation)
    )
    expected = jax.nn.softmax(logits)[0, : size[0], : size[1]]
    np.testing.assert_allclose(probability, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        label, out["prediction"][0, : size[0], : size[1]].astype(np.uint8)
    )
    counts = np.asarray(out["confusion"])[0]
    assert counts[0].tolist() == np.bincount(label.ravel(), minlength=2).tolist()


def test_the_channel_axis_may_be_left_out():
    predictor = Predictor.from_model(*make())
    image = picture(10, 12)
    a, b = predictor(image), predictor(image[..., None])
    np.testing.assert_array_equal(a.probability, b.probability)
    a.label[0, 0] = 1  # writeable, as a user expects of an array
    a.probability[0, 0] = 1


def test_three_dimensions():
    predictor = Predictor.from_model(*make(rank=3))
    label, probability = predictor(picture(3, 9, 5))
    assert label.shape == (3, 9, 5)
    assert probability.shape == (3, 9, 5, 2)


def test_labels_have_a_plane_each_and_one_label_none():
    names = ("cell", "wall")
    image = picture(8, 9)
    two = Predictor.from_model(*make(task="labels", names=names, threshold=0.4))
    label, probability = two(image)
    assert label.shape == (8, 9, 2)
    np.testing.assert_array_equal(label, probability > np.float32(0.4))
    one = Predictor.from_model(*make(task="labels", names=("cell",)))
    label, probability = one(image)
    assert label.shape == (8, 9)
    assert probability.shape == (8, 9, 1)


def test_many_classes_need_two_bytes():
    probability = np.zeros((1, 2, 300), np.float32)
    probability[0, 0, 299] = 1
    label = decide(probability, task="classes", threshold=0.5)
    assert label.dtype == np.uint16
    assert label.tolist() == [[299, 0]]


@pytest.mark.parametrize("size", [(61, 40), (100, 9)])
@pytest.mark.parametrize("depth", [1, 2])
def test_tiles_of_a_valid_net_are_the_whole_image(size, depth):
    made = make(padding="valid", features=(3, 4, 5)[: depth + 1])
    image = picture(*size)
    whole = Predictor.from_model(*made)(image)
    tiled = Predictor.from_model(*made, tile=13, batch_size=4)
    np.testing.assert_allclose(
        tiled(image).probability, whole.probability, rtol=1e-5, atol=1e-6
    )
    assert tiled._run._cache_size() == 1


def test_blended_tiles():
    made = make()
    image = picture(70, 45)
    expected = Predictor.from_model(*made)(image).probability
    error = []
    for overlap in (0.0, 0.6):
        predictor = Predictor.from_model(*made, tile=16, overlap=overlap, batch_size=3)
        found = predictor(image).probability
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
        # The corner lies in one tile, far from where that tile is cut.
        np.testing.assert_allclose(found[:2, :2], expected[:2, :2], rtol=1e-4)
        error.append(np.abs(found - expected).mean())
    assert error[1] < 0.7 * error[0]
    assert predictor._run._cache_size() == 1


def test_blending_adds_no_scale():
    """A net whose answer is constant stays constant."""
    model, variables, meta = make()
    head = {"kernel": np.zeros((4, 2), np.float32), "bias": np.float32([0, 1])}
    params = {"params": {**variables["params"], "head": head}}
    constant = Predictor.from_model(model, params, meta, tile=16)(picture(70, 45))
    np.testing.assert_allclose(constant.probability[..., 1], 1 / (1 + np.exp(-1)), 1e-5)


def test_wider_pixels_are_scaled_with_a_note(caplog):
    predictor = Predictor.from_model(*make())
    image = picture(8, 8)
    expected = predictor(image).probability
    with caplog.at_level(logging.WARNING, logger="unet_jax"):
        wide = image.astype(np.uint16) * 257
        for _ in range(2):
            found = predictor(wide, name="a.tif").probability
            np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(caplog.messages) == 1
    assert "a.tif" in caplog.text
    assert "uint16" in caplog.text
    # Other types keep their values; bool is black and white.
    for dtype in (np.int64, np.float64):
        found = predictor(image.astype(dtype)).probability
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    black = predictor(image > 128).probability
    white = predictor((image > 128).astype(np.uint8) * 255).probability
    np.testing.assert_array_equal(black, white)


def test_each_image_by_its_own_statistics():
    predictor = Predictor.from_model(*make(kind="example", scale=(1.0,)), tile=8)
    image = picture(20, 12).astype(np.float32)
    a, b = predictor(image), predictor(image * 3 + 40)
    np.testing.assert_allclose(a.probability, b.probability, rtol=1e-3, atol=1e-5)
    # Of the whole image, not of a tile.
    np.testing.assert_array_equal(
        predictor.prepare(image), standardise(image[..., None])
    )


def test_colour_and_grey():
    colour = Predictor.from_model(*make(channels=3))
    grey = picture(8, 8)
    np.testing.assert_array_equal(
        colour(grey).probability, colour(np.stack([grey] * 3, -1)).probability
    )
    assert Predictor.from_model(*make())(picture(8, 8, 4)).label.shape == (8, 8)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((2, 8, 8, 1), np.uint8), "one image at a time"),
        (np.zeros((8,), np.uint8), "one image at a time"),
        (np.zeros((0, 8), np.uint8), "one image at a time"),
        (np.zeros((8, 8, 7), np.uint8), "7 channels"),
        (np.full((8, 8), np.nan), "NaN"),
        (np.zeros((8, 8), complex), "complex"),
    ],
)
def test_what_is_no_image_is_refused_by_name(image, words):
    predictor = Predictor.from_model(*make())
    with pytest.raises(InputError, match=words) as error:
        predictor(image, name="scan.png")
    assert "scan.png" in str(error.value)


@pytest.mark.parametrize("options", [{"tile": -1}, {"overlap": 1}, {"batch_size": 0}])
def test_options_out_of_range(options):
    with pytest.raises(InputError):
        Predictor.from_model(*make(), **options)


def test_a_workdir_is_enough(tmp_path):
    model, variables, meta = make(norm="batch")
    save(tmp_path, variables, meta, step=0, score=0.9)
    double = jax.tree.map(lambda x: x * 2, variables)
    save(tmp_path, double, meta, step=5, score=0.1)
    image = picture(10, 11)
    for which, step, source in (("best", 0, variables), ("latest", 5, double)):
        predictor = unet_jax.Predictor(tmp_path, which=which)
        assert predictor.step == step
        expected = Predictor.from_model(model, source, meta)(image)
        np.testing.assert_array_equal(
            predictor(image).probability, expected.probability
        )
    with pytest.raises(InputError, match="no checkpoint"):
        Predictor(tmp_path / "nothing")


def test_the_package_is_light():
    code = (
        "import sys, unet_jax, unet_jax.cli; assert 'jax' not in sys.modules;"
        "import unet_jax.predict_files; unet_jax.Predictor;"
        "heavy = {'tensorflow_datasets', 'matplotlib', 'scipy.ndimage', 'torch',"
        "'nibabel', 'tifffile', 'PIL', 'orbax.checkpoint'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="nothing"):
        unet_jax.nothing  # noqa: B018
