"""The lines of a config that a data set asks for, and the file of them."""

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unet_jax.inspection.examples import Look
from unet_jax.inspection.layout import Layout
from unet_jax.inspection.values import Kind

CROP_2D, CROP_3D = 128, 64
VOXELS = 48**3  # of a 3-D crop, at most
BATCH_2D, BATCH_3D = 8, 4
FEATURES_2D, FEATURES_3D = (16, 32, 64, 128), (8, 16, 32, 64)
EPOCHS = 20
STEPS = (200, 2000)
HOUNSFIELD = -500  # a volume with values below this is a CT: air is at -1000
RARE = 0.05


def chosen(layout: Layout, kind: Kind | None, looks: Sequence[Look]) -> Layout:
    """The layout with the options that its masks and its images ask for.

    What is there already is kept.
    """
    options = dict(layout.options)
    if kind is not None:
        options |= {k: v for k, v in kind.options.items() if k not in options}
        names_to = layout.source in ("folder", "volumes")
        if names_to and kind.label_names and "label_masks" not in options:
            options.setdefault("label_names", kind.label_names)
    channels = {len(look.low) for look in looks if not look.error}
    mixed = len(channels) > 1 and channels <= {1, 2, 3, 4}
    if mixed and layout.source in ("folder", "volumes", "ctc", "tfds", "coco"):
        colour = any(not k.grey for k in looks if len(k.low) >= 3)
        options.setdefault("channels", 3 if colour else 1)
    return dataclasses.replace(layout, options=options)


def lines(
    layout: Layout, looks: Sequence[Look], *, trained: int, planes: bool, faulty: bool
) -> dict[str, Any]:
    """Dotted keys of the config and their values, in the order of the default's.

    Args:
        layout: with all its options (`chosen`).
        looks: at the examples of both parts.
        trained: how many there are in the training part, looked at or not.
        planes: whether the labels overlap.
        faulty: whether some files have to be left out.
    """
    source = layout.source
    found: dict[str, Any] = {"task": "labels"} if planes else {}
    found["data.source"] = source
    if layout.root is not None:
        found["data.root"] = str(layout.root)
    found["data.train"], found["data.evaluation"] = layout.train, layout.evaluation
    if faulty:
        found["data.on_error"] = "skip"
    for key, value in layout.options.items():
        found[f"data.{source}.{key}"] = value
    read = [look for look in looks if not look.error]
    if not read:
        return found
    found["data.normalisation"] = normalisation(read)
    rank = len(read[0].size)
    crop, strides = crop_of([look.size for look in read if len(look.size) == rank])
    if rank == 3 or len(set(crop)) > 1:
        found["augment.quarter_turns"] = False
    features = FEATURES_2D if rank == 2 else FEATURES_3D
    found["model.features"] = features[: len(strides) + 1]
    if any(len(set(stride)) > 1 for stride in strides):
        found["model.strides"] = strides
    if planes:
        found["loss.cross_entropy"], found["loss.binary_cross_entropy"] = 0.0, 1.0
    batch = BATCH_2D if rank == 2 else BATCH_3D if math.prod(crop) <= 40**3 else 2
    steps = steps_of(trained, batch)
    found |= {"train.steps": steps, "train.batch_size": batch, "train.crop": crop}
    if wants_foreground(read, crop, planes=planes):
        found["train.foreground"] = 0.33
    found |= {"train.eval_every": steps // 5, "train.save_every": steps // 5}
    large = max(look.pixels for look in read) > 512 * 512
    if rank == 3 or large:
        found["train.eval_batch_size"] = 1 if large else 2
    return found


def normalisation(looks: Sequence[Look]) -> str:
    """The kind for such images: by type, number of axes and range of values."""
    if looks[0].dtype == "uint8":
        return "range"
    lowest = float(np.median([min(look.low) for look in looks]))
    if len(looks[0].size) == 3 and looks[0].dtype == "float32" and lowest > HOUNSFIELD:
        return "example"
    return "standard"


def crop_of(
    sizes: Sequence[tuple[int, ...]],
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """A crop for images of such sizes, and the strides of a net that it divides by.

    Args:
        sizes: of all images, of one rank.

    Returns:
        ``(crop, strides)``: a multiple of 16 on each axis where the median image has
        room for it, else of 8, at most 128 (in 2-D) or 64; an axis shorter than 8 is
        halved fewer times. Strides are a size for each axis and each level but the
        last; three levels of 2 where there is room.
    """
    rank = len(sizes[0])
    most = CROP_2D if rank == 2 else CROP_3D
    median = [int(np.median([size[axis] for size in sizes])) for axis in range(rank)]
    crop = [_fitting(min(length, most)) for length in median]
    while math.prod(crop) > VOXELS and rank == 3:
        crop[int(np.argmax(crop))] -= 16
    halvings = [min(3, max(n, 1).bit_length() - 1) for n in crop]
    levels = max(halvings)
    strides = tuple(
        # A short axis is halved last, when the others have come down to it.
        tuple(2 if level >= levels - own else 1 for own in halvings)
        for level in range(levels)
    )
    return tuple(crop), strides


def _fitting(length: int) -> int:
    for step, least in ((16, 32), (8, 8), (4, 4), (2, 2)):
        if length >= least:
            return length - length % step
    return max(length, 1)


def steps_of(examples: int, batch: int) -> int:
    """About `EPOCHS` times through the data, in a number that 50 divides."""
    wanted = EPOCHS * examples / batch
    return int(min(max(round(wanted / 50) * 50, STEPS[0]), STEPS[1]))


def wants_foreground(
    looks: Sequence[Look], crop: tuple[int, ...], *, planes: bool
) -> bool:
    """Whether random crops would miss the rarest class: rare, in much larger images."""
    pixels = float(np.median([look.pixels for look in looks]))
    balance = shares(looks)
    rarest = [s for s in (balance if planes else balance[1:]) if s > 0]
    return math.prod(crop) < 0.5 * pixels and bool(rarest) and min(rarest) < RARE


def shares(looks: Sequence[Look]) -> list[float]:
    """The part of all pixels that count of each class or label."""
    read = [look for look in looks if look.counts]
    if not read:
        return []
    width = max(len(look.counts) for look in read)
    total = np.zeros(width)
    for look in read:
        total[: len(look.counts)] += look.counts
    counted = sum(look.pixels - look.void for look in read)
    return [float(n / max(counted, 1)) for n in total]


def text_of(found: Mapping[str, Any]) -> str:
    """The lines as they stand in ``get_config``."""
    return "\n".join(f"config.{key} = {_literal(v)}" for key, v in found.items())


def file_of(found: Mapping[str, Any], command: str, path: str, why: str) -> str:
    """A config file of train.py that changes these lines of the default.

    Args:
        found: dotted keys and values.
        command: that made it.
        path: of the file, for the command in its docstring.
        why: what the data set was recognised by.
    """
    train = train_command(path)
    # The docstring holds paths, which may hold anything.
    told = [_inside_quotes(text) for text in (why, command, train)]
    body = text_of(found).replace("\n", "\n    ")
    return (
        f'"""A data set as `unet-jax inspect` found it: {told[0]}.\n\n'
        f"    {told[1]}\n"
        f"    {told[2]}\n"
        '"""\n\n'
        "from ml_collections import ConfigDict\n\n"
        "from configs import default\n\n\n"
        "def get_config() -> ConfigDict:\n"
        '    """The default with the lines that this data asks for."""\n'
        "    config = default.get_config()\n"
        f"    {body}\n"
        "    return config\n"
    )


def train_command(path: str) -> str:
    """How to train with a config file, from where one stands."""
    workdir = f"runs/{Path(path).stem}"
    return f"{_program()} --config={shlex.quote(path)} --workdir={shlex.quote(workdir)}"


def _program() -> str:
    """``python train.py``, with its folder where that is another one."""
    program = Path(__file__).resolve().parents[2] / "train.py"
    there = program.is_file() and Path.cwd() != program.parent
    return f"python {shlex.quote(str(program)) if there else 'train.py'}"


def flags_of(found: Mapping[str, Any]) -> str:
    """The same without a file: each line as a flag of train.py."""
    flags = []
    for key, value in found.items():
        text = value if isinstance(value, str) else repr(value)
        flags.append(_quoted(f"--config.{key}={text}"))
    return " \\\n    ".join([f"{_program()} --workdir=runs/mine", *flags])


def _quoted(text: str) -> str:
    """A word for a shell; in double quotes where single ones would be hard to read."""
    return (
        f'"{text}"'
        if "'" in text and not set(text) & set('"$`\\!')
        else shlex.quote(text)
    )


def _literal(value: Any) -> str:
    """A value as Python writes it, in the quotes that the project's files have."""
    if isinstance(value, str):
        plain = value.isprintable() and not set(value) & set('"\\')
        return f'"{value}"' if plain else ascii(value)
    if isinstance(value, list | tuple):
        inner = ", ".join(map(_literal, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, float):
        return repr(float(value))
    return repr(value)


def _inside_quotes(text: str) -> str:
    text = (
        text.encode("ascii", "backslashreplace").decode()
        if not text.isprintable()
        else text
    )
    return text.replace("\\", "\\\\").replace('"', '\\"')
