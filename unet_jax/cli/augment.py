"""``unet-jax augment``: what augmentation makes of the training data."""

import argparse
import sys
from typing import Any

from unet_jax.cli import arguments as flags


def add(commands: Any) -> None:
    """The command's flags."""
    command = commands.add_parser(
        "augment",
        help="draw what augmentation makes of the training data",
        description="Draws the first crops of a run as they are given and as its first"
        " steps would draw them, with the label's outlines and a grid of lines that"
        " moves along, and the weights where they differ.",
        epilog="Any key of the config can be changed, as in train.py:"
        " --config.augment.elastic=10.",
    )
    add = command.add_argument
    add("--config", required=True, metavar="FILE", help="a config of train.py")
    add("--out", default="augment.png", metavar="FILE", help="the picture, a .png")
    add("--examples", type=int, default=3, metavar="N", help="rows (3)")
    add("--draws", type=int, default=5, metavar="N", help="draws of each (5)")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    flags.say_devices(sys.stdout)
    from unet_jax import options, overlay, preview, run, sharding
    from unet_jax.types import InputError

    if not arguments.out.endswith(".png"):
        raise InputError(f"--out={arguments.out} must be a .png file.")
    config = flags.config(arguments)
    assert config is not None
    options.check(config)
    # The picture does not depend on how many devices share a batch, nor on how many
    # examples do, which might be to be found.
    batch_size = config["train"]["batch_size"] or arguments.examples
    config["train"] = {**config["train"], "batch_size": max(batch_size, 1)}
    config["model"] = {**config["model"], "remat": 0}
    wired = run.build(config, sharding.make_mesh(data=1))
    picture = preview.picture(wired, examples=arguments.examples, draws=arguments.draws)
    overlay.write(arguments.out, picture)
    print(f"{arguments.out}: {arguments.examples} crops, {arguments.draws} draws each")
