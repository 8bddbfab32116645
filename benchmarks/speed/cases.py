"""What is measured: nets, sizes, which of them by default, and what they are given.

A case is the same architecture on both sides. `ours.py` and `peers.py` build it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unet_jax.types import InputError, NumpyArray, choose, size_text

CLASSES = 2
WHITE = 255.0  # of the images' bytes, which becomes 1
RATE, MOMENTUM = 1e-3, 0.9  # small: nothing may overflow in some hundred steps


class Case(NamedTuple):
    """A net and a batch.

    Attributes:
        title: What tables call the net.
        net: A name of `unet_jax.models.MODELS`.
        features: Channels of each level, finest first.
        size: Pixels of the batch's images along each axis.
        channels: Of the image.
        padding: ``same`` | ``valid``.
        norm: ``batch`` | ``none``.
        batch: Images of a batch.
        dtype: To compute in: ``float32`` | ``bfloat16``.
    """

    title: str
    net: str
    features: tuple[int, ...]
    size: tuple[int, ...]
    channels: int = 3
    padding: str = "same"
    norm: str = "batch"
    batch: int = 1
    dtype: str = "float32"

    @property
    def text(self) -> str:
        """The net and the size of its images."""
        return f"{self.title}, {size_text(self.size)}"


def widths(base: int, levels: int) -> tuple[int, ...]:
    """Channels of each level, each twice as many as the one before."""
    return tuple(base * 2**level for level in range(levels))


def unet(base: int, side: int, **fields: object) -> Case:
    """A U-Net that goes down four times."""
    case = Case(f"U-Net {base}", "unet", widths(base, 5), (side, side))
    return case._replace(**fields)


def _volume(base: int, side: int) -> Case:
    title = f"U-Net 3-D {base}"
    return Case(title, "unet", widths(base, 4), (side,) * 3)


def _nested(side: int) -> Case:
    return Case("UNet++ 32", "unetpp", widths(32, 5), (side, side))


CASES: dict[str, Case] = {
    **{f"unet{b}_{n}": unet(b, n) for b in (16, 32, 64) for n in (256, 512)},
    "unet64_512_plain": unet(64, 512, title="U-Net 64 without norm", norm="none"),
    # 31,030,658 parameters for the paper's one channel. Without its dropout, which each
    # side would draw by itself.
    "unet2015_572": Case(
        "U-Net 2015, valid",
        "unet_2015",
        widths(64, 5),
        (572, 572),
        channels=1,
        padding="valid",
        norm="none",
    ),
    "unetpp32_256": _nested(256),
    "unetpp32_512": _nested(512),
    "attention32_256": Case(
        "Attention U-Net 32", "attention_unet", widths(32, 5), (256, 256)
    ),
    **{f"unet3d{b}_{n}": _volume(b, n) for b in (16, 32) for n in (64, 96)},
}

_LARGE = ("unet64_512", "unet64_512_plain", "unetpp32_512", "unet3d32_96")
_MOST = tuple(name for name in CASES if name not in _LARGE)
_FEW = ("unet16_256", "unetpp32_256", "unet3d16_64")
_NETS = ("unet16_256", "unet2015_572", "unetpp32_256", "attention32_256", "unet3d16_64")
_PLANE = ("unet16_256", "unet32_256", "unet64_256", "unetpp32_256", "attention32_256")

# So chosen that a command ends within a quarter of an hour on two CPU cores.
ON_CPU: dict[str, tuple[str, ...]] = {
    "forward": _MOST,
    "train": _MOST,
    "predict": ("unet16_256",),
    "memory": ("unet32_256", "unet64_256", *_NETS),
    "compile": _FEW,
}
ON_GPU: dict[str, tuple[str, ...]] = {
    "forward": tuple(CASES),
    "train": tuple(CASES),
    "predict": _PLANE,
    "memory": tuple(CASES),
    "compile": _NETS,
}

# Images a second of one H200 at which every layer is bound by 790 TFLOP/s of bfloat16
# or by 4.3 TB/s, layer by layer, for batches without end.
ROOFLINE: dict[tuple[str, str], float] = {
    ("train", "unet64_512"): 459.0,
    ("train", "unet64_512_plain"): 532.0,
    ("train", "unet2015_572"): 670.0,
    ("train", "unetpp32_512"): 526.0,
    ("forward", "unet64_512"): 1949.0,
    ("forward", "unet64_512_plain"): 1949.0,
    ("forward", "unet2015_572"): 2481.0,
    ("forward", "unetpp32_512"): 2820.0,
}


SHARED = 8  # images that devices share
GROWING = {
    "pixels": "pixels of an image",
    "width": "channels of the first level",
    "batch": "images of a batch",
    "devices": f"devices that share {SHARED} images",
}


def tiny(case: Case) -> Case:
    """A net of the same kind that is there at once, to try things."""
    rank = len(case.size)
    side = 60 if case.padding == "valid" else 32 if rank == 2 else 16
    title = f"tiny {case.title}"
    return case._replace(title=title, features=widths(2, 3), size=(side,) * rank)


def arrays(case: Case) -> tuple[NumpyArray, NumpyArray]:
    """A batch of noise: images ``u8[B, *S, C]`` and labels ``u8[B, *S]``."""
    rng = np.random.default_rng(0)
    shape = (case.batch, *case.size)
    image = rng.integers(0, 256, (*shape, case.channels), dtype=np.uint8)
    return image, rng.integers(0, CLASSES, shape, dtype=np.uint8)


def select(
    command: str, names: str, batches: Sequence[int], *, dtype: str, on_cpu: bool
) -> dict[str, tuple[str, Case]]:
    """The cases of a command line.

    Args:
        command: ``forward``, ``train``, ``predict``, ``memory`` or ``compile``.
        names: Of `CASES`, with commas; ``all``; or "" for the usual ones.
        batches: Images of a batch, each a row of its own.
        dtype: To compute in.
        on_cpu: Which the usual ones are.

    Returns:
        The row's key to the case's name and the case.

    Raises:
        InputError: A name that is none, or a net that tiles are not compared of.
    """
    asked = (ON_CPU if on_cpu else ON_GPU)[command]
    if names:
        asked = tuple(CASES) if names == "all" else tuple(names.split(","))
    found = {}
    for name in asked:
        case: Case = choose(CASES, name, "--cases:")
        if command == "predict" and (len(case.size) != 2 or case.padding == "valid"):
            if names == "all":
                continue
            raise InputError(
                f"--cases={name}: tiles are compared of 2-D nets with same padding, use"
                f" some of {', '.join(_PLANE)}."
            )
        for batch in batches:
            row = case._replace(batch=batch, dtype=dtype)
            found[f"{name}, batch {batch}, {dtype}"] = (name, row)
    return found
