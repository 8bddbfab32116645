"""The ISBI 2012 stack of electron microscopy slices, registered with TFDS.

Importing this module registers ``isbi2012``. The files cannot be downloaded by a
program and may be used for non-commercial work only; they come from a manual folder.

Reference: I. Arganda-Carreras et al., "Crowdsourcing the creation of image segmentation
algorithms for connectomics", Frontiers in Neuroanatomy 9:142, 2015; A. Cardona et al.,
"An integrated micro- and macroarchitectural analysis of the Drosophila brain by
computer-assisted serial section electron microscopy", PLoS Biology 8(10), 2010.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from unet_jax.data import stacks
from unet_jax.data.masks import Coding
from unet_jax.types import InputError

IMAGES, LABELS = "train-volume.tif", "train-labels.tif"
NAMES = ("membrane", "cell")


class Isbi2012(tfds.core.GeneratorBasedBuilder):
    """Membranes in 30 slices of the Drosophila larva's nerve cord, 512 x 512 pixels.

    Features: ``image`` u8 [H, W, 1]; ``segmentation_mask`` [H, W, 1], 0 membrane and 1
    inside of a cell. The one split ``train`` keeps the order of the stack, so that
    ``train[:20]`` and ``train[20:]`` share no neighbours but two.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "The training stack."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Put {IMAGES} and {LABELS} of the ISBI 2012 EM segmentation challenge there."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(None, None, 1), encoding_format="png"
                    ),
                    "segmentation_mask": tfds.features.LabeledImage(
                        labels=list(NAMES),
                        shape=(None, None, 1),
                        encoding_format="png",
                    ),
                }
            ),
            homepage="https://imagej.net/events/isbi-2012-segmentation-challenge",
            # The order of the stack; TFDS would mix the slices.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(Path(dl_manager.manual_dir))}

    def _generate_examples(self, folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        from PIL import Image

        volume, _ = stacks.read_volume(folder / IMAGES, channels=1)
        mask = stacks.read_mask(folder / LABELS)
        if volume.shape[:3] != mask.shape[:3]:
            raise InputError(
                f"{folder / IMAGES} has the size {volume.shape[:3]}, but {LABELS} "
                f"{mask.shape[:3]}: get the two files anew."
            )
        coding = Coding("binary", NAMES, rank=3)
        label, _ = coding.decode(mask, str(folder / LABELS))
        for i, (page, truth) in enumerate(zip(volume[..., 0], label, strict=True)):
            # TFDS needs TensorFlow for arrays, but not for Pillow images.
            yield (
                i,
                {
                    "image": Image.fromarray(page),
                    "segmentation_mask": Image.fromarray(truth),
                },
            )
