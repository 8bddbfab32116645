"""LeeJunHyun/Image_Segmentation: U_Net, AttU_Net, R2U_Net, R2AttU_Net.

Numbers count levels from 1, the finest. Up-sampling repeats pixels and convolves; gates
are at the skip's own resolution. The convolution of a recurrent block is applied
``t + 1`` times (``t = 2``); t is not in the weights.
"""

from unet_jax.models import UNet
from unet_jax.torch_weights.family import Family, Net, Shapes, sequence
from unet_jax.torch_weights.tensors import Names
from unet_jax.types import InputError


def _read(shapes: Shapes, *, t: int = 2, **fields: object) -> Net:
    recurrent = "RRCNN1.Conv_1x1.weight" in shapes
    if recurrent and t != 2:
        raise InputError(
            f"t = {t} is not offered: a block repeats its convolution twice here; build"
            " the net with models.UNet(block=partial(RecurrentBlock, steps=t)) and"
            " give a table of names."
        )
    levels = shapes.count(r"(?:RRCNN|Conv)(\d+)\..+")
    last = "RRCNN{}.Conv_1x1" if recurrent else "Conv{}.conv.3"
    first = last.format(1) if recurrent else "Conv1.conv.0"
    gated = "Att2.psi.0.weight" in shapes
    found = {
        "num_classes": shapes.out("Conv_1x1"),
        "features": tuple(shapes.out(last.format(i)) for i in range(1, levels + 1)),
        "block": "recurrent" if recurrent else "plain",
        "up": "nearest_conv",
        "merge": "gated_full" if gated else "concat",
        "norm": "batch_unbiased",
        "conv_bias": True,
    }
    return Net({**found, **fields}, shapes.into(first), len(shapes.kernel(first)), {})


def _names(model: UNet, rank: int) -> Names:
    names = {"head": "Conv_1x1"}
    places = {"conv": (0, 3), "norm": (1, 4)}
    for level in range(model.depth + 1):
        n = level + 1
        for ours, theirs in (("encoder", ""), ("decoder", "Up_")):
            path = f"{ours}/level{level}"
            if model.block == "recurrent":
                theirs = f"{theirs}RRCNN{n + (ours == 'decoder')}"
                names[f"{path}/project"] = f"{theirs}.Conv_1x1"
                for i in range(2):
                    names[f"{path}/conv{i}"] = f"{theirs}.RCNN.{i}.conv.0"
                    names[f"{path}/norm{i}"] = f"{theirs}.RCNN.{i}.conv.1"
            else:
                theirs = f"Up_conv{n + 1}.conv" if theirs else f"Conv{n}.conv"
                names |= sequence(path, theirs, places)
        up, gate = f"decoder/up{level}", f"decoder/merge{level}/gate0"
        names |= {f"{up}/conv0": f"Up{n + 1}.up.1", f"{up}/norm0": f"Up{n + 1}.up.2"}
        for ours, theirs in (("theta", "W_x"), ("phi", "W_g"), ("psi", "psi")):
            names[f"{gate}/{ours}"] = f"Att{n + 1}.{theirs}.0"
            names[f"{gate}/{ours}_norm"] = f"Att{n + 1}.{theirs}.1"
    return names


FAMILY = Family(
    name="leejunhyun",
    title="LeeJunHyun/Image_Segmentation: U_Net, AttU_Net, R2U_Net, R2AttU_Net",
    signature=(r"(RRCNN1\.Conv_1x1|Conv1\.conv\.0)\.weight", r"Conv_1x1\.weight"),
    read=_read,
    names=_names,
    options={"t": 2},
)
