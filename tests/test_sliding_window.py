"""Windows and movements against loops and closed forms; all of it on tiny slices."""

import functools
import json

import jax
import numpy as np
import pytest

from benchmarks import sliding_window as bench
from unet_jax import layers, models
from unet_jax.types import InputError

QUICK = {"xla_backend_optimization_level": 0}

# --- Windows -------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 4, 5])
def test_a_window_lies_around_the_pixel_that_labels_are_cropped_to(
    window, monkeypatch, rng
):
    """Prediction and training agree on the middle, at the border and beyond a batch."""
    monkeypatch.setattr(bench, "PATCHES", 8)
    image = rng.permutation(6 * 7).reshape(6, 7, 1).astype(np.float32)

    def probability(variables, patches):
        return layers.crop(patches, (1, 1))

    classify = jax.jit(bench.make_window_fn(probability, window))
    pixels = bench.grid((6, 7), 1)
    found = bench.by_windows(classify, {}, image, pixels, window=window)
    np.testing.assert_array_equal(found.reshape(6, 7, 1), image)


@pytest.fixture(scope="module")
def unet():
    model = models.build("unet", features=(2, 4), num_classes=2)
    image = np.zeros((1, 8, 8, 1), np.float32)
    init = jax.jit(model.init, compiler_options=QUICK)
    return model, init(jax.random.key(0), image)


def window_net(unet, *, placed):
    """The classifier with the U-Net's encoder, its dense layer from NumPy."""
    model, variables = unet
    rng = np.random.default_rng(3)
    cells = 4 * (4 if placed else 1)  # 4 x 4 cells of 4 channels for windows of 8
    kernel = rng.normal(size=(4 * (cells if placed else 1), 2)).astype(np.float32)
    head = {"kernel": kernel, "bias": rng.normal(size=2).astype(np.float32)}
    mine = {
        "params": {"encoder": variables["params"]["encoder"], "head": head},
        "batch_stats": {"encoder": variables["batch_stats"]["encoder"]},
    }
    return model.clone(decoder=functools.partial(bench.Middle, placed=placed)), mine


@pytest.mark.parametrize("placed", [False, True])
def test_the_classifier_is_the_u_nets_encoder_and_one_dense_layer(unet, placed, rng):
    net, variables = window_net(unet, placed=placed)
    patches = rng.normal(size=(3, 8, 8, 1)).astype(np.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), patches)
    assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, variables)
    logits, _ = jax.jit(net.apply, compiler_options=QUICK)(variables, patches)
    assert logits.shape == (3, 1, 1, 2)
    model, whole = unet
    _, aux = jax.jit(model.apply, compiler_options=QUICK)(whole, patches)
    coarse = np.asarray(aux["encoder"][-1])
    x = coarse.reshape(3, -1) if placed else coarse.mean((1, 2))
    head = variables["params"]["head"]
    expected = x @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits[:, 0, 0], expected, rtol=1e-4, atol=1e-5)


def test_windows_are_what_loops_cut_out(unet, monkeypatch, rng):
    monkeypatch.setattr(bench, "PATCHES", 16)
    net, variables = window_net(unet, placed=True)
    image = rng.normal(size=(5, 9, 1)).astype(np.float32)

    def probability(variables, patches):
        return jax.nn.softmax(net.apply(variables, patches)[0])

    classify = jax.jit(bench.make_window_fn(probability, 8), compiler_options=QUICK)
    pixels = bench.grid((5, 9), 2)
    found = bench.by_windows(classify, variables, image, pixels, window=8)
    patches = []
    for y in range(0, 5, 2):
        for x in range(0, 9, 2):
            patch = np.zeros((8, 8, 1), np.float32)
            for i in range(8):
                for j in range(8):
                    # Mirrored about the outermost pixels.
                    v, u = abs(y + i - 3), abs(x + j - 3)
                    patch[i, j] = image[min(v, 8 - v), min(u, 16 - u)]
            patches.append(patch)
    run = jax.jit(probability, compiler_options=QUICK)
    expected = np.asarray(run(variables, np.stack(patches)))[:, 0, 0]
    assert found.shape == (15, 2)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.ptp(found[:, 0]) > 0.01  # the windows differ


# --- Movements -----------------------------------------------------------------------


def test_a_shift_moves_down_and_right_and_mirrors(rng):
    x = rng.normal(size=(6, 5, 2)).astype(np.float32)
    moved = bench.shifted(x, by=2)
    assert moved.shape == x.shape
    np.testing.assert_array_equal(moved[2:, 2:], x[:-2, :-2])
    np.testing.assert_array_equal(moved[0, 2:], x[2, :-2])


def test_a_right_angle_by_splines_is_a_quarter_turn(rng):
    x = rng.normal(size=(9, 9, 2)).astype(np.float32)
    np.testing.assert_allclose(bench.rotated(x, angle=90.0), np.rot90(x), atol=1e-5)
    assert np.abs(bench.rotated(x, angle=45.0) - x).mean() > 0.1


def test_a_turn_and_back_keeps_what_is_smooth():
    y, x = np.mgrid[:64, :64].astype(np.float32)
    smooth = np.sin(y / 7) + np.cos(x / 9)
    (forward, _), *_ = bench.MOVEMENTS["turned by 15 degrees and back"]
    inside = bench.interior((64, 64), 6)
    error = np.abs(forward(smooth[..., None])[..., 0] - smooth)[inside]
    assert error.max() < 1e-3


def test_the_interior_is_a_disc_that_turns_into_itself():
    inside = bench.interior((64, 64), 10)
    radius = 32 - 15 - 8  # half the size, ceil(10 sqrt 2), the largest shift
    y, x = np.nonzero(inside)
    assert np.hypot(y - 31.5, x - 31.5).max() <= radius
    assert inside.sum() == pytest.approx(np.pi * radius**2, rel=0.05)
    np.testing.assert_array_equal(inside, np.rot90(inside))
    with pytest.raises(InputError, match="48 x 48"):
        bench.interior((48, 48), 12)


def test_what_sees_pixels_alone_changes_with_no_movement(rng):
    image = rng.integers(0, 256, (64, 64, 1)).astype(np.uint8)
    inside = bench.interior((64, 64), 4)

    def predict(x):
        return np.asarray(x, np.float32)[..., 0] / 255

    found = bench.changes(predict, image, inside)
    assert list(found) == list(bench.MOVEMENTS)
    back = [found.pop(name) for name in list(found) if name.endswith("back")]
    assert max(change for change, _ in found.values()) < 1e-6
    # Noise is what resampling twice does not keep.
    assert min(change for change, _ in back) > 0.01
    assert min(part for _, part in back) > 0.01


def test_what_sees_no_pixels_changes_as_a_ramp_does(rng):
    """The prediction stays where it is: a shift by n pixels is off by n steps."""
    image = rng.integers(0, 256, (64, 64, 1)).astype(np.uint8)
    inside = bench.interior((64, 64), 4)
    ramp = np.broadcast_to(np.arange(64, dtype=np.float32)[:, None] / 63, (64, 64))
    found = bench.changes(lambda x: ramp, image, inside)
    for n in bench.SHIFTS:
        change, part = found[f"shifted by {n} pixel{'s' if n > 1 else ''}"]
        assert change == pytest.approx(n / 63, abs=1e-6)
        rows = inside.sum(1)
        assert part == pytest.approx(rows[32 : 32 + n].sum() / rows.sum())
    # Flipped upside down every pixel is off by its distance to the mirror axis, twice;
    # sideways by nothing.
    away = np.abs(2 * np.arange(64) - 63) / 63
    mean = (away * inside.sum(1)).sum() / inside.sum()
    assert found["flipped"][0] == pytest.approx(mean / 2, rel=1e-4)
    assert found["turned by 15 degrees and back"] == [0, 0]


def test_a_net_that_pools_moves_with_shifts_by_its_strides_only(unet, rng):
    model, variables = unet
    size = (64, 64)
    run = jax.jit(model.apply, compiler_options=QUICK)

    def predict(x):
        logits = np.asarray(run(variables, x[None].astype(np.float32) / 255)[0])[0]
        return 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))

    image = rng.integers(0, 256, (*size, 1)).astype(np.uint8)
    inside = bench.interior(size, bench.reach_of(model, size))
    assert inside.sum() > 100
    found = bench.changes(predict, image, inside)
    assert found["shifted by 8 pixels"][0] < 1e-6  # and so no border was seen
    assert found["shifted by 1 pixel"][0] > 1e-4
    assert found["turned by 45 degrees"][0] > 1e-4


# --- Figures -------------------------------------------------------------------------


def test_dice_counts_pixels():
    label = np.array([0, 0, 0, 1, 1])
    said = np.array([0, 0, 1, 1, 0])
    probability = np.eye(2, dtype=np.float32)[said]
    # 2 of membranes right, 3 true, 3 said; 1 of cells right, 2 true, 2 said.
    assert bench.dice(label, probability) == pytest.approx([4 / 6, 2 / 4])


def test_held_out_slices_are_spread():
    assert bench.held_out(1, 10) == [0]
    assert bench.held_out(3, 10) == [0, 4, 9]
    assert bench.held_out(20, 10) == list(range(10))


def test_a_map_comes_back_from_its_text(rng):
    cell = rng.random((13, 13)) > 0.3
    np.testing.assert_array_equal(bench.unpacked(bench.packed(cell), 13), cell)


# --- All of it -----------------------------------------------------------------------

TINY = ["--steps=2", "--stride=16", "--slices=2", "--side=10"]
NETS = {
    "plain": bench.NETS["plain"],
    "window64_placed": bench.NETS["window64_placed"]._replace(window=16),
    "augmented": bench.NETS["augmented"]._replace(augment=bench.TURNS),
}


@pytest.fixture(scope="module")
def tiny():
    """Nets, crops and batches so small that compiling is nearly all of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "NETS", NETS)
        patch.setattr(bench, "FEATURES", (2, 4))
        patch.setattr(bench, "CROP", 16)
        patch.setattr(bench, "PATCHES", 4)
        patch.setattr(bench, "PASSES", 1)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny):
    """Where 30 tiny slices are, and what all of it wrote."""
    tifffile = pytest.importorskip("tifffile")
    root, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (30, 64, 64)).astype(np.uint8)
    label = np.where(image > 60, 255, 0).astype(np.uint8)
    tifffile.imwrite(root / "train-volume.tif", image, photometric="minisblack")
    tifffile.imwrite(root / "train-labels.tif", label, photometric="minisblack")
    assert bench.main([f"--root={root}", f"--out={out}", *TINY]) == 0
    return root, out


def test_the_record_holds_what_the_page_needs(folders, unet):
    _, out = folders
    nets = json.loads((out / "sliding_window.json").read_text())["nets"]
    assert list(nets) == list(NETS)
    for name, record in nets.items():
        assert record["steps"] == 2
        assert np.shape(record["dice"]) == (2, 2)
        assert 0 <= np.min(record["dice"]) <= np.max(record["dice"]) <= 1
        if NETS[name].window:
            assert min(record["window_seconds"] + record["pass_seconds"]) > 0
        else:
            assert np.shape(record["dice_all"]) == (10, 2)
            assert len(record["changes"]) == 10
    # The encoder's, and the dense layer's of 8 x 8 cells of 4 channels.
    params = unet[1]["params"]["encoder"]
    count = sum(jax.tree.leaves(jax.tree.map(np.size, params))) + 2 * (8 * 8 * 4 + 1)
    assert nets["window64_placed"]["parameters"] == count


def test_the_page_is_written_again_without_training(folders, monkeypatch):
    from PIL import Image

    root, out = folders
    monkeypatch.setattr(bench, "measure", None)
    before = (out / "sliding_window.md").read_text()
    assert bench.main([f"--root={root}", f"--out={out}", *TINY]) == 0
    assert (out / "sliding_window.md").read_text() == before
    for words in (
        "python benchmarks/sliding_window.py --root=DIR --out=",
        "--out=runs/sliding_window --steps=2",
        "| window | seconds, 1 of 256 pixels |",
        "| window 64 x 64, by place |",
        "| U-Net, augmented |",
        "| shifted by 8 pixels | ",
        "slices 20, 29",
    ):
        assert words in before
    assert str(out) not in before and str(root) not in before
    assert "nan" not in before
    assert all(len(line) <= 88 for line in before.split("\n") if line[:1] not in "|p")
    with Image.open(out / "sliding_window.png") as picture:
        assert picture.width > 4 * 100 and picture.height > 2 * 100


def test_another_command_is_refused(folders, capsys):
    root, out = folders
    arguments = [f"--root={root}", f"--out={out}", *TINY, "--steps=3"]
    assert bench.main(arguments) == 2
    assert "was measured with steps = 2 and not 3" in capsys.readouterr().err


def test_a_file_that_is_no_record_is_named(tmp_path, capsys):
    (tmp_path / "sliding_window.json").write_text("[]")
    assert bench.main(["--root=nowhere", f"--out={tmp_path}"]) == 2
    assert "sliding_window.json is not a record" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--steps=1", "--stride=0", "--slices=0"])
def test_an_option_that_cannot_be_is_refused(option, capsys):
    assert bench.main(["--root=nowhere", option]) == 2
    assert option.split("=")[0] in capsys.readouterr().err
