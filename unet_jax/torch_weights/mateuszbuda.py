"""mateuszbuda/brain-segmentation-pytorch.

``encoder1.enc1conv1`` and so on; no biases before batch norms, up-convolutions, the
up-sampled map first in the concatenation. Its forward ends in a sigmoid: the logits
here are what comes before it.
"""

from unet_jax.models import UNet
from unet_jax.torch_weights.family import Family, Net, Shapes, units
from unet_jax.torch_weights.tensors import Names


def _read(shapes: Shapes, **fields: object) -> Net:
    depth = shapes.count(r"encoder(\d+)\..+conv1\.weight")
    features = tuple(shapes.out(f"encoder{i}.enc{i}conv2") for i in range(1, depth + 1))
    first = "encoder1.enc1conv1"
    found = {
        "num_classes": shapes.out("conv"),
        "features": (*features, shapes.out("bottleneck.bottleneckconv2")),
        "merge": "concat_up_first",
        "norm": "batch_unbiased",
        "conv_bias": f"{first}.bias" in shapes,
    }
    return Net({**found, **fields}, shapes.into(first), len(shapes.kernel(first)), {})


def _names(model: UNet, rank: int) -> Names:
    def block(ours: str, theirs: str) -> Names:
        return units(ours, lambda what, i: f"{theirs}{what}{i + 1}")

    depth = model.depth
    names = {"head": "conv", **block(f"encoder/level{depth}", "bottleneck.bottleneck")}
    for level in range(depth):
        n = level + 1
        names |= block(f"encoder/level{level}", f"encoder{n}.enc{n}")
        names |= block(f"decoder/level{level}", f"decoder{n}.dec{n}")
        names[f"decoder/up{level}/conv"] = f"upconv{n}"
    return names


FAMILY = Family(
    name="mateuszbuda",
    title="mateuszbuda/brain-segmentation-pytorch",
    signature=(r"encoder1\.enc1conv1\.weight", r"upconv1\.weight", r"conv\.weight"),
    read=_read,
    names=_names,
    sigmoid=True,
)
