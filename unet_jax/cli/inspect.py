"""``unet-jax inspect``: a data set before anything is trained on it."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from unet_jax.cli import arguments as flags

if TYPE_CHECKING:
    from unet_jax.inspection.layout import Layout

_EPILOG = """\
  unet-jax inspect mydata
  unet-jax inspect mydata --write-config=my.py
  unet-jax inspect cells
  unet-jax inspect --config=configs/nuclei.py --config.data.root=DIR

The exit status is 1 where the data cannot be trained on as it is.
"""


def add(commands: Any) -> None:
    """The command's flags."""
    command = commands.add_parser(
        "inspect",
        help="look at a data set, and write the config for it",
        description="Finds out how a folder of images and masks is laid out, looks at"
        "\nevery file, says what is odd, draws a dozen examples, and ends with the"
        "\nlines of a config and the command that trains on them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("what", nargs="?", metavar="WHAT", help="a folder, cells, or tfds:NAME")
    add("--config", metavar="FILE", help="instead: the data of a config of train.py")
    add("--out", default="inspect.png", metavar="FILE", help="the picture, a .png")
    add("--write-config", metavar="FILE", help="write a config of train.py, a .py")
    add(
        "--limit",
        type=int,
        default=2000,
        metavar="N",
        help="look at so many pairs, evenly spread, where there are more (2000)",
    )
    add(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write what was found as JSON; without FILE print it instead of the text",
    )
    add(
        "--links",
        action="store_true",
        help="follow links of files that lead out of the folder",
    )
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from unet_jax import overlay
    from unet_jax.data import formats
    from unet_jax.inspection import inspect, report, settings, sheet
    from unet_jax.log import replace_file
    from unet_jax.types import InputError

    _check(arguments)
    layout, links = _layout(arguments)
    quiet = arguments.json == "-"
    found = inspect(layout, limit=arguments.limit, links=links, progress=_bar)
    say: Callable[..., None] = (lambda *_: None) if quiet else print
    say(report.text_of(found))
    picture = sheet.draw(
        found.opened,
        found.examples,
        found.findings,
        found.listing,
        volumes=layout.source == "volumes",
    )
    say()
    if picture is not None:
        overlay.write(arguments.out, picture)
        say(f"{arguments.out}: examples with their labels; look at it")
    if arguments.json is not None:
        text = json.dumps(report.json_of(found), indent=2, default=str) + "\n"
        if quiet:
            print(text, end="")
        else:
            with formats.writable(arguments.json):
                replace_file(arguments.json, text.encode())
            say(f"{arguments.json}: the same as JSON")
    if not found.usable:
        say("This cannot be trained on as it is: see the lines marked !! above.")
        return 1
    say("\nThe lines of a config for it:\n")
    say(settings.text_of(found.lines))
    say()
    path = arguments.write_config
    if path is not None:
        command = f"unet-jax inspect {shlex.join(_asked(arguments))}"
        text = settings.file_of(found.lines, command, path, found.layout.why)
        file = Path(path)
        if os.path.exists(file) and file.read_bytes() != text.encode():
            raise InputError(
                f"{path} exists and may hold work of yours: choose another name, or"
                " move it away."
            )
        with formats.writable(path):
            replace_file(path, text.encode())
        say(f"{path} is written. To train:\n\n{settings.train_command(path)}")
    elif arguments.config is not None:
        changes = map(shlex.quote, arguments.changes)
        train = " ".join([settings.train_command(arguments.config), *changes])
        say(f"To train with the config as it is:\n\n{train}")
    else:
        say(f"To train:\n\n{settings.flags_of(found.lines)}\n")
        say("or give --write-config=my.py, and train with --config=my.py")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuses what is wrong before anything is read."""
    from unet_jax.types import InputError

    if (arguments.what is None) == (arguments.config is None):
        raise InputError(
            "give a folder to inspect, or the --config=FILE whose data is meant: one of"
            " the two."
        )
    for flag, value, ending in (
        ("--out", arguments.out, ".png"),
        ("--write-config", arguments.write_config, ".py"),
    ):
        if value is not None and not value.endswith(ending):
            raise InputError(f"{flag}={value} must be a {ending} file.")
    if arguments.limit < 1:
        raise InputError(f"--limit={arguments.limit} must be 1 or more.")


def _layout(arguments: argparse.Namespace) -> "tuple[Layout, bool]":
    """What is to be looked at, and whether links may be followed."""
    from pathlib import Path

    from unet_jax.inspection import layouts
    from unet_jax.inspection.layout import Layout

    what, links = arguments.what, arguments.links
    if arguments.config is not None:
        config = flags.config(arguments)
        assert config is not None
        layout, linked = layouts.of_config(config["data"], arguments.config)
        return layout, links or linked
    if what == "cells" and not os.path.exists(what):
        return Layout("cells", None, {}, "train", "val", "the built-in cells"), links
    if what.startswith("tfds:"):
        options = {"name": what.removeprefix("tfds:")}
        return Layout("tfds", None, options, why="TensorFlow Datasets"), links
    return layouts.find(Path(what)), links


def _asked(arguments: argparse.Namespace) -> list[str]:
    """The arguments that a config file in the end stands for."""
    if arguments.config is not None:
        return [f"--config={arguments.config}", *arguments.changes]
    return [arguments.what]


def _bar(what: str, count: int) -> Callable[[], None]:
    """A progress line on a terminal, and nothing elsewhere."""
    from tqdm import tqdm

    bar = tqdm(total=count, desc=what, file=sys.stderr, disable=None, leave=False)

    def done() -> None:
        bar.update()
        if bar.n >= count:
            bar.close()

    return done
