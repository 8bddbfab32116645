"""jvanvugt/pytorch-unet: the 2015 net, valid or padded, with or without batch norm.

Norms come after the activation. Skips are centre-cropped, also with padding: at sizes
that 2^depth does not divide its result is smaller than the image, where the net here
fills the up-sampled map up with zeros. Whether it pads is not in the weights: its
constructor's default, and the default here, is valid convolutions.
"""

from unet_jax.models import UNet
from unet_jax.torch_weights.family import (
    Family,
    Net,
    Shapes,
    find_block,
    norm_of,
    sequence,
)
from unet_jax.torch_weights.tensors import Names


def _read(shapes: Shapes, *, padding: str = "valid", **fields: object) -> Net:
    levels = shapes.count(r"down_path\.(\d+)\..+")
    downs = [find_block(shapes, f"down_path.{i}.block") for i in range(levels)]
    first = downs[0]
    interpolates = "up_path.0.up.1.weight" in shapes
    found = {
        "num_classes": shapes.out("last"),
        "features": tuple(block.widths[-1] for block in downs),
        "padding": padding,
        "merge": "concat_up_first",
        "up": "bilinear_dense" if interpolates else "transpose",
        "norm": norm_of(first),
        "conv_bias": first.bias,
        "order": "can",
    }
    return Net({**found, **fields}, first.into, len(first.kernel), {})


def _names(model: UNet, rank: int) -> Names:
    depth, names = model.depth, {"head": "last"}
    places = {"conv": (0, 3), "norm": (2, 5)}
    if model.norm == "none":
        places = {"conv": (0, 2)}
    for level in range(depth + 1):
        names |= sequence(f"encoder/level{level}", f"down_path.{level}.block", places)
        up = f"up_path.{depth - 1 - level}"
        names |= sequence(f"decoder/level{level}", f"{up}.conv_block.block", places)
        end = ".1" if model.up == "bilinear_dense" else ""
        names[f"decoder/up{level}/conv"] = f"{up}.up{end}"
    return names


FAMILY = Family(
    name="jvanvugt",
    title="jvanvugt/pytorch-unet",
    signature=(r"down_path\.0\.block\.0\.weight", r"up_path\.0\..+", r"last\.weight"),
    read=_read,
    names=_names,
    options={"padding": "valid"},
)
