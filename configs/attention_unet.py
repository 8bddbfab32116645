"""Attention U-Net (arXiv 1804.03999) on the built-in cells: gates on the coarse grid.

    python train.py --config=configs/attention_unet.py --workdir=runs/attention_unet

The widths are a quarter of the named net's, for two CPU cores; ``config.model.features
= None`` gives them as published.

Measured: Dice of the cells 0.953 on the 32 validation images after 100 steps.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """``unet-jax features`` draws the gates."""
    config = default.get_config()
    config.model.name = "attention_unet"
    config.model.features = (16, 32, 64, 128)
    config.train.steps = 100
    config.train.eval_every = 50
    return config
