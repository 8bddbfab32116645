"""What a stranger's files may not do: lead out of their folder, or fill the memory.

Sources ask here before they follow a name that stands in a file, before they decode
what a header announces, and before they parse JSON.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unet_jax.types import InputError, size_text

MOST = 0.5  # part of the memory that one decoded file, or one JSON, may fill
# Parsed JSON takes about ten times its text: numbers and short lists are objects.
JSON_GROWS = 10


def memory() -> int:
    """Bytes of memory that this process can have: the machine's, or its container's."""
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("memory/memory.limit_in_bytes", "memory.max"):
        try:
            text = Path("/sys/fs/cgroup", limit).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            have = min(have, int(text))
    return have


def check_bytes(shape: Iterable[int], itemsize: int, name: str) -> None:
    """Refuses to decode what a header says to be larger than this machine can hold.

    Args:
        shape: of the decoded array, from the header.
        itemsize: bytes of a number.
        name: the file.

    Raises:
        InputError: a negative length, or more than half of the memory.
    """
    shape = tuple(int(n) for n in shape)
    size, most = math.prod(shape) * itemsize, int(memory() * MOST)
    if any(n < 0 for n in shape) or size > most:
        # A text header can hold lengths that are too long to print.
        shown = size_text(tuple(min(n, 2**64) for n in shape))
        raise InputError(
            f"{name} says that it holds {shown} numbers, {min(size, 2**99) / 2**30:.3g}"
            f" GB, and up to {most / 2**30:.3g} GB fit this machine: if that is so cut "
            "it into smaller files, else it is damaged and should be left out."
        )


def check_links(root: Path, paths: Iterable[Path], *, links: bool) -> None:
    """Refuses files that are links, or in linked folders, leading out of the root.

    Args:
        root: the folder everything should be under; it may be a link itself.
        paths: files below it.
        links: whether such links are allowed; then nothing is looked at.

    Raises:
        InputError: names the first.
    """
    if links:
        return
    real = os.path.realpath(root)
    within = real.rstrip(os.sep) + os.sep
    folders: dict[str, bool] = {}
    for path in paths:
        folder = os.path.dirname(path)
        if folder not in folders:
            folders[folder] = (os.path.realpath(folder) + os.sep).startswith(within)
        inside = folders[folder]
        if inside and os.path.islink(path):
            inside = os.path.realpath(path).startswith(within)
        if not inside:
            raise InputError(
                f"{path} leads to {os.path.realpath(path)}, out of {root}: copy it "
                "there, or set data.links=True if you know where it comes from."
            )


def named(root: Path, name: Any, where: str) -> Path:
    """The file below ``root`` that a name in another file stands for.

    Args:
        root: the folder that names are relative to.
        name: what the file says.
        where: the file and entry that says so, for messages.

    Raises:
        InputError: no name, an absolute one, or one that leads out of the root.
    """
    # Also as Windows would read it: a data set is made there as often as not.
    parts = re.split(r"[/\\]", name) if isinstance(name, str) else []
    below = [part for part in parts if part not in ("", ".")]
    if not below or not _writable(name):
        raise InputError(f"{where} names no file ({name!r:.80}): mend that entry.")
    if any(len(part.encode(errors="replace")) > 255 for part in parts):
        raise InputError(
            f"{where} names a file of more than 255 bytes: mend that entry."
        )
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or ".." in parts:
        raise InputError(
            f"{where} names the file {name!r:.120}, which leads out of {root}: write "
            "names below that folder."
        )
    return root.joinpath(*below)


def _writable(name: str) -> bool:
    """Whether a file system can have the name: JSON has characters that no name has."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def read_json(path: Path) -> Any:
    """What a JSON file holds; nothing in it is executed.

    Raises:
        InputError: missing, too large for the memory, not UTF-8, not JSON, or nested
            beyond what can be parsed.
    """
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise InputError(f"{path} is not a file: check the path.")
        size = info.st_size
        if size * JSON_GROWS > memory() * MOST:
            raise InputError(
                f"{path} has {size / 2**30:.1f} GB, and parsed would not fit this "
                "machine: part it into smaller files."
            )
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: check the path.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        why = "nested too deep" if isinstance(error, RecursionError) else error
        raise InputError(f"{path} is no JSON ({why}): mend it or save it anew.") from (
            error
        )
