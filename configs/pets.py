"""Oxford-IIIT pets from TensorFlow Datasets, read without TensorFlow.

    python train.py --config=configs/pets.py --workdir=runs/pets

The data set is downloaded and prepared on first use (about 800 MB).
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Three classes; the masks number them from 1."""
    config = default.get_config()
    config.data.source = "tfds"
    config.data.train = "train"
    config.data.evaluation = "test[:10%]"
    config.data.tfds.name = "oxford_iiit_pet"
    config.data.tfds.image = "image"
    config.data.tfds.mask = "segmentation_mask"
    config.data.tfds.label_names = ("pet", "background", "border")
    config.data.tfds.shift = 1
    config.data.tfds.channels = 3  # a few are grey

    config.augment.quarter_turns = False
    config.augment.rotate = 15.0
    config.augment.scale = 0.3
    config.augment.brightness = 0.1
    config.augment.contrast = 0.2

    config.model.features = (32, 64, 128, 256, 512)

    config.train.steps = 20_000
    config.train.batch_size = 16
    config.train.crop = (256, 256)
    config.train.log_every = 50
    config.train.eval_every = 1000
    config.train.save_every = 1000
    return config
