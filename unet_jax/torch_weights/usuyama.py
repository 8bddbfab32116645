"""usuyama/pytorch-unet: ``dconv_down1`` ... ``dconv_up1``, without norms.

Bilinear up-sampling with aligned corners, the up-sampled map first.
"""

from unet_jax.models import UNet
from unet_jax.torch_weights.family import Family, Net, Shapes, sequence
from unet_jax.torch_weights.tensors import Names


def _read(shapes: Shapes, **fields: object) -> Net:
    levels = shapes.count(r"dconv_down(\d+)\..+")
    first = "dconv_down1.0"
    downs = tuple(shapes.out(f"dconv_down{i}.2") for i in range(1, levels + 1))
    ups = tuple(shapes.out(f"dconv_up{i}.2") for i in range(1, levels))
    found = {
        "num_classes": shapes.out("conv_last"),
        "features": downs,
        "decoder_features": ups,
        "up": "bilinear_aligned",
        "merge": "concat_up_first",
        "norm": "none",
        "conv_bias": f"{first}.bias" in shapes,
    }
    return Net({**found, **fields}, shapes.into(first), len(shapes.kernel(first)), {})


def _names(model: UNet, rank: int) -> Names:
    names = {"head": "conv_last"}
    for level in range(model.depth + 1):
        for ours, theirs in (("encoder", "down"), ("decoder", "up")):
            prefix = f"dconv_{theirs}{level + 1}"
            names |= sequence(f"{ours}/level{level}", prefix, {"conv": (0, 2)})
    return names


FAMILY = Family(
    name="usuyama",
    title="usuyama/pytorch-unet",
    signature=(r"dconv_down1\.0\.weight", r"dconv_up1\.0\.weight"),
    read=_read,
    names=_names,
)
