"""unet_jax.data.volumes and stacks: TIFF stacks, NIfTI and npy."""

import logging
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile

from unet_jax.data import volumes
from unet_jax.data.source import NoInstances
from unet_jax.types import InputError

AFFINE = np.asarray(
    [[-1.5, 0, 0.1, 20], [0, 2, 0, -30], [0.1, 0, 3, 5], [0, 0, 0, 1]], np.float64
)


def stack(root: Path, rng: np.random.Generator, pages: int = 5) -> tuple:
    """train-volume.tif and train-labels.tif, as the ISBI 2012 challenge has them."""
    volume = rng.integers(0, 256, (pages, 6, 8), np.uint8)
    labels = (rng.integers(0, 2, (pages, 6, 8)) * 255).astype(np.uint8)
    tifffile.imwrite(root / "train-volume.tif", volume, photometric="minisblack")
    tifffile.imwrite(root / "train-labels.tif", labels, photometric="minisblack")
    return volume, labels


def nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def cases(root: Path, rng: np.random.Generator, count: int = 3) -> None:
    """imagesTr and labelsTr, as the Medical Segmentation Decathlon has them."""
    for k in range(count):
        shape = (4 + k, 6, 5)
        nifti(root / "imagesTr" / f"v{k}.nii.gz", rng.random(shape, np.float32))
        # floats hold the ids, as in some files of the Decathlon
        nifti(
            root / "labelsTr" / f"v{k}.nii.gz", rng.integers(0, 3, shape).astype("f4")
        )


MSD = {"images": "imagesTr", "masks": "labelsTr", "slices": False}


def test_stack_as_slices(tmp_path, rng):
    volume, labels = stack(tmp_path, rng)
    train = volumes.open(root=tmp_path, split="train[:3]", label_names=("wall", "cell"))
    rest = volumes.open(root=tmp_path, split="train[3:]")
    assert (len(train), len(rest)) == (3, 2)
    assert train.label_names == ("wall", "cell")
    assert rest.name(0) == "train-volume.tif[3]" and rest.size(0) == (6, 8)
    for i in range(5):
        example = train[i] if i < 3 else rest[i - 3]
        np.testing.assert_array_equal(example["image"][..., 0], volume[i])
        np.testing.assert_array_equal(example["label"], labels[i] // 255)


def test_stack_as_volume(tmp_path, rng):
    volume, labels = stack(tmp_path, rng)
    source = volumes.open(root=tmp_path, split="train", slices=False, channels=3)
    assert len(source) == 1 and source.size(0) == (5, 6, 8)
    np.testing.assert_array_equal(source[0]["image"], volume[..., None].repeat(3, -1))
    np.testing.assert_array_equal(source[0]["label"], labels // 255)


def test_instances(tmp_path, rng):
    objects = rng.integers(0, 9, (5, 6, 8)).astype(np.uint8)
    stack(tmp_path, rng)
    tifffile.imwrite(tmp_path / "train-labels.tif", objects, photometric="minisblack")
    options = {"root": tmp_path, "split": "all[not fold 2/5]", "mask": "instances"}
    pages = volumes.open(**options, ignore=3)
    assert [pages.name(i)[-3:] for i in range(len(pages))] == [
        "[0]",
        "[2]",
        "[3]",
        "[4]",
    ]
    page = np.where(objects[2] == 3, 0, objects[2])
    np.testing.assert_array_equal(pages.instances(1), page)
    whole = volumes.open(**{**options, "split": "all"}, slices=False)
    np.testing.assert_array_equal(whole.instances(0), objects)
    with pytest.raises(NoInstances, match="read as classes"):
        volumes.open(**{**options, "mask": "index"}).instances(0)
    nifti(tmp_path / "images" / "a.nii", rng.random((3, 4, 5), np.float32))
    nifti(tmp_path / "masks" / "a.nii", objects[:3, :4, :5])
    zooms = np.linalg.norm(AFFINE[:3, :3], axis=0)
    fine = volumes.open(
        root=tmp_path,
        split="all",
        images="images",
        masks="masks",
        mask="instances",
        slices=False,
        spacing=zooms / 2,
    )
    expected = objects[:3, :4, :5].repeat(2, 0).repeat(2, 1).repeat(2, 2)
    np.testing.assert_array_equal(fine.instances(0), expected)


def test_nifti_pairs(tmp_path, rng):
    cases(tmp_path, rng)
    source = volumes.open(root=tmp_path, split="train[1:]", **MSD)
    assert [source.name(i) for i in (0, 1)] == [f"imagesTr/v{k}.nii.gz" for k in (1, 2)]
    assert source.label_names == ("background", "class_1", "class_2")
    example = source[1]
    assert source.size(1) == (6, 6, 5) == example["label"].shape
    assert example["image"].shape == (6, 6, 5, 1)
    assert example["image"].dtype == np.float32 and example["label"].dtype == np.uint8
    slices = volumes.open(root=tmp_path, split="train", **{**MSD, "slices": True})
    assert len(slices) == 4 + 5 + 6
    np.testing.assert_array_equal(slices[9 + 2]["image"], example["image"][2])
    np.testing.assert_array_equal(slices[9 + 2]["label"], example["label"][2])


@pytest.mark.parametrize("slices", [False, True])
def test_splits_below_or_in_the_names(tmp_path, rng, slices):
    cases(tmp_path, rng, 3)
    for folder in ("images", "labels"):
        (tmp_path / f"{folder}Ts").mkdir()
        here, there = (tmp_path / f"{folder}{s}" / "v2.nii.gz" for s in ("Tr", "Ts"))
        here.rename(there)
    options = {"images": "images{split}", "masks": "labels{split}", "slices": slices}
    train, val = (
        volumes.open(root=tmp_path, split=split, **options) for split in ("Tr", "Ts")
    )
    assert (len(train), len(val)) == ((4 + 5, 6) if slices else (2, 1))
    assert val.name(0).startswith("imagesTs/v2.nii.gz")
    match = "no split 'train' where .*: name one that there is, Tr, Ts"
    with pytest.raises(InputError, match=match):
        volumes.open(root=tmp_path, split="train", **options)
    for name in ("train", "val"):
        stack(tmp_path, rng)
        for what in ("volume", "labels"):
            path = tmp_path / f"train-{what}.tif"
            path.rename(tmp_path / f"of-{name}-{what}.tif")
    options |= {"images": "of-{split}-volume.tif", "masks": "of-{split}-labels.tif"}
    source = volumes.open(root=tmp_path, split="val", **options)
    assert source.name(0).startswith("of-val-volume.tif")


def test_nifti_whole_numbers_become_f32(tmp_path, rng):
    array = rng.integers(0, 99, (4, 5, 6), np.uint8)
    nifti(tmp_path / "a.nii", array)
    image, geometry = volumes.read_volume(tmp_path / "a.nii")
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image[..., 0], array)
    np.testing.assert_allclose(geometry.affine, AFFINE, atol=1e-6)
    np.testing.assert_allclose(
        geometry.spacing, np.linalg.norm(AFFINE[:3, :3], axis=0), rtol=1e-6
    )
    nifti(tmp_path / "b.nii", np.stack([array, array + 1], -1))
    assert volumes.read_volume(tmp_path / "b.nii")[0].shape == (4, 5, 6, 2)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff_layouts(tmp_path, rng, compression):
    path = tmp_path / "a.tif"
    array = rng.integers(0, 9999, (4, 6, 8, 3)).astype(np.uint16)
    tifffile.imwrite(path, array, photometric="rgb", compression=compression)
    np.testing.assert_array_equal(volumes.read_volume(path)[0], array)
    np.testing.assert_array_equal(volumes.read_volume(path, page=2)[0], array[2])
    if compression is None:
        tifffile.imwrite(
            path, array.transpose(0, 3, 1, 2), imagej=True, metadata={"axes": "ZCYX"}
        )
        np.testing.assert_array_equal(volumes.read_volume(path)[0], array)
        np.testing.assert_array_equal(volumes.read_volume(path, page=2)[0], array[2])
    assert volumes.volume_size(path) == ((4, 6, 8), None)
    # Some programs call the pages channels.
    tifffile.imwrite(path, array[..., 0], imagej=True, metadata={"axes": "CYX"})
    np.testing.assert_array_equal(volumes.read_volume(path)[0], array[..., :1])
    np.testing.assert_array_equal(
        volumes.read_volume(path, page=2)[0], array[2, ..., :1]
    )
    tifffile.imwrite(path, array[0, ..., 0])
    assert volumes.read_volume(path)[0].shape == (1, 6, 8, 1)


def test_lzw_stack_without_extra_packages(tmp_path, rng):
    from PIL import Image

    array = rng.integers(0, 256, (3, 16, 16), np.uint8)
    first, *rest = [Image.fromarray(page) for page in array]
    path = tmp_path / "a.tif"
    first.save(path, save_all=True, append_images=rest, compression="tiff_lzw")
    np.testing.assert_array_equal(volumes.read_volume(path)[0][..., 0], array)
    np.testing.assert_array_equal(
        volumes.read_volume(path, page=1)[0][..., 0], array[1]
    )


def test_npy(tmp_path, rng):
    array = rng.random((3, 4, 5, 2), np.float32)
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(volumes.read_volume(tmp_path / "a.npy")[0], array)
    page, _ = volumes.read_volume(tmp_path / "a.npy", page=1)
    np.testing.assert_array_equal(page, array[1])


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.tif", "a.npy"])
@pytest.mark.parametrize("high", [2, 300])
def test_write_and_read(tmp_path, rng, name, high):
    label = rng.integers(0, high + 1, (3, 4, 5))
    volumes.write_volume(tmp_path / name, label)
    got = volumes.read_mask(tmp_path / name)
    assert got.dtype == (np.uint8 if high < 256 else np.uint16)
    np.testing.assert_array_equal(got, label)


def test_nifti_label_lies_on_its_image(tmp_path, rng):
    image = nibabel.Nifti1Image(rng.random((4, 5, 6), np.float32), AFFINE)
    image.set_qform(AFFINE, code=1)
    image.set_sform(AFFINE, code=2)
    image.header["cal_max"], image.header["descrip"] = 500, b"a scan"
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, tmp_path / "image.nii.gz")
    _, geometry = volumes.read_volume(tmp_path / "image.nii.gz")
    label = rng.integers(0, 3, (4, 5, 6))
    volumes.write_volume(tmp_path / "label.nii.gz", label, geometry)
    first = nibabel.load(tmp_path / "image.nii.gz")
    second = nibabel.load(tmp_path / "label.nii.gz")
    np.testing.assert_array_equal(second.affine, first.affine)
    assert nibabel.aff2axcodes(second.affine) == nibabel.aff2axcodes(first.affine)
    for field in ("qform_code", "sform_code", "pixdim", "xyzt_units", "descrip"):
        np.testing.assert_array_equal(second.header[field], first.header[field])
    assert second.get_data_dtype() == np.uint8 and second.header["cal_max"] == 0
    np.testing.assert_array_equal(np.asanyarray(second.dataobj), label)


# ---- resampling


def test_resample_linear_closed_form():
    ramp = np.arange(4, dtype=np.float32)[:, None, None]
    got = volumes.resample(ramp, (1, 1, 1), (0.5, 1, 1), order=1)[:, 0, 0]
    np.testing.assert_allclose(got, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    half = volumes.resample(ramp, (1, 1, 1), (2, 1, 1), order=1)[:, 0, 0]
    np.testing.assert_allclose(half, [0.5, 2.5])
    whole = volumes.resample_to(np.asarray([0, 10], np.uint8), (4,), order=1)
    assert whole.dtype == np.uint8
    np.testing.assert_array_equal(whole, [0, 2, 8, 10])


def test_resample_nearest_and_back(rng):
    label = rng.integers(0, 5, (4, 5, 6)).astype(np.uint8)
    fine = volumes.resample(label, (2, 2, 2), (1, 0.5, 2), order=0)
    assert fine.shape == (8, 20, 6) and fine.dtype == np.uint8
    np.testing.assert_array_equal(fine, label.repeat(2, 0).repeat(4, 1))
    np.testing.assert_array_equal(volumes.resample_to(fine, label.shape), label)
    assert volumes.resample(label, (1, 1, 1), (9, 9, 9), order=0).shape == (1, 1, 1)


def test_spacing(tmp_path, rng):
    cases(tmp_path, rng)
    zooms = np.linalg.norm(AFFINE[:3, :3], axis=0)
    plain = volumes.open(root=tmp_path, split="all", **MSD)
    source = volumes.open(
        root=tmp_path, split="all", spacing=zooms / 2, **MSD, ignore=2
    )
    example = source[0]
    assert source.size(0) == (8, 12, 10) == example["label"].shape
    assert example["image"].shape == (8, 12, 10, 1)
    void = plain[0]["label"] == 2
    np.testing.assert_array_equal(
        volumes.resample_to(example["weight"], (4, 6, 5)), ~void
    )
    with pytest.raises(InputError, match=r"spacing=\(1\.0, 1\.0\) needs slices=False"):
        volumes.open(root=tmp_path, split="all", spacing=(1, 1), **MSD)
    stack(tmp_path, rng)
    with pytest.raises(InputError, match=r"volume\.tif does not say its voxel size"):
        volumes.open(root=tmp_path, split="all", slices=False, spacing=(1, 1, 1))


# ---- bad input


def test_sizes_that_differ(tmp_path, rng):
    _, labels = stack(tmp_path, rng)
    tifffile.imwrite(
        tmp_path / "train-labels.tif", labels[:-1], photometric="minisblack"
    )
    for slices in (True, False):
        with pytest.raises(
            InputError,
            match=r"volume\.tif has the size 5 x 6 x 8, but its mask .*4 x 6",
        ):
            volumes.open(root=tmp_path, split="train", slices=slices)


def test_missing(tmp_path, rng):
    with pytest.raises(InputError, match=r"train-labels\.tif does not exist: put"):
        volumes.open(root=tmp_path, split="train")
    cases(tmp_path, rng)
    os.remove(tmp_path / "labelsTr" / "v1.nii.gz")
    with pytest.raises(InputError, match=r"v1\.nii\.gz has no mask"):
        volumes.open(root=tmp_path, split="train", **MSD)


@pytest.mark.parametrize(
    ("suffix", "imagej"),
    [
        (".nii.gz", False),
        (".nii", False),
        (".tif", False),
        (".tif", True),
        (".npy", False),
    ],
)
def test_damaged(tmp_path, rng, suffix, imagej):
    path = tmp_path / f"bad{suffix}"
    array = rng.random((8, 16, 16)).astype(np.float32)
    if suffix == ".npy":
        np.save(path, array)
    elif suffix == ".tif":
        tifffile.imwrite(path, array, imagej=imagej)
    else:
        nifti(path, array)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        for read in (volumes.read_volume, volumes.read_mask):
            with pytest.raises(
                InputError, match=rf"bad{suffix} cannot be read \(.*\):"
            ):
                read(path)


def test_values(tmp_path, rng):
    cases(tmp_path, rng)
    nifti(tmp_path / "labelsTr" / "v1.nii.gz", np.full((5, 6, 5), 7, np.uint8))
    source = volumes.open(
        root=tmp_path, split="all", mask="index", label_names=("a", "b", "c"), **MSD
    )
    with pytest.raises(InputError, match=r"v1\.nii\.gz has the value 7, but the 3 cla"):
        source[1]
    nifti(tmp_path / "labelsTr" / "v1.nii.gz", np.full((5, 6, 5), 0.5, np.float32))
    with pytest.raises(InputError, match=r"v1\.nii\.gz has the value 0\.5: save class"):
        source[1]
    nifti(tmp_path / "imagesTr" / "v0.nii.gz", np.full((4, 6, 5), np.nan, np.float32))
    with pytest.raises(
        InputError, match=r"v0\.nii\.gz has NaN or infinite pixels \(120"
    ):
        source[0]


def test_mask_elsewhere_is_a_warning_line(tmp_path, rng, caplog):
    cases(tmp_path, rng, 1)
    nifti(tmp_path / "labelsTr" / "v0.nii.gz", np.ones((4, 6, 5), np.uint8), np.eye(4))
    with caplog.at_level(logging.WARNING, "unet_jax"):
        volumes.open(root=tmp_path, split="all", **MSD)
    assert "v0.nii.gz" in caplog.text and "different places" in caplog.text


@pytest.mark.parametrize("slices", [False, True])
def test_files_at_fault_are_left_out(tmp_path, rng, caplog, slices):
    cases(tmp_path, rng, 5)
    (tmp_path / "labelsTr" / "v0.nii.gz").unlink()
    (tmp_path / "imagesTr" / "v1.nii.gz").write_bytes(b"no volume")
    nifti(tmp_path / "labelsTr" / "v2.nii.gz", np.zeros((4, 4, 4), np.uint8))
    fractions = np.full((7, 6, 5), 0.5, np.float32)
    nifti(tmp_path / "labelsTr" / "v3.nii.gz", fractions)
    options = {"root": tmp_path, "split": "all", **MSD, "slices": slices}
    with pytest.raises(InputError, match=r"v0\.nii\.gz has no mask"):
        volumes.open(**options)
    with caplog.at_level(logging.WARNING, "unet_jax"):
        source = volumes.open(**options, on_error="skip")
    assert len(source) == (8 if slices else 1) and source.name(0)[:11] == "imagesTr/v4"
    assert f"4 faulty volumes of {tmp_path} are left out. The first" in caplog.text
    assert source[0]["label"].max() == 2
    (tmp_path / "imagesTr" / "v4.nii.gz").write_bytes(b"no volume")
    with pytest.raises(InputError, match=r"All volumes of .* are faulty"):
        volumes.open(**options, on_error="skip")


def test_links_that_lead_out(tmp_path, rng):
    cases(tmp_path / "other", rng, 1)
    root = tmp_path / "root"
    root.mkdir()
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).symlink_to(tmp_path / "other" / folder)
    with pytest.raises(InputError, match=r"v0\.nii\.gz leads to .*links=True"):
        volumes.open(root=root, split="all", **MSD)
    assert len(volumes.open(root=root, split="all", links=True, **MSD)) == 1


# ---- the real stack and the real volumes


def data(name: str) -> Path:
    here = Path(__file__).resolve().parents[1]
    place = (
        Path(os.environ.get("UNET_JAX_DATA", here.parent / "shared" / "data")) / name
    )
    if not place.is_dir():
        pytest.skip(f"{place} is not there (set UNET_JAX_DATA)")
    return place


def test_isbi2012():
    root = data("isbi2012")
    train = volumes.open(root=root, split="train[:20]")
    rest = volumes.open(root=root, split="train[20:]")
    assert (len(train), len(rest)) == (20, 10) and train.size(0) == (512, 512)
    example = rest[9]
    assert (
        example["image"].shape == (512, 512, 1) and example["image"].dtype == np.uint8
    )
    assert 0.7 < example["label"].mean() < 0.85


def test_msd_hippocampus():
    source = volumes.open(root=data("msd_hippocampus"), split="train[:80%]", **MSD)
    assert len(source) == 104 and source.label_names[1:] == ("class_1", "class_2")
    example = source[0]
    assert example["image"].shape == (*source.size(0), 1)
    assert set(np.unique(example["label"])) == {0, 1, 2}
