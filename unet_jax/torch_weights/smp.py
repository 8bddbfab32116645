"""segmentation_models_pytorch: Unet and UnetPlusPlus on a torchvision ResNet.

Up-sampling repeats pixels (for the Unet to the exact size of the skip), the up-sampled
map comes first in the concatenation, the head is 3x3. ``scse`` attention weighs what
goes into and what comes out of each decoder block. The encoder alone is torchvision's
own state dict (`encoder_names`). Encoders of ``timm`` have other keys and are not read.
"""

import re
from collections.abc import Mapping

from unet_jax.models import UNet
from unet_jax.torch_weights.family import Family, Net, Shapes
from unet_jax.torch_weights.tensors import Names
from unet_jax.types import InputError

_RESNETS: Mapping[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}


def resnet_of(shapes: Shapes, prefix: str = "encoder.") -> tuple[str, tuple[int, ...]]:
    """Which ResNet a checkpoint holds.

    Args:
        shapes: Of its tensors.
        prefix: Before ``conv1`` and ``layer1``.

    Returns:
        Its name in `unet_jax.encoders.ENCODERS`, and ``features`` of the net.

    Raises:
        InputError: None that is known.
    """
    start = re.escape(prefix)
    counts = tuple(
        shapes.count(rf"{start}layer{stage}\.(\d+)\.conv1\.weight")
        for stage in (1, 2, 3, 4)
    )
    last = "conv3" if f"{prefix}layer1.0.conv3.weight" in shapes else "conv2"
    name = _RESNETS.get((counts, last == "conv3"))
    if name is None:
        raise InputError(
            f"its encoder has {counts} blocks of {last[-1]} convolutions in its stages,"
            " which is no ResNet-18, 34, 50, 101 or 152."
        )
    stem = shapes.out(f"{prefix}conv1")
    stages = (shapes.out(f"{prefix}layer{s}.0.{last}") for s in (1, 2, 3, 4))
    return name, (0, stem, *stages)


def encoder_names(model: UNet, prefix: str = "encoder.") -> Names:
    """The names of a torchvision ResNet's modules, without its classifier.

    Args:
        model: A net with a ResNet encoder.
        prefix: Before ``conv1`` and ``layer1``; "" for torchvision's own state dict.
    """
    names = {"encoder/conv_stem": f"{prefix}conv1", "encoder/norm_stem": f"{prefix}bn1"}
    for stage in (1, 2, 3, 4):
        for i in range(36):  # more than any has; what the net has not is ignored
            ours, theirs = f"encoder/level{stage + 1}_{i}", f"{prefix}layer{stage}.{i}"
            for n in range(3):
                names[f"{ours}/conv{n}"] = f"{theirs}.conv{n + 1}"
                names[f"{ours}/norm{n}"] = f"{theirs}.bn{n + 1}"
            names[f"{ours}/shortcut"] = f"{theirs}.downsample.0"
            names[f"{ours}/shortcut_norm"] = f"{theirs}.downsample.1"
    return names


def _read(shapes: Shapes, **fields: object) -> Net:
    encoder, features = resnet_of(shapes)
    depth = len(features) - 1
    nested = shapes.has(r"decoder\.blocks\.x_0_0\..+")
    # blocks.0 goes to the coarsest of the decoder's levels; x_0_l ends a level.
    block = "decoder.blocks.x_0_{}.conv2.0" if nested else "decoder.blocks.{}.conv2.0"
    widths = tuple(shapes.out(block.format(depth - 1 - i)) for i in range(depth))
    excited = shapes.has(r"decoder\.blocks\..+\.attention1\.attention\.cSE\.1\.weight")
    head = "segmentation_head.0"
    found = {
        "num_classes": shapes.out(head),
        "encoder": encoder,
        "features": features,
        "decoder": "unetpp" if nested else "unet",
        "decoder_features": widths,
        "decoder_block": "excited" if excited else "plain",
        "up": "nearest",
        "fit": "resize",
        "merge": "concat_newest_first" if nested else "concat_up_first",
        "norm": "batch_unbiased",
        "head_kernel": shapes.kernel(head)[0],
    }
    stem = "encoder.conv1"
    return Net({**found, **fields}, shapes.into(stem), len(shapes.kernel(stem)), {})


def _names(model: UNet, rank: int) -> Names:
    depth = model.depth
    names = {**encoder_names(model), "head": "segmentation_head.0"}

    def block(ours: str, theirs: str) -> None:
        for n in range(2):
            names[f"{ours}/conv{n}"] = f"{theirs}.conv{n + 1}.0"
            names[f"{ours}/norm{n}"] = f"{theirs}.conv{n + 1}.1"
        for gate, place in (("excite_input", 1), ("excite", 2)):
            prefix = f"{theirs}.attention{place}.attention"
            names[f"{ours}/{gate}/channel/squeeze"] = f"{prefix}.cSE.1"
            names[f"{ours}/{gate}/channel/excite"] = f"{prefix}.cSE.3"
            names[f"{ours}/{gate}/spatial"] = f"{prefix}.sSE.0"

    for row in range(depth):
        layer = depth - 1 - row
        block(f"decoder/level{row}", f"decoder.blocks.{layer}")
        for column in range(1, depth + 1 - row):
            number = layer + 1 - column
            block(f"decoder/node{row}_{column}", f"decoder.blocks.x_{number}_{layer}")
    return names


FAMILY = Family(
    name="smp",
    title="segmentation_models_pytorch: Unet, UnetPlusPlus on ResNet",
    signature=(
        r"encoder\.conv1\.weight",
        r"encoder\.layer1\.0\.conv1\.weight",
        r"decoder\.blocks\.(x_0_)?0\.conv1\.0\.weight",
        r"segmentation_head\.0\.weight",
    ),
    read=_read,
    names=_names,
    options={"up": "nearest", "act": "relu"},
    ignored=r"encoder\.fc\.(weight|bias)",
)
