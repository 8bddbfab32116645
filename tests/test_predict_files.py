"""Files in, files out: names, sizes, values, geometry."""

import jax
import numpy as np
import pytest
import tifffile
from PIL import Image
from test_predict import make, picture

from unet_jax.data import stacks
from unet_jax.postprocess import instances, largest_component
from unet_jax.predict import Predictor
from unet_jax.predict_files import (
    _picture_of_objects,
    _write_objects,
    find_inputs,
    predict_files,
)
from unet_jax.types import InputError


@pytest.fixture(scope="module")
def predictor():
    return Predictor.from_model(*make())


@pytest.fixture(scope="module")
def volumes():
    return Predictor.from_model(*make(rank=3, dtype="float32", scale=(1.0,)))


def nifti(path, array, zooms=(1.0, 2.0, 0.5)):
    nibabel = pytest.importorskip("nibabel")
    affine = np.diag([-zooms[0], zooms[1], zooms[2], 1.0])
    affine[:3, 3] = [5, -7, 11]
    image = nibabel.Nifti1Image(array, affine)
    image.header["descrip"] = b"made by a test"
    nibabel.save(image, path)
    return image


def test_images_of_every_kind(tmp_path, predictor):
    """Grey, RGBA, 16-bit, palette and npy: a label of the own size for each."""
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    Image.fromarray(picture(9, 13)).save(inputs / "grey.png")
    Image.fromarray(picture(9, 13, 4)).save(inputs / "rgba.png")
    Image.fromarray(picture(9, 13)).convert("P").save(inputs / "palette.gif")
    Image.fromarray(picture(8, 8, 3)).save(inputs / "photo.jpg")
    tifffile.imwrite(inputs / "deep.tif", picture(1, 13, dtype=np.uint16) * 257)
    np.save(inputs / "array.npy", picture(7, 5))
    (inputs / "notes.txt").write_text("no image")
    (inputs / ".hidden.png").write_text("no image")
    seen = []
    jobs = predict_files(predictor, [inputs], out, done=seen.append)
    assert jobs == seen
    assert [job.path.name for job in jobs] == [
        "array.npy", "deep.tif", "grey.png", "palette.gif", "photo.jpg", "rgba.png",
    ]  # fmt: skip
    sizes = {"array": (7, 5), "deep": (1, 13), "photo": (8, 8)}
    for job in jobs:
        label = np.asarray(Image.open(out / f"{job.path.stem}.png"))
        assert label.dtype == np.uint8
        assert label.shape == sizes.get(job.path.stem, (9, 13))
        assert set(np.unique(label)) <= {0, 255}  # two classes, so that one sees them
    assert sorted(p.name for p in out.iterdir()) == sorted(
        f"{job.path.stem}.png" for job in jobs
    )
    image = np.load(inputs / "array.npy")
    written = np.asarray(Image.open(out / "array.png"))
    np.testing.assert_array_equal(written, predictor(image).label * 255)


def test_a_stack_of_thirty_pages(tmp_path, predictor):
    stack = picture(30, 10, 12)
    tifffile.imwrite(tmp_path / "test-volume.tif", stack, photometric="minisblack")
    predict_files(
        predictor,
        [tmp_path / "test-volume.tif"],
        tmp_path / "out",
        probabilities=True,
        overlay=True,
    )
    with tifffile.TiffFile(tmp_path / "out" / "test-volume.tif") as tiff:
        assert len(tiff.pages) == 30
        label = tiff.asarray()
    assert label.shape == stack.shape
    np.testing.assert_array_equal(label[17], predictor(stack[17]).label * 255)
    probability = np.load(tmp_path / "out" / "test-volume_probability.npy")
    assert probability.shape == (30, 10, 12, 2)
    assert probability.dtype == np.float32
    picture_of = tifffile.imread(tmp_path / "out" / "test-volume_overlay.tif")
    assert picture_of.shape == (30, 10, 12, 3)


def test_a_stack_as_one_volume(tmp_path):
    predictor = Predictor.from_model(*make(rank=3))
    stack = picture(3, 6, 5)
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack")
    predict_files(predictor, [tmp_path / "a.tif"], tmp_path / "out")
    label = tifffile.imread(tmp_path / "out" / "a.tif")
    np.testing.assert_array_equal(label, predictor(stack).label * 255)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nifti_keeps_its_geometry(tmp_path, volumes, ending):
    nibabel = pytest.importorskip("nibabel")
    array = picture(7, 6, 5).astype(np.int16)
    image = nifti(tmp_path / f"scan{ending}", array)
    (job,) = predict_files(volumes, [tmp_path / f"scan{ending}"], tmp_path / "out")
    found = nibabel.load(tmp_path / "out" / f"scan{ending}")
    assert job.labels == (tmp_path / "out" / f"scan{ending}",)
    np.testing.assert_array_equal(found.affine, image.affine)
    assert found.header.get_zooms() == image.header.get_zooms()
    assert nibabel.aff2axcodes(found.affine) == nibabel.aff2axcodes(image.affine)
    assert found.header["descrip"] == image.header["descrip"]
    label = np.asarray(found.dataobj)
    assert label.dtype == np.uint8
    expected = volumes(array.astype(np.float32)).label
    np.testing.assert_array_equal(label, expected)  # class ids as they are


def test_resampling_is_undone(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    spacing = (1.0, 1.0, 1.0)
    made = make(rank=3, dtype="float32", scale=(1.0,), spacing=spacing)
    predictor = Predictor.from_model(*made)
    array = picture(6, 4, 9).astype(np.float32)
    image = nifti(tmp_path / "a.nii.gz", array, zooms=(1.0, 2.0, 0.5))
    predict_files(predictor, [tmp_path / "a.nii.gz"], tmp_path / "out")
    found = nibabel.load(tmp_path / "out" / "a.nii.gz")
    assert found.shape == array.shape
    np.testing.assert_array_equal(found.affine, image.affine)
    inner = stacks.resample(array[..., None], (1.0, 2.0, 0.5), spacing, order=1)
    assert inner.shape == (6, 8, 4, 1)
    expected = stacks.resample_to(predictor(inner).label, (6, 4, 9), order=0)
    np.testing.assert_array_equal(np.asarray(found.dataobj), expected)
    tifffile.imwrite(tmp_path / "b.tif", picture(3, 4, 5), photometric="minisblack")
    with pytest.raises(InputError, match=r"b\.tif does not say its voxel size"):
        predict_files(predictor, [tmp_path / "b.tif"], tmp_path / "out")


def test_labels_are_a_file_each(tmp_path):
    names = ("cell", "a wall/ridge")
    predictor = Predictor.from_model(*make(task="labels", names=names))
    Image.fromarray(picture(9, 8)).save(tmp_path / "a.png")
    predict_files(predictor, [tmp_path / "a.png"], tmp_path / "out", overlay=True)
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert written == ["a_a_wall_ridge.png", "a_cell.png", "a_overlay.png"]
    label = predictor(picture(9, 8)).label
    for k, name in enumerate(("a_cell.png", "a_a_wall_ridge.png")):
        plane = np.asarray(Image.open(tmp_path / "out" / name))
        np.testing.assert_array_equal(plane, label[..., k] * 255)


def test_several_classes_keep_their_ids(tmp_path):
    predictor = Predictor.from_model(*make(names=("background", "a", "b")))
    Image.fromarray(picture(9, 8)).save(tmp_path / "a.png")
    predict_files(predictor, [tmp_path / "a.png"], tmp_path / "out")
    label = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    np.testing.assert_array_equal(label, predictor(picture(9, 8)).label)
    assert label.max() <= 2


@pytest.fixture(scope="module")
def blobs():
    """An image whose bright parts any monotonous net finds: two discs and a speck."""
    y, x = np.mgrid[:40, :60]
    image = np.full((40, 60), 20, np.uint8)
    for column, radius in ((20, 9), (35, 9), (55, 2)):
        image[(y - 20) ** 2 + (x - column) ** 2 <= radius**2] = 220
    return image


@pytest.fixture(scope="module")
def bright():
    """A net of single pixels that says 1 where it is bright."""
    model, variables, meta = make(kernels=(1, 1))
    params = jax.tree.map(np.zeros_like, dict(variables["params"]))
    for path, kernel in (("encoder", "level0"), ("decoder", "level0")):
        for name in ("conv0", "conv1"):
            params[path][kernel][name]["kernel"][0, 0, 0, 0] = 1
    params["head"]["kernel"][0, 1], params["head"]["bias"][1] = 10, -5
    return Predictor.from_model(model, {"params": params}, meta)


def test_objects_as_numbers(tmp_path, bright, blobs):
    Image.fromarray(blobs).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "b.tif", np.stack([blobs, blobs[::-1], 0 * blobs]),
                     photometric="minisblack")  # fmt: skip
    out = tmp_path / "out"
    for method, count in (("components", 2), ("distance", 3)):
        jobs = predict_files(
            bright, [tmp_path], out, instances=method, overlay=True, probabilities=True
        )
        assert [job.labels for job in jobs] == [(out / "a.png",), (out / "b.tif",)]
        with Image.open(out / "a.png") as picture:
            assert picture.mode == "I;16"
            ids = np.asarray(picture)
        assert ids.dtype == np.uint16 and ids.max() == count
        np.testing.assert_array_equal(ids > 0, blobs > 100)
        np.testing.assert_array_equal(
            ids, instances(bright(blobs).label > 0, method=method)
        )
        stack = tifffile.imread(out / "b.tif")
        assert stack.dtype == np.uint16  # each page by itself
        assert stack.max((1, 2)).tolist() == [count, count, 0]
        np.testing.assert_array_equal(stack[0], ids)
        drawn = np.asarray(Image.open(out / "a_overlay.png"))
        assert drawn.shape == (40, 60, 3)
        # Every object has its outline in a colour of its own.
        seen = {tuple(drawn[20, column]) for column in (11, 29, 53)}
        assert len(seen) == 3 if method == "distance" else 2
        assert np.load(out / "a_probability.npy").shape == (40, 60, 2)


def test_objects_that_touch_have_an_outline_between_them():
    ids = np.repeat([[1, 1, 8, 8, 0]], 5, axis=0)  # the colours of 1 and 8 are the same
    drawn = _picture_of_objects(np.full((5, 5, 1), 9, np.uint8), ids)
    assert (drawn[2, 1] == drawn[2, 2]).all() and (drawn[2, 1] != drawn[2, 0]).any()
    assert (drawn[2, 4] == 0).all()


def test_many_objects_have_32_bits(tmp_path, caplog):
    ids = np.arange(70_000).reshape(200, 350)
    path = _write_objects(tmp_path / "a.png", ids, None)
    assert path == tmp_path / "a.tif" and "69999 objects" in caplog.text
    np.testing.assert_array_equal(tifffile.imread(path), ids)


def test_post_processing_of_files(tmp_path, bright, blobs):
    nibabel = pytest.importorskip("nibabel")
    Image.fromarray(blobs).save(tmp_path / "a.png")
    options = {"postprocess": "small=30,largest"}
    predict_files(bright, [tmp_path / "a.png"], tmp_path / "out", **options)
    label = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    expected = largest_component((blobs > 100).astype(np.uint8)) * 255
    np.testing.assert_array_equal(label, expected)
    assert 0 < (label > 0).sum() < (blobs > 100).sum()
    # A NIfTI volume holds the numbers of its objects with its own geometry.
    model, variables, meta = bright.nets[0][:3]
    image = nifti(tmp_path / "v.nii.gz", np.stack([blobs, blobs]).astype(np.float32))
    (job,) = predict_files(
        Predictor.from_model(model, variables, meta),
        [tmp_path / "v.nii.gz"],
        tmp_path / "out",
        instances="components",
    )
    found = nibabel.load(job.labels[0])
    np.testing.assert_array_equal(found.affine, image.affine)
    assert np.asarray(found.dataobj).max() == 2
    with pytest.raises(InputError, match="'graph' is not known"):
        predict_files(bright, [tmp_path / "a.png"], tmp_path / "new", instances="graph")
    assert not (tmp_path / "new").exists()


def test_inputs_are_found_once(tmp_path):
    (tmp_path / "x" / "images").mkdir(parents=True)
    for name in ("b.png", "a.png"):
        Image.fromarray(picture(4, 4)).save(tmp_path / "x" / "images" / name)
    found = find_inputs(
        [tmp_path / "x" / "images" / "a.png", tmp_path / "x" / "images",
         str(tmp_path / "*" / "images" / "*.png")]
    )  # fmt: skip
    assert [p.name for p in found] == ["a.png", "b.png"]


def test_bad_inputs_are_named(tmp_path, predictor, volumes):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "empty").mkdir()
    Image.fromarray(picture(4, 4)).save(tmp_path / "a.png")
    np.save(tmp_path / "nan.npy", np.full((4, 4), np.nan, np.float32))
    for given, words in (
        ("missing.png", "does not exist"),
        ("a.txt", "is no image"),
        ("empty", "holds no image"),
        ("*.bmp", "holds no image"),
        ("broken.png", r"broken\.png cannot be read"),
        ("nan.npy", r"nan\.npy has NaN"),
    ):
        with pytest.raises(InputError, match=words):
            predict_files(predictor, [str(tmp_path / given)], tmp_path / "out")
    with pytest.raises(InputError, match=r"a\.png is a 2-D image"):
        predict_files(volumes, [tmp_path / "a.png"], tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        predict_files(predictor, [tmp_path / "a.png"], tmp_path / "file")


def test_nothing_is_overwritten(tmp_path, predictor):
    Image.fromarray(picture(4, 4)).save(tmp_path / "a.png")
    Image.fromarray(picture(4, 4)).save(tmp_path / "a.jpg")
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(InputError, match="overwrite the input"):
        predict_files(predictor, [tmp_path / "a.png"], tmp_path)
    with pytest.raises(InputError, match="would both be written"):
        predict_files(predictor, [tmp_path], tmp_path / "out")
    assert (tmp_path / "a.png").read_bytes() == before
    assert not (tmp_path / "out").exists()
