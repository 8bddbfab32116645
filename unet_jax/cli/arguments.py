"""What several commands share: their flags, and how flags and configs are read."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any


def add_workdir(command: argparse.ArgumentParser, *, several: bool = False) -> None:
    """The flags that name a workdir, or several for an ensemble, and a checkpoint."""
    add = command.add_argument
    more = "; several, with commas between them, are averaged" if several else ""
    add("--workdir", required=True, metavar="DIR", help=f"where train.py wrote{more}")
    add(
        "--which",
        type=which,
        default="best",
        help="checkpoint: best, latest or a step (best)",
    )


def workdirs(text: str) -> list[str]:
    """``a,b`` as two workdirs; a folder whose name has a comma as itself.

    A workdir of folds or seeds is as many as there are.
    """
    from unet_jax.checkpoint import members_of

    named = (
        [text] if os.path.isdir(text) else [part for part in text.split(",") if part]
    )
    return [os.fspath(path) for name in named for path in members_of(name)]


def add_tiles(command: argparse.ArgumentParser) -> None:
    """The flags that say how an image goes through a net: tiles, views of it."""
    add = command.add_argument
    add(
        "--tile",
        type=int,
        default=0,
        metavar="PIXELS",
        help="work through images in tiles of this size (0: never)",
    )
    add(
        "--blend",
        default="gaussian",
        metavar="WAY",
        help="how tiles are joined: gaussian, linear, or exact: what the whole image"
        " would give (gaussian)",
    )
    add(
        "--overlap",
        type=float,
        default=0.5,
        metavar="PART",
        help="part of a tile that overlaps the next, from 0 to below 1 (0.5)",
    )
    add(
        "--tta",
        default="none",
        metavar="VIEWS",
        help="average over views of the image: flips, symmetries or rotations (none)",
    )


def tile_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What those flags are for `unet_jax.Predictor`."""
    names = ("tile", "blend", "overlap", "tta")
    return {name: getattr(arguments, name) for name in names}


def tiled(arguments: argparse.Namespace) -> bool:
    """Whether they ask for anything but the whole image once."""
    return arguments.tile != 0 or arguments.tta != "none"


def add_mesh(command: argparse.ArgumentParser) -> None:
    """The flag that says which devices share the work."""
    command.add_argument(
        "--mesh",
        default="",
        metavar="DATAxSPACE",
        help="split every image (or tile) over SPACE devices, and a batch of them over"
        " DATA times as many: 1x8 for one image that no device has the memory for (the"
        " first device alone)",
    )


def mesh(arguments: argparse.Namespace) -> Any:
    """The mesh of ``--mesh``, or None where it is not given."""
    import re

    import jax

    from unet_jax import sharding
    from unet_jax.types import InputError

    if not arguments.mesh:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", arguments.mesh)
    if not match:
        raise InputError(
            f"--mesh={arguments.mesh} must be two numbers of devices, DATAxSPACE, such"
            " as 1x8."
        )
    data, space, there = int(match[1]), int(match[2]), len(jax.devices())
    if not 1 <= data * space <= there:
        raise InputError(
            f"--mesh={arguments.mesh} needs {data * space} devices, but there are"
            f" {there}: use --mesh=1x{there}, or less."
        )
    return sharding.make_mesh(data, space)


def add_split(command: argparse.ArgumentParser) -> None:
    """The flags that name the data to measure on."""
    add = command.add_argument
    add(
        "--split",
        default="evaluation",
        help="evaluation or train, as in the run's config, or a split such as test or"
        " 'train[:20%%]' (evaluation)",
    )
    add("--config", metavar="FILE", help="a config of train.py: other data and loss")
    add("--root", metavar="DIR", help="where the data is now, if it has moved")
    add(
        "--empty",
        default="skip",
        choices=("skip", "one", "zero"),
        help="what the score of a class is where it is neither in the truth nor in the"
        " prediction: left out, 1 or 0 (skip)",
    )
    add("--batch_size", type=int, default=0, metavar="N", help="images run together")


def which(text: str) -> str:
    """A checkpoint, as argparse reads its flag."""
    if text not in ("best", "latest") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not best, latest or a step")
    return text


def one_line(error: Exception) -> str:
    """What an error says, on one line that no file's name can break, nor colour."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))


def literal(text: str) -> Any:
    """What Python reads a text as, else the text."""
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def config(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The config of ``--config=FILE`` with its ``--config.KEY=VALUE``, or None."""
    if arguments.config is None:
        return None
    return read_config(arguments.config, arguments.changes)


def load(path: str) -> Any:
    """The ConfigDict that a config file's ``get_config()`` returns.

    Raises:
        InputError: No such file, or it does not do that; names the line at fault.
    """
    import runpy
    from pathlib import Path

    from unet_jax.types import InputError

    file = Path(path)
    if not file.is_file():
        raise InputError(f"there is no config {path}: give a file like configs/x.py.")
    # As train.py is started: a config may import others beside it, and from anywhere
    # those of the project.
    places = [str(file.absolute().parent.parent), str(Path(__file__).parents[2])]
    before = list(sys.path)
    sys.path[:0] = places
    try:
        names = runpy.run_path(str(file))
        if "get_config" not in names:
            raise InputError(
                f"the config {path} has no function get_config: write it as"
                " configs/default.py has it."
            )
        config = names["get_config"]()
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(
            f"the config {path} does not work ({_reason(error, str(file))}): mend it."
        ) from error
    finally:
        sys.path[:] = before
    # The package does not know configs, nor what they are made with.
    if not hasattr(config, "update_from_flattened_dict"):
        raise InputError(
            f"get_config of {path} returns {config!r:.60} and no ConfigDict: end it"
            " with `return config`, as in configs/default.py."
        )
    return config


def _reason(error: BaseException, file: str) -> str:
    """What went wrong in a file of Python, and in which of its lines."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    text = str(error)
    if isinstance(error, SyntaxError):
        text = error.msg
        lines = [error.lineno] if error.filename == file else lines
    text = " ".join(text.split())
    where = f"line {lines[-1]}: " if lines and lines[-1] else ""
    return f"{where}{type(error).__name__}: {text:.200}"


def read_config(path: str, changes: Sequence[str] = ()) -> dict[str, Any]:
    """A config file of train.py as plain data, without the keys that are None.

    Args:
        path: The file.
        changes: ``--config.KEY=VALUE``.
    """
    import re

    from unet_jax.types import InputError

    config = load(path)
    config.lock()  # so that a key which is not there is refused
    for text in changes:
        key, _, value = text.removeprefix("--config.").partition("=")
        try:
            config.update_from_flattened_dict({key: literal(value)})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            why = re.sub(" and cannot be added.*}", "", str(error), flags=re.DOTALL)
            why = re.sub(r"[\s'\"\\]+", " ", why.replace("\\n", " ")).strip()
            raise InputError(f"{text} does not change {path}: {why}") from error

    def chosen(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: chosen(v) for k, v in value.items() if v is not None}

    return chosen(config.to_dict())


def say_devices(file: Any) -> None:
    """The first line: which backend, which device, how many.

    Of a command that will compile, so that its programs are kept from here on.
    """
    import jax

    from unet_jax import programs

    programs.keep()
    kind, count = jax.devices()[0].device_kind, len(jax.devices())
    print(f"{jax.default_backend()}: {kind}, {count} device(s)", file=file, flush=True)
