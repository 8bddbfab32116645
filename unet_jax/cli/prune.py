"""``unet-jax prune``: what a UNet++ costs and scores cut off at each level."""

import argparse
import sys
from typing import Any

from unet_jax.cli import arguments as flags
from unet_jax.cli.evaluate import measure, open_split


def add(commands: Any) -> None:
    """The command's flags."""
    command = commands.add_parser(
        "prune",
        help="what a UNet++ costs and scores cut off at each level",
        description="Cuts a UNet++ that was trained with deep supervision off at each"
        " level and prints its parameters, FLOPs, latency and scores there.",
    )
    flags.add_workdir(command)
    flags.add_split(command)
    add = command.add_argument
    add("--level", type=int, metavar="L", help="write the net cut off at this level")
    add("--out", metavar="DIR", help="workdir to write it to")
    add(
        "--repeats", type=int, default=20, metavar="N", help="timed passes of each (20)"
    )
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    flags.say_devices(sys.stdout)
    from unet_jax import pruning
    from unet_jax.checkpoint import load_for_inference
    from unet_jax.types import InputError, choose, size_text

    if (arguments.level is None) != (arguments.out is None):
        raise InputError(
            "--level and --out go together: the level to cut off at, and the folder to"
            " write the smaller net to."
        )
    model, variables, meta, step = load_for_inference(
        arguments.workdir, which=arguments.which
    )
    pruning.check(model, arguments.workdir)
    if arguments.level is not None:
        choose(range(1, model.depth + 1), arguments.level, "--level =")
    meta, source, split = open_split(meta, arguments)
    image = source[0]["image"]
    levels = pruning.measure(
        model,
        variables,
        image=image,
        stats=meta.normalisation,
        evaluate=lambda small, needed: measure(small, needed, meta, source, arguments),
        repeats=arguments.repeats,
    )
    size = size_text(image.shape[:-1])
    print(f"{arguments.workdir}: step {step}, {len(source)} examples of {split}")
    print(pruning.table(levels))
    print(
        f"FLOPs and latency (median of {arguments.repeats} passes in turns): of one"
        f" image of {size}; Dice and IoU: pooled, mean of all classes but background"
    )
    if arguments.level is not None:
        chosen = levels[arguments.level - 1]
        where = pruning.write(chosen, meta, step, arguments.out)
        print(f"level {arguments.level} is written to {where}: predict with it")
