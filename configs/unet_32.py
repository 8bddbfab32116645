"""The U-Net that arXiv 1807.10165 compares UNet++ with, on the built-in cells.

    python train.py --config=configs/unet_32.py --workdir=runs/unet_32

The widths are half of the named net's, for two CPU cores; ``config.model.features =
None`` gives them as published.

Measured: Dice of the cells 0.844 on the 32 validation images after 100 steps.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """No norm, as there."""
    config = default.get_config()
    config.model.name = "unet_32"
    config.model.features = (16, 32, 64, 128, 256)
    config.optim.learning_rate = 1e-3
    config.train.steps = 100
    config.train.eval_every = 50
    return config
