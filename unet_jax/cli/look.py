"""``unet-jax shapes`` and ``features``: a net, and what it makes of an image."""

import argparse
import contextlib
import re
import sys
from collections.abc import Mapping
from typing import Any

from unet_jax.cli import arguments as flags


def add_shapes(commands: Any) -> None:
    """The flags of ``shapes``."""
    command = commands.add_parser(
        "shapes",
        help="print and draw a net with the shape at every node",
        description="Prints the U: every shape, what skips carry and what is cut"
        " off them, parameters, FLOPs and receptive field of each level.",
        epilog="Any key of the config's model can be changed, as in train.py:"
        ' --config.model.name=unetpp --config.model.features="(32,64,128)".',
    )
    add = command.add_argument
    add("--config", metavar="FILE", help="a config of train.py; without it plain U-Net")
    add("--workdir", metavar="DIR", help="instead: where train.py wrote")
    add(
        "--size",
        metavar="SIZE",
        help="of the image: 572, 256x320 or 32x48x32 (the config's train.crop)",
    )
    add("--channels", type=int, default=1, metavar="C", help="of the image (1)")
    add("--classes", type=int, default=2, metavar="K", help="of the answer (2)")
    add("--out", metavar="FILE", help="draw it, as .png or .svg")
    # Changes to the model need no config here.
    command.set_defaults(run=_shapes, anyway=True)


def add_features(commands: Any) -> None:
    """The flags of ``features``."""
    command = commands.add_parser(
        "features",
        help="draw what a trained net makes of an image, or follow one pixel",
        description="Draws the strongest feature maps and the attention gates of every"
        " level as one picture.",
    )
    flags.add_workdir(command)
    add = command.add_argument
    add("image", metavar="IMAGE", help="a file that predict can read")
    add("--out", metavar="FILE", help="the picture (IMAGE_features.png, right here)")
    add("--maps", type=int, default=8, metavar="N", help="channels of each level (8)")
    add("--pixel", metavar="Y,X", help="follow this pixel down and up, counted from 0")
    command.set_defaults(run=_features)


def _shapes(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from unet_jax import diagram, models
    from unet_jax.data import formats
    from unet_jax.types import InputError

    channels, config = arguments.channels, {}
    if arguments.workdir is not None:
        if arguments.config is not None or arguments.changes:
            raise InputError(
                f"--workdir={arguments.workdir} has a net of its own: leave out"
                " --config, or leave out --workdir."
            )
        from unet_jax.checkpoint import load_for_inference

        model, _, meta, _ = load_for_inference(arguments.workdir, which="latest")
        channels, config = meta.channels, meta.config
    else:
        if arguments.config is not None:
            config = flags.read_config(arguments.config)
        fields = {**config.get("model", {"name": "unet"}), **_changes(arguments)}
        fields.pop("encoder_weights", None)
        weights = fields.pop("weights", None)
        model = models.build(**fields, num_classes=arguments.classes)
        if weights:  # of which the net is; as train.py builds it
            from unet_jax import transfer

            model = transfer.adapted(transfer.read(weights).model, fields)
    size = _size(arguments.size, config)
    out = Path(arguments.out) if arguments.out else None
    with formats.writable(str(out)) if out else contextlib.nullcontext():
        diagram.print_and_draw(model, size, channels, out)


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """``--config.model.KEY=VALUE`` as fields of the net."""
    from unet_jax.models import UNet
    from unet_jax.types import InputError, choose

    fields: dict[str, Any] = {}
    known = {"name", *UNet.__dataclass_fields__} - {"parent", "num_classes"}
    for text in arguments.changes:
        key, _, value = text.partition("=")
        if not key.startswith("--config.model.") or not value:
            raise InputError(
                f"{text} does not change the net: write --config.model.KEY=VALUE."
            )
        name = choose(known, key.removeprefix("--config.model."), "--config.model.")
        fields[name] = flags.literal(value)
    return fields


def _size(text: str | None, config: Mapping[str, Any]) -> tuple[int, ...]:
    """``572`` or ``256x320`` -> a number for each axis."""
    from unet_jax.types import InputError

    crop = config.get("train", {}).get("crop", (256, 256))
    if text is None:
        return tuple(crop)
    parts = text.lower().replace(",", "x").split("x")
    digits = [part for part in parts if re.fullmatch(r" *\d{1,9} *", part)]
    numbers = tuple(map(int, digits))
    if len(numbers) != len(parts) or min(numbers) < 1 or len(numbers) > 3:
        raise InputError(
            f"--size={text:.60} is no size: write 572, 256x320 or 32x48x32."
        )
    return numbers * len(crop) if len(numbers) == 1 else numbers


def _features(arguments: argparse.Namespace) -> None:
    flags.say_devices(sys.stdout)
    from pathlib import Path

    from unet_jax import feature_sheet
    from unet_jax.predict import Predictor

    pixel = feature_sheet.parse_pixel(arguments.pixel) if arguments.pixel else None
    predictor = Predictor(arguments.workdir, which=arguments.which)
    out = arguments.out or f"{Path(arguments.image).name.split('.')[0]}_features.png"
    text = feature_sheet.write(
        predictor, arguments.image, out, channels=arguments.maps, pixel=pixel
    )
    if text:
        print(text)
    print(f"{arguments.image} -> {out}")
