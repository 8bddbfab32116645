"""Every config runs: one tiny step on data of its layout, made here."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets
import tifffile
from PIL import Image
from test_data_ctc import write

import train
from unet_jax import models

CONFIGS = sorted(p.stem for p in (Path(train.__file__).parent / "configs").glob("*.py"))


class TinyPets(tensorflow_datasets.core.GeneratorBasedBuilder):
    """Pictures of several sizes with masks 1, 2, 3."""

    VERSION = tensorflow_datasets.core.Version("1.0.0")

    def _info(self):
        features = tensorflow_datasets.features
        return tensorflow_datasets.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(
                {
                    "image": features.Image(shape=(None, None, 3)),
                    "segmentation_mask": features.Image(shape=(None, None, 1)),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(4), "test": self._generate_examples(9)}

    def _generate_examples(self, count):
        rng = np.random.default_rng(count)
        for k in range(count):
            mask = rng.integers(1, 4, (30, 24 + k)).astype(np.uint8)
            image = rng.integers(0, 256, (30, 24 + k, 3)).astype(np.uint8)
            yield (
                k,
                {
                    "image": Image.fromarray(image),
                    "segmentation_mask": Image.fromarray(mask),
                },
            )


def _cells(root, config):
    config.data.cells.size = tuple(16 * 2 for _ in config.train.crop)
    config.data.cells.examples = 4


def _stacks(root, config):
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        volume = 255 * rng.integers(0, 2, (30, 40, 40)).astype(np.uint8)
        tifffile.imwrite(
            root / config.data.volumes[name], volume, photometric="minisblack"
        )


def _nuclei(root, config):
    rng = np.random.default_rng(0)
    (root / "derived_labels").mkdir()
    for k in range(22):
        folder = root / "stage1_train" / f"id{k:02}" / "images"
        folder.mkdir(parents=True)
        image = rng.integers(0, 256, (32, 40, 4)).astype(np.uint8)
        Image.fromarray(image).save(folder / f"id{k:02}.png")
        label = rng.integers(0, 400, (32, 40)).astype(np.uint16)
        Image.fromarray(label).save(root / "derived_labels" / f"id{k:02}.png")


def _volumes(root, config):
    nibabel = pytest.importorskip("nibabel")
    rng = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir()
        for k in range(5):
            volume = rng.integers(0, 3, (17, 20 + k, 16)).astype(np.uint8)
            path = root / name / f"hippocampus_{k:03}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)


def _folder(root, config):
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir()
        for k in range(5):
            image = 255 * rng.integers(0, 2, (32, 32)).astype(np.uint8)
            Image.fromarray(image).save(root / name / f"{k}.png")


def _ctc(root, config):
    for sequence in ("01", "02"):
        write(root, sequence, masks=(0, 2), dropped=(1,), size=(64, 80))


def _pets(root, config):
    builder = TinyPets(data_dir=root, file_format="array_record")
    builder.download_and_prepare()
    config.data.tfds.name = "tiny_pets"
    config.data.evaluation = "test[:30%]"


FAMILY = [name for name in CONFIGS if name in models.MODELS]
MAKERS = {
    **dict.fromkeys(FAMILY, _cells),
    "ctc_seg": _ctc,
    "default": _cells,
    "hippocampus": _volumes,
    "isbi2012": _stacks,
    "nuclei": _nuclei,
    "pets": _pets,
    "unet2015_isbi2012": _stacks,
    "unet_classic": _folder,
    "unetpp_nuclei": _nuclei,
}


def test_every_config_is_tried_here():
    assert set(MAKERS) == set(CONFIGS)


def test_every_named_net_has_a_config():
    assert set(FAMILY) | {"unet"} == set(models.MODELS)  # `default` is plain "unet"
    for name in FAMILY:
        config = importlib.import_module(f"configs.{name}").get_config()
        assert config.model.name == name and config.data.source == "cells"


# One that compiles a step takes 5 to 20 s: one of each kind of data, and UNet++; the
# others are slow.
AT_ONCE = {"default", "isbi2012", "hippocampus", "unet_classic", "unetpp"}
TRIED = [
    name if name in AT_ONCE else pytest.param(name, marks=pytest.mark.slow)
    for name in CONFIGS
]


@pytest.mark.parametrize("name", TRIED)
def test_config_trains_one_step_and_evaluates(name, tmp_path):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert json.loads(json.dumps(train.chosen(config))) is not None
    root = tmp_path / "data"
    root.mkdir()
    MAKERS[name](root, config)
    if MAKERS[name] is not _cells:
        config.data.root = str(root)
    fields = train.chosen(config)["model"]
    model = models.build(num_classes=2, **fields)
    config.model.features = tuple(8 * (n > 0) for n in model.features)
    # The smallest crop: one pixel at the coarsest level, or what valid padding allows.
    axes = models.axes(model, len(config.train.crop))
    config.train.crop = tuple(max(a.nearest_sizes(a.step)[1], 16) for a in axes)
    config.train.steps = 1
    config.train.batch_size = 2
    config.train.eval_batch_size = 2
    config.optim.warmup_steps = 0
    config.mesh.data = 1
    results = train.train_and_evaluate(train.chosen(config), tmp_path / "run")
    assert np.isfinite(results["loss"])
    assert "dice" in results


@pytest.mark.parametrize("name", CONFIGS)
def test_config_adds_no_key_and_its_header_has_the_command(name):
    module = importlib.import_module(f"configs.{name}")
    default = importlib.import_module("configs.default").get_config()
    own = module.get_config()
    flat = set(dict(own.iteritems(preserve_field_references=False)))
    assert flat == set(dict(default.iteritems(preserve_field_references=False)))
    for section in ("data", "augment", "model", "loss", "optim", "plateau", "train"):
        assert set(own[section].keys()) == set(default[section].keys()), section
    assert f"python train.py --config=configs/{name}.py" in module.__doc__


def test_the_classic_recipe_is_what_it_says():
    config = importlib.import_module("configs.unet_classic").get_config()
    assert (config.optim.name, config.optim.learning_rate) == ("adam", 1e-4)
    assert (config.loss.cross_entropy, config.loss.dice) == (0.5, 0.5)
    assert config.optim.schedule == "plateau" and config.plateau.monitor == "loss"
    assert (config.plateau.factor, config.plateau.patience) == (0.5, 10)
    assert config.train.patience > 0
    fields = train.chosen(config)["model"]
    assert models.build(num_classes=2, **fields).kernel_init == "he_normal_fan_out"
