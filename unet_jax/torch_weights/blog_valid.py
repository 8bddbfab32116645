"""The 2015 net with valid convolutions as tutorials write it: ``layer1`` to ``layer9``.

Nine ``Sequential``: down (from ``layer2`` with the pooling first), the bottleneck with
the up-convolution at its end, up, and the last with the 1x1 head. 31,030,658 parameters
in its usual width. Some copies cut the skips one pixel before the centre, as fixed
slices that work for 572 pixels only (3:59, 15:119, 39:239, 87:479); the weights do not
say so.
"""

from unet_jax.models import UNet
from unet_jax.torch_weights.family import Family, Net, Shapes
from unet_jax.torch_weights.tensors import Names
from unet_jax.types import choose

CROPS = {"centre": "crop", "centre-1": "crop_before"}
ORDERS = {"skip_first": "concat", "up_first": "concat_up_first"}


def _read(
    shapes: Shapes, *, crop: str = "centre", order: str = "skip_first", **fields: object
) -> Net:
    choose(CROPS, crop, "crop =")
    choose(ORDERS, order, "order =")
    depth = (max(shapes.numbers(r"layer(\d+)\..+")) - 1) // 2
    features = tuple(
        shapes.out(f"layer{i}.{2 if i == 1 else 3}") for i in range(1, depth + 2)
    )
    last = f"layer{2 * depth + 1}.4"
    found = {
        "num_classes": shapes.out(last),
        "features": features,
        "padding": "valid",
        "fit": CROPS[crop],
        "merge": ORDERS[order],
        "norm": "none",
    }
    return Net(
        {**found, **fields}, shapes.into("layer1.0"), len(shapes.kernel("layer1.0")), {}
    )


def _names(model: UNet, rank: int) -> Names:
    depth, names = model.depth, {}
    for level in range(depth + 1):
        for i, place in enumerate((0, 2) if level == 0 else (1, 3)):
            names[f"encoder/level{level}/conv{i}"] = f"layer{level + 1}.{place}"
    for level in range(depth):
        layer = f"layer{2 * depth + 1 - level}"
        for i, place in enumerate((0, 2)):
            names[f"decoder/level{level}/conv{i}"] = f"{layer}.{place}"
        before = 2 * depth - level
        end = 5 if level == depth - 1 else 4
        names[f"decoder/up{level}/conv"] = f"layer{before}.{end}"
    return {**names, "head": f"layer{2 * depth + 1}.4"}


FAMILY = Family(
    name="blog_valid",
    title="the 2015 net with valid convolutions, layer1 ... layer9",
    signature=(r"layer1\.0\.weight", r"layer2\.1\.weight", r"layer[579]\.4\.weight"),
    read=_read,
    names=_names,
    options={"crop": "centre", "order": "skip_first"},
    free=("fit", "merge"),
)
