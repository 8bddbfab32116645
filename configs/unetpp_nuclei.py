"""UNet++ with deep supervision on the nuclei of the 2018 Data Science Bowl, told apart.

    python train.py --config=configs/unetpp_nuclei.py --workdir=runs/unetpp_nuclei \\
        --config.data.root=DIR
    unet-jax evaluate --workdir=runs/unetpp_nuclei --metrics=objects --tta=symmetries
    unet-jax predict --workdir=runs/unetpp_nuclei IMAGES --out=DIR --instances

DIR is laid out as `nuclei` says. The gap between touching nuclei is background and
weighs up to ten times as much (the U-Net paper's weight map), so that the connected
parts of what is predicted are the nuclei.

Not measured itself: a U-Net with these weights and deformations and 16 to 256 channels
has PQ 0.555 and AP 0.653 at an IoU of 0.5 on the last 20 of 102 ids (docs/results.md).
"""

from ml_collections import ConfigDict

from configs import nuclei


def get_config() -> ConfigDict:
    """`nuclei` with another net, elastic deformation and border weights."""
    config = nuclei.get_config()
    config.data.border.w0 = 10.0
    config.augment.elastic = 4.0
    config.model.name = "unetpp"
    config.model.features = (16, 32, 64, 128)
    return config
