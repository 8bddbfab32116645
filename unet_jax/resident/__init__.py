"""A training set that lives on the device: what a step is sent is a few integers.

`Kept` puts all examples on every device, once and as they are stored. From then on the
host only decides the crops (`unet_jax.data.crop_reader`); a step `with_crops` cuts them
out itself, first thing, with the same pixels as `unet_jax.data.train_batches` gives.
"""

from unet_jax.resident.crops import Resident, cut, placed, shapes, with_crops
from unet_jax.resident.whole import Kept, wanted

__all__ = ["Kept", "Resident", "cut", "placed", "shapes", "wanted", "with_crops"]
