"""The comparison of the family: its figures by hand, and all of it on tiny cells."""

import json

import jax
import numpy as np
import pytest

from benchmarks import family
from configs import default
from unet_jax import models
from unet_jax.types import InputError

# --- CKA -----------------------------------------------------------------------------


def rotation(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def test_cka_of_a_map_with_itself_is_one(rng):
    x = rng.normal(size=(50, 6)).astype(np.float32)
    assert family.cka(x, x) == pytest.approx(1.0, abs=1e-12)


def test_cka_sees_neither_rotation_nor_scale_nor_offset(rng):
    x, y = rng.normal(size=(200, 5)), rng.normal(size=(200, 8))
    y[:, :3] += x[:, :3]
    expected = family.cka(x, y)
    assert 0.05 < expected < 0.95
    assert family.cka(3 * x @ rotation(rng, 5) + 7, y) == pytest.approx(expected)
    assert family.cka(x, -0.1 * y @ rotation(rng, 8)) == pytest.approx(expected)
    assert family.cka(y, x) == pytest.approx(expected)
    # But another linear map changes it: it is no correlation of subspaces.
    stretched = x * np.array([1.0, 1, 1, 1, 9])
    assert abs(family.cka(stretched, y) - expected) > 0.01


def test_cka_of_independent_features_is_about_nothing(rng):
    found = family.cka(rng.normal(size=(4000, 8)), rng.normal(size=(4000, 8)))
    assert found < 0.01
    few = family.cka(rng.normal(size=(10, 8)), rng.normal(size=(10, 8)))
    assert few > 0.1  # why its docstring asks for many examples


def test_cka_of_one_feature_is_the_squared_correlation(rng):
    x, y = rng.normal(size=(2, 30, 1))
    expected = np.corrcoef(x[:, 0], y[:, 0])[0, 1] ** 2
    assert family.cka(x, y) == pytest.approx(expected)
    assert np.isnan(family.cka(x, np.ones((30, 2))))


# --- Intervals and verdicts ----------------------------------------------------------


def test_an_interval_holds_the_mean_and_is_as_wide_as_theory_says(rng):
    values = rng.normal(3.0, 1.0, 400)
    mean, low, high = family.interval(values.tolist())
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert low < mean < high
    assert family.interval([*values, float("nan")]) == (mean, low, high)
    assert family.interval([0.5, 0.5]) == (0.5, 0.5, 0.5)
    assert np.isnan(family.interval([0.5])[1:]).all()
    assert np.isnan(family.interval([])).all()


def test_pairs_are_compared_image_by_image(rng):
    """A small gain on every image shows although the images differ far more."""
    hard = rng.uniform(0.2, 0.9, 40)
    second = {"scores": {"dice": hard.tolist()}}
    first = {"scores": {"dice": (hard + rng.normal(0.01, 0.005, 40)).tolist()}}
    found = family.difference(first, second, "dice")
    assert family.verdict(found, family.SCORES["dice"]) == "better"
    assert family.verdict(found, family.SCORES["hausdorff"]) == "worse"
    found = family.difference(second, first, "dice")
    assert family.verdict(found, family.SCORES["dice"]) == "worse"
    found = family.difference(second, second, "dice")
    assert family.verdict(found, family.SCORES["dice"]) == "not shown"
    nothing = (float("nan"),) * 3
    assert family.verdict(nothing, family.SCORES["dice"]) == "not shown"


# --- The nets ------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "levels"), [(16, 4), (16, 5)])
def test_the_wide_net_is_the_u_net_nearest_to_unetpp(width, levels):
    def parameters(features, **fields):
        model = models.build("unet", features=features, num_classes=2, **fields)
        return family.count(model, 1)

    wanted = parameters(family.features_of("unetpp", width, levels), decoder="unetpp")
    wide = family.features_of("wide", width, levels)
    errors = [
        abs(parameters(family.features_of("unet", wide[0] + n, levels)) - wanted)
        for n in (-1, 0, 1)
    ]
    assert errors[1] == min(errors)
    assert wide[0] > width


def test_every_net_is_a_net_of_its_own():
    built = {
        name: models.build("unet", features=(4, 8, 16), num_classes=2, **net.fields)
        for name, net in family.NETS.items()
    }
    assert len({m for name, m in built.items() if name != "wide"}) == len(built) - 1
    assert {name for pair in family.PAIRS for name in pair} <= set(family.NETS)


# --- All of it -----------------------------------------------------------------------

TINY = ["--steps=3", "--batch=2", "--crop=16", "--width=2", "--levels=3"]
ONLY = "--only=unet,no_skips,unetpp_ds"


def tiny_cells():
    config = default.get_config()
    config.data.cells.size = (32, 32)
    config.data.cells.examples = 4
    config.train.eval_batch_size = 2
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two nets, measured once, and the record of a third made from one of them."""
    folder = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(family.CONFIGS, "cells", tiny_cells)
        # Compiling is nearly all of it.
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            arguments = [*TINY, "--only=unet,unetpp_ds", f"--workdir={folder}"]
            assert family.main(arguments) == 0
        finally:
            jax.config.update("jax_disable_most_optimizations", False)
    record = json.loads((folder / "unet.json").read_text())
    record["gradients"]["early"] = [v / 2 for v in record["gradients"]["early"]]
    record["scores"]["hausdorff"] = [v + 1 for v in record["scores"]["hausdorff"]]
    (folder / "no_skips.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def untrained(monkeypatch):
    """From here on nothing may be trained."""
    monkeypatch.setitem(family.CONFIGS, "cells", tiny_cells)
    monkeypatch.setattr(family, "measure", None)


def test_a_record_holds_what_the_tables_need(workdir):
    record = json.loads((workdir / "unetpp_ds.json").read_text())
    assert record["steps"] == 3
    assert record["images"] == [4, 4]
    assert {len(scores) for scores in record["scores"].values()} == {4}
    dice, iou = (np.asarray(record["scores"][k]) for k in ("dice", "iou"))
    np.testing.assert_allclose(dice, 2 * iou / (1 + iou))
    assert set(record["cka"]) == {"0,1", "0,2", "1,1"}
    assert record["cka"]["0,1"][0] == record["cka"]["0,1"][1]
    assert record["cka"]["0,2"][0] != record["cka"]["0,2"][1]
    first, last = record["levels"]["1"], record["levels"]["2"]
    assert first["parameters"] < last["parameters"] < record["parameters"]
    assert first["flops"] < last["flops"] < record["flops"]
    assert "gradients" not in record
    gradients = json.loads((workdir / "unet.json").read_text())["gradients"]
    assert len(gradients["early"]) == len(gradients["end"]) == 3
    assert min(gradients["early"] + gradients["end"]) > 0
    assert gradients["early"] != gradients["end"]


def test_the_tables_are_written_again_without_training(workdir, untrained, tmp_path):
    out, again = tmp_path / "one.md", tmp_path / "again.md"
    arguments = [*TINY, ONLY, f"--workdir={workdir}"]
    assert family.main([*arguments, "--table", f"--out={out}"]) == 0
    # Without --table it has nothing to do either: all are there.
    assert family.main([*arguments, f"--out={again}"]) == 0
    before = out.read_text()
    assert again.read_text() == before
    for words in (
        "| UNet++, cut off at L2 | 2-4-8 |",
        "| U-Net without skips against U-Net | +0.000 [+0.000, +0.000] |",
        "**+1.0 [+1.0, +1.0]** worse",
        "early, 3 of 3 levels get more with skips",
        "end, 0 of 3 levels get more",
        "- UNet++, deep supervision against U-Net: Dice ",
        "- UNet++ against U-Net: not measured.",
        "| X[0,2] |",
        "python -m benchmarks.family --data=cells --steps=3",
        "CPU cores",
    ):
        assert words in before
    assert str(workdir) not in before
    assert all(len(line) <= 88 for line in before.split("\n") if line[:1] not in "|p")


def test_a_workdir_of_other_settings_is_refused(workdir, untrained, capsys):
    arguments = [*TINY, ONLY, f"--workdir={workdir}", "--table"]
    assert family.main([*arguments, "--steps=4"]) == 2
    assert "was measured with steps = 3 and not 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data=nuclei"], "--root=DIR"),
        (["--data=cats"], "cells, nuclei"),
        (["--only=unet,vnet"], "'vnet'"),
        (["--levels=2"], "--levels = 2"),
        (["--table", "--workdir=nowhere"], "no record in nowhere"),
    ],
)
def test_a_command_that_cannot_be_is_refused(arguments, words, capsys):
    assert family.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_file_that_is_no_record_is_named(tmp_path):
    (tmp_path / "unet.json").write_text("[]")
    options = family.parse([f"--workdir={tmp_path}"])
    with pytest.raises(InputError, match=r"unet\.json is not a record"):
        family.stored(options)
