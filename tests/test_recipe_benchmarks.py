"""The benchmarks of the recipe: what they draw, keep, add up and write."""

import sys

import numpy as np
import pytest
import tifffile

from benchmarks import ablation, few_images
from unet_jax import metrics, partition
from unet_jax.data import cells


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("train-volume.tif", "train-labels.tif"):
        pages = 255 * rng.integers(0, 2, (30, 40, 40)).astype(np.uint8)
        tifffile.imwrite(tmp_path / name, pages, photometric="minisblack")
    return str(tmp_path)


def test_some_examples_of_a_source():
    source = cells.open(split="val", size=(16, 16))
    some = few_images.Some(source, [7, 2])
    assert len(some) == 2
    assert [some.name(i) for i in range(2)] == [source.name(7), source.name(2)]
    np.testing.assert_array_equal(some[0]["image"], source[7]["image"])
    assert some.size(1) == (16, 16)


def test_few_images_goes_on_where_it_was(root, tmp_path, monkeypatch, capsys):
    """A row a run as soon as it is there; nothing is measured twice."""
    out, asked = tmp_path / "out", []

    def measured(wired, count, seed):
        asked.append((bool(wired.config["augment"]), count, seed))
        if len(asked) == 7:
            raise KeyboardInterrupt
        figures = dict.fromkeys(few_images.FIGURES, count / 20 + seed / 100)
        return figures | {"loss": 0.5, "seconds": 1.0}

    monkeypatch.setattr(few_images, "measured", measured)
    monkeypatch.setattr(
        sys, "argv", ["few", f"--root={root}", f"--out={out}", "--steps=30"]
    )
    with pytest.raises(KeyboardInterrupt):
        few_images.main()
    rows = few_images.read(out / "few_images.csv")
    assert len(rows) == 6
    assert rows[-1]["images"] == 5 and rows[-1]["augmentation"] == "augmented"
    few_images.main()
    assert len(asked) == 1 + 2 * 5 * 3
    assert len(set(asked)) == 2 * 5 * 3
    table = (out / "few_images.md").read_text()
    assert "| 20 | augmented | 1.010 (1.000-1.020) |" in table
    assert (out / "few_images.png").is_file()
    assert table.strip() in capsys.readouterr().out


def test_ablation_adds_up_what_it_kept(rng):
    """Means of the seeds' own figures, from rows as they are written."""
    known = {}
    rows = {}
    for border in (False, True):
        for elastic in (False, True):
            for seed in range(2):
                tables = rng.integers(1, 99, (4, 2, 2))
                counts = rng.uniform(0, 1, (4, 11, 12))
                flat = np.concatenate(
                    [tables.reshape(4, -1), counts.reshape(4, -1)], axis=1
                )
                name = f"{ablation._name(border, elastic)}, seed {seed}"
                known[name] = {"none": flat.tolist(), "symmetries": flat.tolist()}
                rows[border, elastic, seed] = tables, counts
    kept = ablation.stacked(known, border=True, elastic=False, tta=False, seeds=2)
    assert kept.shape == (4, 2, 4 + 132)
    found = ablation.summarise(kept)
    want = []
    for seed in range(2):
        tables, counts = rows[True, False, seed]
        dice = metrics.summarise(tables, task="classes", label_names=ablation.NAMES)
        want.append([dice["dice/membrane"], partition.isbi2012(counts)["v_rand"]])
    got = [found["dice/membrane"], found["v_rand"]]
    np.testing.assert_allclose(got, np.mean(want, axis=0))
    page = ablation.table(known, 2)
    assert page.count("\n| ") == 8 + 1 + 4
    # Both views were the same: their mean brings exactly nothing.
    last = "| the mean over 8 symmetries" + " | +0.000 [+0.000, +0.000]" * 3 + " |"
    assert page.endswith(last)


def test_ablation_takes_parts_away():
    full = ablation.config("x", border=True, elastic=True, steps=5)
    none = ablation.config("x", border=False, elastic=False, steps=5)
    assert full["data"].pop("border") == {"w0": 10.0}
    assert full["augment"].pop("elastic") == 10.0
    assert full == none
