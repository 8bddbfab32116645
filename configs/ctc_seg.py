"""Folders of the Cell Tracking Challenge: cells told apart, measured by its SEG.

    python train.py --config=configs/ctc_seg.py --workdir=runs/ctc \
        --config.data.root=DIR
    unet-jax evaluate --workdir=runs/ctc --metrics=objects --tta=symmetries

DIR is a data set as the challenge gives it out, such as ``PhC-C2DH-U373``: ``01`` and
``02`` with the frames, ``01_GT/SEG`` and ``02_GT/SEG`` with the masks. Only frames that
have a mask are used; cells that have a marker in ``TRA`` and no mask are ignored, not
background. Sequence 01 trains, 02 is held out.

Not measured on the challenge's own data; tried on folders of its shape, written from
the built-in cells, with frames and cells left out.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """The paper's weight map and deformations, on a net with norm and same padding."""
    config = default.get_config()
    config.data.source = "ctc"
    config.data.train = "01"
    config.data.evaluation = "02"
    config.data.normalisation = "example"
    config.data.border.w0 = 10.0

    config.augment.rotate = 180.0
    config.augment.scale = 0.2
    config.augment.elastic = 8.0
    config.augment.brightness = 0.2
    config.augment.contrast = 0.3
    config.augment.noise = 0.1

    config.model.features = (16, 32, 64, 128, 256)

    config.train.steps = 800
    config.train.batch_size = 4
    config.train.crop = (256, 256)
    config.train.ema = 0.99
    config.train.log_every = 25
    config.train.eval_every = 200
    config.train.save_every = 200
    config.train.eval_batch_size = 1
    return config
