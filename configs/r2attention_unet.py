"""R2U-Net with attention gates on the built-in cells.

    python train.py --config=configs/r2attention_unet.py --workdir=runs/r2attention_unet

The widths are an eighth of the named net's, for two CPU cores; ``config.model.features
= None`` gives it as published.

Measured on two CPU cores: TODO
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """`r2unet` with gates at full size."""
    config = default.get_config()
    config.model.name = "r2attention_unet"
    config.model.features = (8, 16, 32, 64)
    config.train.steps = 100
    config.train.eval_every = 50
    return config
