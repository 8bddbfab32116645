"""unet_jax.data.tfds: prepared by a builder, read without TensorFlow."""

import io
import os
import sys
from typing import ClassVar

import numpy as np
import pytest
import tifffile
from PIL import Image

pytest.importorskip("tensorflow_datasets")
import tensorflow_datasets

from unet_jax.data import tfds, volumes
from unet_jax.data.source import NoInstances
from unet_jax.types import InputError

COUNT = 5


def picture(k: int) -> np.ndarray:
    return np.random.default_rng(k).integers(0, 256, (6, 8 + k, 3), np.uint8)


def trimap(k: int) -> np.ndarray:
    return np.random.default_rng(k).integers(1, 4, (6, 8 + k)).astype(np.uint8)


class TinyShapes(tensorflow_datasets.core.GeneratorBasedBuilder):
    """Pictures with masks 1, 2, 3, one of them a palette image, and a 3-D tensor."""

    VERSION = tensorflow_datasets.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "All there is."}

    def _info(self):
        features = tensorflow_datasets.features
        picture = features.Image(shape=(None, None, 3), encoding_format="png")
        mask = features.Image(shape=(None, None, 1), encoding_format="png")
        return tensorflow_datasets.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(
                {
                    "image": picture,
                    "segmentation_mask": mask,
                    "volume": features.Tensor(shape=(2, 3, 4, 1), dtype=np.float32),
                    "ids": features.Tensor(shape=(2, 3, 4), dtype=np.int32),
                    "wrong": features.Tensor(shape=(4, 4), dtype=np.int32),
                    "name": features.Text(),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for k in range(COUNT):
            mask = Image.fromarray(trimap(k))
            if k == 1:
                mask.putpalette(bytes(range(12)))
            file = io.BytesIO()
            mask.save(file, "PNG")
            yield (
                k,
                {
                    "image": Image.fromarray(picture(k)),
                    "segmentation_mask": file.getvalue(),
                    "volume": np.full((2, 3, 4, 1), k, np.float32),
                    "ids": np.full((2, 3, 4), k % 2, np.int32),
                    "wrong": np.zeros((4, 4), np.int32),
                    "name": f"example {k}",
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    builder = TinyShapes(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return str(folder)


PETS = {"name": "tiny_shapes", "label_names": ("pet", "background", "outline")}


def test_read(prepared):
    source = tfds.open(split="train[1:]", data_dir=prepared, shift=1, **PETS)
    assert len(source) == COUNT - 1
    assert source.name(0) == "tiny_shapes/1.0.0/train[1]"
    assert source.label_names == ("pet", "background", "outline")
    for i in range(len(source)):
        example = source[i]
        assert source.size(i) == (6, 9 + i)
        np.testing.assert_array_equal(example["image"], picture(i + 1))
        np.testing.assert_array_equal(example["label"], trimap(i + 1) - 1)
        assert "weight" not in example
    assert "tensorflow" not in sys.modules


def test_options(prepared):
    source = tfds.open(
        split="train", data_dir=prepared, shift=1, ignore=3, channels=1, **PETS
    )
    example = source[2]
    assert example["image"].shape == (6, 10, 1)
    np.testing.assert_array_equal(example["weight"], trimap(2) != 3)
    foreground = tfds.open(
        name="tiny_shapes", split="train", data_dir=prepared, values="instances"
    )
    assert foreground.label_names == ("background", "foreground")
    assert foreground[0]["label"].all()
    np.testing.assert_array_equal(foreground.instances(1), trimap(1))
    assert foreground.instances(1).dtype == np.int32
    with pytest.raises(NoInstances, match=r"train\[2\].* read as classes \(index\)"):
        source.instances(2)
    rest = tfds.open(split="train[not fold 1/2]", data_dir=prepared, shift=1, **PETS)
    assert [rest.name(i)[-3:] for i in range(len(rest))] == ["[3]", "[4]"]


def test_tensors_of_3_axes(prepared):
    source = tfds.open(
        name="tiny_shapes",
        split="train",
        data_dir=prepared,
        image="volume",
        mask="ids",
        label_names=("a", "b"),
    )
    assert source.size(3) == (2, 3, 4)
    example = source[3]
    np.testing.assert_array_equal(example["image"], np.full((2, 3, 4, 1), 3, "f4"))
    np.testing.assert_array_equal(example["label"], np.ones((2, 3, 4)))


def test_what_is_refused(prepared):
    for options, match in [
        ({"split": "val"}, "'tiny_shapes' has no split 'val': choose one of train"),
        (
            {"image": "photo"},
            r"no feature 'photo': choose the options .* image, segmentation_mask, vol",
        ),
        ({"label_names": ()}, "does not name the classes of 'segmentation_mask': list"),
        ({"split": "train[9:]"}, r"'train\[9:\]'"),
        ({"name": "no_such_set"}, "TFDS knows no data set 'no_such_set'"),
        ({"name": "tiny_shapes:9.9.9"}, "TFDS .*tiny_shapes:9.9.9"),
    ]:
        with pytest.raises(InputError, match=match):
            tfds.open(**{"split": "train", "data_dir": prepared, **PETS, **options})
    source = tfds.open(split="train", data_dir=prepared, **PETS)
    with pytest.raises(
        InputError, match=r"tiny_shapes/1\.0\.0/train\[0\]\S* has the va"
    ):
        source[0]
    source = tfds.open(split="train", data_dir=prepared, mask="wrong", **PETS)
    with pytest.raises(
        InputError, match=r"train\[0\] has an image of the size \(6, 8\)"
    ):
        source[0]


def test_isbi2012(tmp_path, rng):
    manual = tmp_path / "manual"
    options = {"name": "isbi2012", "data_dir": str(tmp_path / "out")}
    with pytest.raises(
        InputError, match=r"none in the folder .*manual: give .*\(Put train-vol"
    ):
        tfds.open(split="train", manual_dir=str(manual), **options)
    manual.mkdir()
    volume = rng.integers(0, 256, (12, 6, 8), np.uint8)
    labels = (rng.integers(0, 2, (12, 6, 8)) * 255).astype(np.uint8)
    tifffile.imwrite(manual / "train-volume.tif", volume)
    tifffile.imwrite(manual / "train-labels.tif", labels[:7])
    with pytest.raises(InputError, match=r"volume\.tif has the size \(12, 6, 8\), but"):
        tfds.open(split="train", manual_dir=str(manual), **options)
    tifffile.imwrite(manual / "train-labels.tif", labels)
    source = tfds.open(split="train[10:]", manual_dir=str(manual), **options)
    assert source.label_names == ("membrane", "cell") and len(source) == 2
    stack = volumes.open(root=manual, split="train[10:]")
    for i in (0, 1):  # the order of the stack, not one that TFDS mixed
        np.testing.assert_array_equal(source[i]["image"], stack[i]["image"])
        np.testing.assert_array_equal(source[i]["label"], stack[i]["label"])
    # Prepared once, the manual folder is not needed again.
    assert len(tfds.open(split="train", **options)) == 12


def test_no_network(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route to host")

    manager = tensorflow_datasets.download.DownloadManager
    monkeypatch.setattr(manager, "download_and_extract", refuse)
    with pytest.raises(
        InputError, match=r"'oxford_iiit_pet' is not prepared .*\(no connection"
    ):
        tfds.open(
            name="oxford_iiit_pet",
            split="train",
            data_dir=str(tmp_path),
            label_names=PETS["label_names"],
        )


@pytest.mark.skipif(
    tfds.importlib.util.find_spec("tensorflow") is not None,
    reason="with TensorFlow installed the builder uses it",
)
def test_pets_are_prepared_without_tensorflow(tmp_path, monkeypatch):
    """One of the names below is among those that the builder encodes anew."""
    names = ("beagle_1", "beagle_116")
    images, notes = tmp_path / "images", tmp_path / "annotations"
    (notes / "trimaps").mkdir(parents=True)
    (notes / "xmls").mkdir()
    images.mkdir()
    for k, name in enumerate(names):
        file = io.BytesIO()
        Image.fromarray(picture(k)).save(file, "PNG" if k else "JPEG")
        (images / f"{name}.jpg").write_bytes(file.getvalue())
        Image.fromarray(trimap(k)).save(notes / "trimaps" / f"{name}.png")
    for split in ("trainval", "test"):
        lines = [f"{name} 5 2 1\n" for name in names]
        (notes / f"{split}.txt").write_text("".join(lines))
    monkeypatch.setattr(
        tensorflow_datasets.download.DownloadManager,
        "download_and_extract",
        lambda self, urls: {"images": tmp_path, "annotations": tmp_path},
    )
    out = str(tmp_path / "out")
    pets = {**PETS, "name": "oxford_iiit_pet", "data_dir": out, "shift": 1}
    source = tfds.open(split="train", **pets)
    assert sorted(source.size(i) for i in (0, 1)) == [(6, 8), (6, 9)]
    for i in (0, 1):
        k = source.size(i)[1] - 8
        np.testing.assert_array_equal(source[i]["label"], trimap(k) - 1)
    assert "tensorflow" not in sys.modules and os.path.isdir(out)
