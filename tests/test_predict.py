"""The predictor: any size, any type, the evaluation's numbers, tiles, ensembles."""

import functools
import json
import logging
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

import unet_jax
from unet_jax import losses, models, sharding, tta
from unet_jax.checkpoint import Checkpoints, Meta
from unet_jax.cli.arguments import workdirs
from unet_jax.data import eval_batches
from unet_jax.evaluation import make_eval_step
from unet_jax.normalisation import normalise, standardise
from unet_jax.predict import Net, Predictor, decide
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
        out["shown"]["prediction"][0, : size[0], : size[1]].astype(np.uint8), label
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


def programs(predictor):
    """How many programs each net was compiled to."""
    return [run._cache_size() for run in predictor._runs]


SMALL_AND_LARGE = [(61, 40), (100, 9), (2, 3), (13, 13)]


@pytest.mark.parametrize("depth", [1, 2])
def test_tiles_of_a_valid_net_are_the_whole_image(depth):
    made = make(padding="valid", features=(3, 4, 5)[: depth + 1])
    whole = Predictor.from_model(*made)
    tiled = Predictor.from_model(*made, tile=13, batch_size=4)
    for size in SMALL_AND_LARGE:
        image = picture(*size)
        np.testing.assert_allclose(
            tiled(image).probability, whole(image).probability, rtol=1e-5, atol=1e-6
        )
    assert programs(tiled) == [1]


def test_valid_tiles_of_volumes_with_a_size_for_each_axis():
    made = make(padding="valid", rank=3)
    image = picture(5, 30, 9)
    tiled = Predictor.from_model(*made, tile=(0, 6, 8), batch_size=3)
    expected = Predictor.from_model(*made)(image).probability
    np.testing.assert_allclose(tiled(image).probability, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="tile has the entry"):
        Predictor.from_model(*made, tile=(8, 8))


@pytest.mark.parametrize(
    ("fields", "views"),
    [
        ({"norm": "batch", "features": (4, 6, 8), "up": "bilinear"}, "none"),
        ({"decoder": "unetpp", "merge": "gated", "padding": "reflect"}, "flips"),
    ],
)
def test_exact_tiles_of_a_same_net_are_the_whole_image(fields, views):
    made = make(**fields)
    whole = Predictor.from_model(*made, tta=views)
    options = {"tile": 12, "blend": "exact", "batch_size": 2}
    tiled = Predictor.from_model(*made, tta=views, **options)
    for size in [(91, 77), (3, 90)]:  # the second is narrower than a window
        image = picture(*size)
        np.testing.assert_allclose(
            tiled(image).probability, whole(image).probability, rtol=1e-4, atol=1e-6
        )
    tiled(picture(83, 101), probabilities=False)
    assert programs(tiled) == [2]  # (3, 90) has one of its own


def test_exact_tiles_are_refused_before_any_image():
    for fields in ({"norm": "group"}, {"bottleneck": "transformer"}):
        made = make(**fields)
        with pytest.raises(InputError, match="use blend = 'gaussian'"):
            Predictor.from_model(*made, tile=16, blend="exact")
        Predictor.from_model(*made, blend="exact")  # of no tile at all


def test_blended_tiles():
    made = make()
    image = picture(70, 45)
    expected = Predictor.from_model(*made)(image).probability
    error = {}
    for blend in ("gaussian", "linear"):
        for overlap in (0.0, 0.6):
            options = {"blend": blend, "overlap": overlap, "batch_size": 3}
            predictor = Predictor.from_model(*made, tile=16, **options)
            found = predictor(image).probability
            np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
            # The corner lies in one tile, far from where that tile is cut.
            np.testing.assert_allclose(found[:2, :2], expected[:2, :2], rtol=1e-4)
            error[blend, overlap] = np.abs(found - expected).mean()
    assert programs(predictor) == [1]
    assert error["linear", 0.6] < 0.7 * error["linear", 0.0]
    assert error["gaussian", 0.6] < 0.7 * error["linear", 0.6]


@pytest.mark.parametrize(
    ("padding", "size", "data", "space", "options"),
    [
        # 24 rows divide over two devices and the strides; the others are mirrored more.
        ("same", (24, 19), 1, 2, {}),
        ("same", (24, 24), 2, 1, {"tta": "symmetries", "batch_size": 3}),
        ("same", (40, 20), 1, 2, {"tile": 16, "batch_size": 2}),
        ("same", (40, 20), 1, 2, {"tile": 10, "blend": "exact"}),
        ("reflect", (24, 18), 1, 2, {}),
        ("valid", (23, 18), 1, 2, {}),
        ("valid", (31, 18), 2, 1, {"tile": 10}),
    ],
)
def test_an_image_over_devices_is_the_same(padding, size, data, space, options):
    model, variables, meta = make(padding=padding)
    image = picture(*size, 1)
    mesh = sharding.make_mesh(data, space)
    one = Predictor.from_model(model, variables, meta, **options)(image)
    two = Predictor.from_model(model, variables, meta, **options, mesh=mesh)(image)
    np.testing.assert_allclose(two.probability, one.probability, rtol=0, atol=2e-6)


def test_an_image_that_does_not_divide_is_mirrored_further():
    model, variables, meta = make()
    image = picture(21, 18, 1)
    mesh = sharding.make_mesh(1, 2)
    two = Predictor.from_model(model, variables, meta, mesh=mesh)(image)
    more = np.pad(image, ((0, 3), (0, 0), (0, 0)), mode="reflect")
    one = Predictor.from_model(model, variables, meta)(more)
    np.testing.assert_allclose(two.probability, one.probability[:21], rtol=0, atol=2e-6)


def test_images_of_all_sizes_run_through_one_program():
    predictor = Predictor.from_model(*make(), tile=16, batch_size=2, tta="symmetries")
    for size in [(40, 23), (5, 30), (1, 1), (16, 16)]:
        label, probability = predictor(picture(*size))
        assert label.shape == size
        np.testing.assert_allclose(probability.sum(-1), 1, rtol=1e-5)
    assert programs(predictor) == [1]


@pytest.mark.parametrize("tta", ["none", "symmetries", "rotations"])
@pytest.mark.parametrize("tile", [0, 16])
def test_without_probabilities_the_label_is_the_same(tta, tile):
    made = make(names=("background", "a", "b"))
    predictor = Predictor.from_model(*made, tile=tile, tta=tta, batch_size=3)
    image = picture(50, 41)
    label, probability = predictor(image)
    alone = predictor(image, probabilities=False)
    assert alone.probability is None
    np.testing.assert_array_equal(alone.label, label)
    np.testing.assert_array_equal(label, probability.argmax(-1))
    kept = predictor.memory(label.shape, probabilities=True)
    assert predictor.memory(label.shape) <= kept
    assert kept >= probability.nbytes


def test_memory_is_stated_for_the_label_alone():
    """Ten times as long an image needs no more, unless it is kept or turned."""
    predictor = Predictor.from_model(*make(), tile=16)
    # The band, as wide as a tile as each is run by itself; three tiles beside it.
    assert predictor.memory((30, 100)) == 4 * 2 * (30 * 16 + 3 * 16 * 16)
    assert predictor.memory((30, 1000)) == predictor.memory((30, 100))
    whole = 4 * 2 * 30 * 1000
    assert predictor.memory((30, 1000), probabilities=True) > whole
    turned = Predictor.from_model(*make(), tile=64, tta="rotations")
    assert turned.memory((30, 1000)) > 4 * 2 * 1000 * 1000 + 2 * whole


def test_a_memory_map_is_read_tile_by_tile(tmp_path):
    np.save(tmp_path / "a.npy", picture(400, 30))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    predictor = Predictor.from_model(*make(), tile=16)
    pixels = predictor.prepare(mapped)
    assert np.shares_memory(pixels, mapped)  # not copied before
    np.testing.assert_array_equal(
        predictor(mapped).label, predictor(np.array(mapped)).label
    )


# --- Test-time augmentation ----------------------------------------------------------


def pixelwise(**fields):
    """A net that sees single pixels: 1x1 kernels, and nothing comes back up."""
    model, variables, meta = make(kernels=(1, 1), **fields)
    params = dict(variables["params"])
    decoder = jax.tree_util.tree_map_with_path(
        lambda path, x: x * (0 if "up" in jax.tree_util.keystr(path) else 1),
        params["decoder"],
    )
    return model, {**variables, "params": {**params, "decoder": decoder}}, meta


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("tile", [0, 8])
@pytest.mark.parametrize("tta", ["flips", "symmetries"])
def test_what_sees_single_pixels_is_the_same_from_all_sides(rank, tile, tta):
    made = pixelwise(rank=rank)
    image = picture(*(6, 21, 14)[-rank:])
    plain = Predictor.from_model(*made)(image).probability
    predictor = Predictor.from_model(*made, tile=tile, tta=tta, batch_size=4)
    np.testing.assert_allclose(predictor(image).probability, plain, atol=1e-6)
    assert plain.std() > 0.01


def test_augmentation_is_the_mean_of_what_is_predicted_from_each_side():
    """Of whole predictions of moved images, probabilities and not logits."""
    made = make()
    image = picture(22, 15)
    plain = Predictor.from_model(*made)
    moved = []
    for transposed in (False, True):
        for flips in ((), (0,), (1,), (0, 1)):
            x = np.flip(image.T if transposed else image, flips)
            back = np.flip(plain(x).probability, flips)
            moved.append(back.transpose(1, 0, 2) if transposed else back)
    eight = Predictor.from_model(*made, tta="symmetries", batch_size=4)(image)
    np.testing.assert_allclose(eight.probability, np.mean(moved, axis=0), atol=1e-6)
    four = Predictor.from_model(*made, tta="flips")(image)
    np.testing.assert_allclose(four.probability, np.mean(moved[:4], axis=0), atol=1e-6)
    assert np.abs(four.probability - eight.probability).max() > 1e-3


def test_seven_rotations_of_what_is_smooth():
    """A pixelwise net says of a turned image what it says of the image, but blurred."""
    made = pixelwise()
    y, x = np.mgrid[:60, :44]
    image = (127 + 60 * np.sin(y / 9) + 60 * np.cos(x / 7)).astype(np.uint8)
    plain = Predictor.from_model(*made)(image).probability
    for tile in (0, 24):
        predictor = Predictor.from_model(*made, tta="rotations", tile=tile)
        found = predictor(image).probability
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
        assert np.abs(found - plain).max() < 0.05 * np.ptp(plain[..., 0])
        assert programs(predictor) == [1 if tile else 2]


def test_rotations_are_a_mean_of_seven():
    made = make()
    image = picture(20, 31)
    predictor = Predictor.from_model(*made)
    total = predictor(image).probability
    for angle in tta.ANGLES[1:]:
        turned = tta.turn(image[..., None], angle)
        back = tta.turn_back(predictor(turned).probability, angle, image.shape)
        total = total + back
    found = Predictor.from_model(*made, tta="rotations")(image).probability
    np.testing.assert_allclose(found, total / 7, atol=1e-6)


# --- Ensembles -----------------------------------------------------------------------


def test_an_ensemble_is_the_mean_of_its_nets():
    """Of another depth, padding and normalisation, in tiles and from all sides."""
    nets = [
        Net(*make(padding="valid", threshold=0.3, task="labels", names=("cell",))),
        Net(*make(kind="example", scale=(1.0,), features=(3, 5, 7), task="labels",
                  names=("cell",))),
        Net(*make(scale=(0.01,), threshold=0.6, task="labels", names=("cell",))),
    ]  # fmt: skip
    image = picture(45, 30)
    options = {"tile": 16, "tta": "flips", "batch_size": 2}
    each = [Predictor.from_nets([net], **options)(image) for net in nets]
    ensemble = Predictor.from_nets(nets, **options)
    found = ensemble(image)
    mean = np.mean([one.probability for one in each], axis=0)
    np.testing.assert_allclose(found.probability, mean, atol=1e-6)
    threshold = np.mean([0.3, 0.5, 0.6])
    assert ensemble.meta.threshold == pytest.approx(threshold)
    np.testing.assert_array_equal(found.label, mean[..., 0] > threshold)
    assert ensemble.model is nets[0].model
    assert programs(ensemble) == [1, 1, 1]


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"task": "labels"}, "task"),
        ({"names": ("background", "wall")}, "label_names"),
        ({"channels": 3}, "channels"),
        ({"rank": 3}, "rank"),
        ({"spacing": (1.0, 1.0)}, "spacing"),
    ],
)
def test_nets_that_answer_other_questions_are_named(fields, key):
    nets = [Net(*make(), name="runs/a"), Net(*make(), name="runs/b")]
    other = Net(*make(**fields), name="runs/c")
    Predictor.from_nets(nets)
    with pytest.raises(InputError, match=f"runs/c has {key} = .* and runs/a"):
        Predictor.from_nets([*nets, other])
    with pytest.raises(InputError, match="at least one workdir"):
        Predictor.from_nets([])


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


@pytest.mark.parametrize(
    "options",
    [
        {"tile": -1},
        {"overlap": 1},
        {"batch_size": 0},
        {"blend": "none"},
        {"tta": "all"},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(InputError, match=next(iter(options))):
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
    both = Predictor([tmp_path, str(tmp_path)])  # two workdirs, if the same one here
    np.testing.assert_array_equal(
        both(image).probability, Predictor(tmp_path)(image)[1]
    )
    assert [net.name for net in both.nets] == [str(tmp_path)] * 2
    with pytest.raises(InputError, match="no checkpoint"):
        Predictor(tmp_path / "nothing")


def test_a_workdir_of_members_is_their_mean(tmp_path):
    nets = []
    for number in range(2):
        model, variables, meta = make()
        scaled = jax.tree.map(lambda x, n=number: x * np.float32(1 + n), variables)
        save(tmp_path / f"seed_{number}", scaled, meta)
        nets.append(Net(model, scaled, meta))
    index = {"kind": "seeds", "members": ["seed_0", "seed_1"]}
    (tmp_path / "members.json").write_text(json.dumps(index))
    image = picture(12, 9, 1)
    expected = Predictor.from_nets(nets)(image).probability
    for given in (tmp_path, [tmp_path], workdirs(str(tmp_path))):
        np.testing.assert_array_equal(Predictor(given)(image).probability, expected)


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
