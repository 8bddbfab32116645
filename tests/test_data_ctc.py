"""unet_jax.data.ctc: folders of the challenge's shape, written here from the cells."""

import inspect
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy import ndimage

from configs import default
from unet_jax import data
from unet_jax.data import cells, ctc
from unet_jax.data.border import separate
from unet_jax.types import InputError


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, array, photometric="minisblack", compression="zlib")


def marker_image(numbers: np.ndarray) -> np.ndarray:
    """A small blob deep inside each cell, with another number than its mask."""
    depth = ndimage.distance_transform_edt(numbers > 0)
    answer = np.zeros(numbers.shape, np.uint16)
    for k in np.unique(numbers)[1:]:
        inside = numbers == k
        answer[inside & (depth >= 0.7 * depth[inside].max())] = 500 + k
    return answer


def write(
    root: Path,
    sequence: str = "01",
    *,
    frames: int = 4,
    masks: tuple[int, ...] = (1, 3),
    dropped: tuple[int, ...] = (),
    pages: tuple[int, ...] = (),
    truth: str = "GT",
    markers: bool = True,
    digits: int = 3,
    size: tuple[int, ...] = (64, 80),
) -> list[np.ndarray]:
    """A sequence of the built-in cells; returns all numbers of cells, frame by frame.

    ``masks``: the frames that have one; ``dropped``: the numbers left out of them;
    ``pages``: of a volume, those that have a mask each; () is all in one file.
    """
    source = cells.open(
        split=sequence, rank=len(size), size=size, examples=frames, crowding=0.5
    )
    everything = []
    for t in range(frames):
        number = f"{t:0{digits}}"
        numbers = source.instances(t)
        everything.append(numbers)
        save(root / sequence / f"t{number}.tif", source[t]["image"][..., 0])
        if markers:
            place = root / f"{sequence}_GT" / "TRA" / f"man_track{number}.tif"
            save(place, marker_image(numbers))
        if t not in masks:
            continue
        kept = np.where(np.isin(numbers, dropped), 0, numbers).astype(np.uint16)
        place = root / f"{sequence}_{truth}" / "SEG"
        if not pages:
            save(place / f"man_seg{number}.tif", kept)
        for page in pages:
            save(place / f"man_seg_{number}_{page:0{digits}}.tif", kept[page])
    return everything


def longest_side(numbers: np.ndarray, spacing: tuple[float, ...]) -> float:
    sides = []
    for k in np.unique(numbers)[1:]:
        places = np.argwhere(numbers == k)
        sides.append((places.max(axis=0) - places.min(axis=0) + 1) * spacing)
    return float(np.max(sides))


def near(mask: np.ndarray, reach: float, spacing: tuple[float, ...]) -> np.ndarray:
    """Where a pixel of the mask is within reach, by the distance to each of them."""
    grid = np.stack(np.meshgrid(*map(np.arange, mask.shape), indexing="ij"), axis=-1)
    answer = np.zeros(mask.shape, bool)
    for place in np.argwhere(mask):
        answer |= (((grid - place) * spacing) ** 2).sum(axis=-1) <= reach**2
    return answer


def test_a_frame_is_what_was_written(tmp_path, caplog):
    everything = write(tmp_path)
    with caplog.at_level(logging.WARNING, "unet_jax"):
        source = ctc.open(root=tmp_path, split="all")
    assert f"2 frames in {tmp_path} have no mask and are left out" in caplog.text
    assert [source.name(i) for i in range(len(source))] == [
        "01/t001.tif",
        "01/t003.tif",
    ]
    assert source.label_names == ("background", "cell")
    for i, t in enumerate((1, 3)):
        example = source[i]
        assert source.size(i) == (64, 80) and example["image"].shape == (64, 80, 1)
        image = tifffile.imread(tmp_path / "01" / f"t00{t}.tif")
        np.testing.assert_array_equal(example["image"][..., 0], image)
        assert source.instances(i).dtype == np.int32
        np.testing.assert_array_equal(source.instances(i), everything[t])
        np.testing.assert_array_equal(example["label"], everything[t] > 0)
        assert example["label"].dtype == np.uint8
        assert example["weight"].dtype == np.float32
        assert (example["weight"] == 1).all()  # every marker has its mask


@pytest.mark.parametrize("unknown", [0.0, 5.0, np.inf])
@pytest.mark.parametrize("truth", ["GT", "ST"])
def test_cells_without_a_mask_are_not_background(tmp_path, unknown, truth):
    dropped = (2, 3)
    everything = write(tmp_path, dropped=dropped, truth=truth)
    source = ctc.open(root=tmp_path, split="01", unknown=unknown, truth=truth)
    for i, t in enumerate((1, 3)):
        numbers = source.instances(i)
        missing = np.isin(everything[t], dropped)
        assert missing.any() and not numbers[missing].any()
        reach = unknown or longest_side(numbers, (1, 1))
        markers = np.where(missing, marker_image(everything[t]), 0) > 0
        expected = ~near(markers, reach, (1, 1)) | (numbers > 0)
        weight = source[i]["weight"]
        np.testing.assert_array_equal(weight, expected)
        # What all of it is for.
        assert (weight[numbers > 0] == 1).all()
        if unknown != 5:
            assert (weight[missing] == 0).all()
        background = (everything[t] == 0) & (weight == 1)
        assert background.any() == (unknown != np.inf)
        assert not source[i]["label"][missing].any()
    whole = ctc.open(root=tmp_path, split="01", truth=truth, complete=True)
    assert (whole[0]["weight"] == 1).all()


def test_frames_without_markers(tmp_path, caplog):
    write(tmp_path, markers=False, dropped=(2,))
    with caplog.at_level(logging.WARNING, "unet_jax"):
        gold = ctc.open(root=tmp_path, split="01")
        assert "no markers" not in caplog.text
        # A gold frame has all of its cells; silver truth may lack some.
        assert (gold[0]["weight"] == 1).all()
        shutil.move(tmp_path / "01_GT", tmp_path / "01_ST")
        silver = ctc.open(root=tmp_path, split="01", truth="ST")
    assert "2 frames have no markers" in caplog.text and "t001.tif" in caplog.text
    np.testing.assert_array_equal(silver[0]["weight"], silver.instances(0) > 0)
    caplog.clear()
    sure = ctc.open(root=tmp_path, split="01", truth="ST", complete=True)
    assert (sure[0]["weight"] == 1).all() and "no markers" not in caplog.text


def test_a_frame_of_which_no_cell_has_a_mask(tmp_path):
    write(tmp_path, masks=(1,), dropped=tuple(range(1, 99)))
    source = ctc.open(root=tmp_path, split="01")
    assert not source[0]["weight"].any()  # how large a cell is, nothing says
    assert ctc.open(root=tmp_path, split="01", unknown=3)[0]["weight"].any()
    os.remove(tmp_path / "01_GT" / "TRA" / "man_track001.tif")
    save(tmp_path / "01_GT" / "TRA" / "man_track001.tif", np.zeros((64, 80), np.uint16))
    assert ctc.open(root=tmp_path, split="01")[0]["weight"].all()  # it is empty


# ---- volumes

VOLUME = (16, 24, 28)


def test_pages_of_a_volume(tmp_path):
    everything = write(tmp_path, size=VOLUME, pages=(4, 9), masks=(0, 2), dropped=(2,))
    spacing = (2.5, 1.0, 1.0)
    source = ctc.open(root=tmp_path, split="all", spacing=spacing, unknown=6.0)
    assert len(source) == 2 and source.size(1) == VOLUME
    for i, t in enumerate((0, 2)):
        example, numbers = source[i], source.instances(i)
        assert example["image"].shape == (*VOLUME, 1)
        expected = np.zeros(VOLUME, np.int32)
        kept = np.where(everything[t] == 2, 0, everything[t])
        expected[[4, 9]] = kept[[4, 9]]
        np.testing.assert_array_equal(numbers, expected)
        np.testing.assert_array_equal(example["label"], expected > 0)
        # Also a cell whose marker is on another page has no mask for all one knows.
        markers = marker_image(everything[t])
        found = np.unique(markers[expected > 0])
        unknown = near((markers > 0) & ~np.isin(markers, found), 6.0, spacing)
        weight = np.zeros(VOLUME)
        weight[[4, 9]] = 1
        weight[unknown & (expected == 0)] = 0
        np.testing.assert_array_equal(example["weight"], weight)
        assert example["weight"].any(axis=(1, 2)).nonzero()[0].tolist() == [4, 9]
    derived = ctc.open(root=tmp_path, split="all", spacing=spacing)
    assert derived[0]["weight"].sum() < source[0]["weight"].sum()
    bare = ctc.open(root=tmp_path, split="all", complete=True)[0]["weight"]
    np.testing.assert_array_equal(np.flatnonzero(bare.all(axis=(1, 2))), [4, 9])
    assert bare.sum() == 2 * 24 * 28


def test_a_volume_that_is_annotated_whole(tmp_path):
    everything = write(tmp_path, size=VOLUME, masks=(1,), dropped=(1,), frames=2)
    # Masks of pages add nothing to that of all pages.
    save(tmp_path / "01_GT" / "SEG" / "man_seg_001_003.tif", np.ones(VOLUME[1:], "u2"))
    source = ctc.open(root=tmp_path, split="01", spacing=(2, 1, 1))
    kept = np.where(everything[1] == 1, 0, everything[1])
    np.testing.assert_array_equal(source.instances(0), kept)
    markers = np.where(everything[1] == 1, marker_image(everything[1]), 0) > 0
    reach = longest_side(kept, (2, 1, 1))
    expected = ~near(markers, reach, (2, 1, 1)) | (kept > 0)
    np.testing.assert_array_equal(source[0]["weight"], expected)


def test_pages_without_markers_count_their_masks_alone(tmp_path):
    write(tmp_path, size=VOLUME, pages=(5,), markers=False)
    source = ctc.open(root=tmp_path, split="01")
    np.testing.assert_array_equal(source[0]["weight"], source.instances(0) > 0)


# ---- splits


def test_splits(tmp_path):
    write(tmp_path, masks=(0, 1, 2, 3), digits=4)
    write(tmp_path, "02", masks=(1, 2))
    (tmp_path / "03").mkdir()  # a sequence without truth

    def names(split, **options):
        source = ctc.open(root=tmp_path, split=split, **options)
        return [source.name(i) for i in range(len(source))]

    first = [f"01/t000{t}.tif" for t in range(4)]
    second = ["02/t001.tif", "02/t002.tif"]
    assert names("01") == first and names("02") == second
    assert names("all") == names("train") == first + second
    assert names("all", sequences=("02", "01")) == second + first
    assert names("all", sequences=("02",)) == second
    assert names("01[:50%]") == first[:2] and names("02[-1:]") == second[-1:]
    assert names("all[fold 2/3]") == first[2:]
    assert names("all[not fold 2/3]") == first[:2] + second
    with pytest.raises(InputError, match=r"no sequence '03' .* choose from 01, 02, or"):
        names("03")
    with pytest.raises(InputError, match=r"no sequence 'val'"):
        names("val")
    with pytest.raises(InputError, match=r"no sequence '07'"):
        names("all", sequences=("07",))
    with pytest.raises(InputError, match="outside the 4 examples of '01'"):
        names("01[:5]")


def test_build(tmp_path):
    write(tmp_path, dropped=(2,))
    write(tmp_path, "02", frames=3, masks=(0, 1, 2))
    options = {"source": "ctc", "task": "classes", "root": str(tmp_path)}
    options |= {"train": "01", "evaluation": "02"}
    plain = data.build(**options)
    made = data.build(**options, border={"w0": 10.0, "cache": "none"})
    assert (len(made.train), len(made.evaluation)) == (2, 3)
    assert made.label_names == ("background", "cell") and made.rank == 2
    for i in range(2):
        example, before = made.train[i], plain.train[i]
        np.testing.assert_array_equal(example["weight"] > 0, before["weight"] > 0)
        gap = separate(plain.train.instances(i))
        np.testing.assert_array_equal(example["label"] != before["label"], gap)
    np.testing.assert_array_equal(
        made.evaluation[2]["weight"], plain.evaluation[2]["weight"]
    )
    with pytest.raises(InputError, match=r"source 'ctc' needs a folder"):
        data.build(**{**options, "root": ""})
    with pytest.raises(TypeError, match="sequence"):
        data.build(**options, ctc={"sequence": "01"})


def test_files_at_fault_are_left_out(tmp_path, caplog):
    everything = write(tmp_path, masks=(0, 1, 2, 3))
    place = tmp_path / "01_GT" / "SEG"
    (tmp_path / "01" / "t000.tif").unlink()
    save(place / "man_seg001.tif", np.zeros((8, 8), np.uint16))
    (tmp_path / "01" / "t002.tif").write_bytes(b"no frame")
    with pytest.raises(InputError, match=r"man_seg000\.tif has no frame"):
        ctc.open(root=tmp_path, split="all")
    with caplog.at_level(logging.WARNING, "unet_jax"):
        source = ctc.open(root=tmp_path, split="all", on_error="skip")
    assert [source.name(i) for i in range(len(source))] == ["01/t003.tif"]
    np.testing.assert_array_equal(source.instances(0), everything[3])
    assert f"3 faulty frames of {tmp_path} are left out. The first" in caplog.text
    (tmp_path / "01" / "t003.tif").write_bytes(b"no frame")
    with pytest.raises(InputError, match=r"All frames of .* are faulty"):
        ctc.open(root=tmp_path, split="all", on_error="skip")


@pytest.mark.parametrize(
    "name", ["01/t001.tif", "01_GT/SEG/man_seg001.tif", "01_GT/TRA/man_track001.tif"]
)
def test_links_that_lead_out(tmp_path, name):
    root = tmp_path / "root"
    write(root)
    (root / name).rename(tmp_path / "elsewhere.tif")
    (root / name).symlink_to(tmp_path / "elsewhere.tif")
    with pytest.raises(InputError, match=rf"{name} leads to .*links=True"):
        ctc.open(root=root, split="all")
    assert len(ctc.open(root=root, split="all", links=True)) == 2


def test_config_has_every_option():
    keys = set(default.get_config().data.ctc.keys())
    common = {"root", "split", "links", "on_error"}
    assert keys == set(inspect.signature(ctc.open).parameters) - common


# ---- bad input


def test_what_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"nowhere does not exist: check `data\.root`"):
        ctc.open(root=tmp_path / "nowhere", split="01")
    with pytest.raises(InputError, match=r"holds no sequence with masks: .*01_GT/SEG"):
        ctc.open(root=tmp_path, split="01")
    write(tmp_path)
    with pytest.raises(InputError, match=r"holds no sequence with masks: .*01_ST/SEG"):
        ctc.open(root=tmp_path, split="01", truth="ST")
    with pytest.raises(InputError, match=r"data\.ctc\.truth = 'gold'.* one of GT, ST"):
        ctc.open(root=tmp_path, split="01", truth="gold")
    for path in (tmp_path / "01_GT" / "SEG").iterdir():
        path.rename(path.with_suffix(".png"))
    with pytest.raises(InputError, match=r"SEG holds no masks: .* man_seg000\.tif"):
        ctc.open(root=tmp_path, split="01")


def test_a_mask_without_its_frame(tmp_path):
    write(tmp_path)
    os.remove(tmp_path / "01" / "t003.tif")
    with pytest.raises(
        InputError, match=r"The mask .*man_seg003\.tif has no frame .*01/t003\.tif: add"
    ):
        ctc.open(root=tmp_path, split="01")


@pytest.mark.parametrize("folder", ["SEG/man_seg", "TRA/man_track"])
def test_sizes_that_differ(tmp_path, folder):
    write(tmp_path)
    save(tmp_path / "01_GT" / f"{folder}003.tif", np.ones((64, 79), np.uint16))
    with pytest.raises(
        InputError, match=r"t003\.tif has the size 64 x 80, but its mask .*64 x 79"
    ):
        ctc.open(root=tmp_path, split="01")


def test_pages_that_do_not_fit(tmp_path):
    write(tmp_path, size=VOLUME, pages=(4,), masks=(2,))
    place = tmp_path / "01_GT" / "SEG"
    save(place / "man_seg_002_016.tif", np.ones(VOLUME[1:], np.uint16))
    with pytest.raises(
        InputError, match=r"mask of page 16, but .*t002\.tif has 16 pag"
    ):
        ctc.open(root=tmp_path, split="01")
    os.remove(place / "man_seg_002_016.tif")
    save(place / "man_seg_002_005.tif", np.ones((24, 27), np.uint16))
    with pytest.raises(InputError, match=r"the size 24 x 28, but its mask .* 24 x 27"):
        ctc.open(root=tmp_path, split="01")


def test_options_out_of_range(tmp_path):
    write(tmp_path)
    for options, message in (
        ({"label_names": ("cell",)}, r"label_names = \('cell',\) must be two"),
        ({"unknown": -1.0}, r"unknown = -1\.0 0 or more"),
        (
            {"spacing": (1, 1, 1)},
            r"spacing is \(1\.0, 1\.0, 1\.0\), but the frames have 2",
        ),
        ({"spacing": (1, 0)}, "give 2 numbers above 0"),
    ):
        with pytest.raises(InputError, match=message):
            ctc.open(root=tmp_path, split="01", **options)


def test_damaged(tmp_path):
    write(tmp_path)
    path = tmp_path / "01_GT" / "SEG" / "man_seg003.tif"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"man_seg003\.tif cannot be read"):
        ctc.open(root=tmp_path, split="01")
    colours = np.zeros((64, 80, 3), np.uint8)
    colours[0, 0, 1] = 7
    tifffile.imwrite(path, colours, photometric="rgb")
    source = ctc.open(root=tmp_path, split="01")
    with pytest.raises(InputError, match=r"man_seg003\.tif is coloured: save one"):
        source[1]
