"""ISBI 2012: membranes of neurons in electron microscopy, slices 0-19 against 20-29.

    python train.py --config=configs/isbi2012.py --workdir=runs/isbi2012 \\
        --config.data.root=DIR
    unet-jax evaluate --workdir=runs/isbi2012 --metrics=isbi2012 --tta=rotations

DIR holds the challenge's ``train-volume.tif`` and ``train-labels.tif``. The border
weights and deformations of the U-Net paper on a net of today: same padding, batch norm,
AdamW, cross entropy and Dice.

Measured on two CPU cores in 33 minutes of CPU time (17 minutes, were nothing else
running): V_Rand 0.963, V_Info 0.978 on the ten held-out slices, 0.976 and 0.981 over 7
rotations; pooled Dice 0.938 for cell and 0.796 for membrane. docs/results.md has more.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """A narrow U-Net that two CPU cores train in twenty minutes."""
    config = default.get_config()
    config.data.source = "volumes"
    config.data.volumes.images = "train-volume.tif"
    config.data.volumes.masks = "train-labels.tif"
    config.data.volumes.slices = True
    config.data.volumes.label_names = ("membrane", "cell")
    config.data.train = "all[:20]"
    config.data.evaluation = "all[20:30]"
    config.data.border.w0 = 10.0

    config.augment.elastic = 10.0
    config.augment.rotate = 180.0
    config.augment.scale = 0.15
    config.augment.brightness = 0.1
    config.augment.contrast = 0.2
    config.augment.gamma = 0.2
    config.augment.noise = 0.03

    config.model.features = (16, 32, 64, 128, 256)

    config.train.steps = 1200
    config.train.ema = 0.995
    config.train.batch_size = 4
    config.train.crop = (256, 256)
    config.train.log_every = 50
    config.train.eval_every = 300
    config.train.save_every = 300
    config.train.eval_batch_size = 2
    config.optim.warmup_steps = 50
    return config
