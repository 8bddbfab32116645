"""The console command ``unet-jax``: a trained workdir, or a net, from the outside.

A user's mistake ends in one sentence on stderr and exit status 2. Everything heavy is
imported by the subcommand that needs it, so that ``--help`` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from unet_jax.cli import arguments as shared
from unet_jax.cli import augment, convert, evaluate, inspect, look, predict, prune


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        The exit status: 0, 2 for a user's mistake, 1 for a check that failed, or 141
        if nobody reads the output any more, as after ``| head``.
    """
    try:
        try:
            return _main(argv)
        finally:
            # Here and not when the interpreter ends, which has no way but a traceback.
            print(end="", flush=True)
    except BrokenPipeError:
        # What is still kept for the pipe would fail there once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141


def _main(argv: Sequence[str] | None) -> int:
    """`main`, with whatever is written to a closed pipe raised."""
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    arguments.changes = [text for text in unknown if text.startswith("--config.")]
    free = getattr(arguments, "config", None) is not None or "anyway" in arguments
    if unknown and (arguments.changes != unknown or not free):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    from unet_jax.types import InputError

    try:
        return arguments.run(arguments) or 0
    except InputError as error:
        sys.stdout.flush()
        print(f"unet-jax: error: {shared.one_line(error)}", file=sys.stderr)
        return 2
    except MemoryError as error:
        why = shared.one_line(error) or "no more to be had"
        print(
            f"unet-jax: error: this needs more memory than there is ({why}): make"
            " images, crops or batches smaller.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("unet-jax: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from unet_jax import __version__

    parser = argparse.ArgumentParser(
        prog="unet-jax", description="Look at U-Nets, and use what was trained."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    predict.add(commands)
    evaluate.add(commands)
    prune.add(commands)
    convert.add(commands)
    augment.add(commands)
    inspect.add(commands)
    look.add_shapes(commands)
    look.add_features(commands)
    return parser
