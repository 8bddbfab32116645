"""The recipe of the PyTorch tutorials as one file, on a folder of your own.

    python train.py --config=configs/unet_classic.py --workdir=runs/classic \\
        --config.data.root=DIR

DIR holds ``images/`` and ``masks/``, paired by name; the last fifth is held out. The
full-width net wants a GPU; on a CPU add
``--config.model.features="(16,32,64,128,256)"``.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Adam 1e-4, half CE and half Dice, plateau, Kaiming fan-out, early stopping."""
    config = default.get_config()
    config.data.source = "folder"
    config.data.train = "train[:80%]"
    config.data.evaluation = "train[80%:]"

    config.model.features = (64, 128, 256, 512, 1024)
    config.model.norm = "batch"
    config.model.up = "transpose"
    config.model.kernel_init = "he_normal_fan_out"

    config.loss.cross_entropy = 0.5
    config.loss.dice = 0.5

    config.optim.name = "adam"
    config.optim.learning_rate = 1e-4
    config.optim.schedule = "plateau"
    config.optim.warmup_steps = 0
    config.optim.weight_decay = 0.0
    config.optim.clip = 0.0
    config.plateau.monitor = "loss"
    config.plateau.factor = 0.5
    config.plateau.patience = 10

    config.train.steps = 20_000
    config.train.batch_size = 4
    config.train.crop = (256, 256)
    config.train.eval_every = 200
    config.train.save_every = 200
    config.train.monitor = "loss"
    config.train.patience = 30
    return config
