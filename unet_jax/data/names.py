"""Files below a folder by a glob or a folder's name, each with the key it pairs by.

The key is the file's name without the ending, or what the wildcards of a glob stand
for: what an image and its mask have in common.
"""

import fnmatch
import functools
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from unet_jax.data import formats
from unet_jax.data.faults import Faults
from unet_jax.types import InputError


def by_key(
    base: Path,
    pattern: str,
    suffixes: Sequence[str],
    what: str,
    faults: Faults,
    option: str = "",
) -> dict[str, Path]:
    """The files that a pattern means, each by what it is paired by.

    Args:
        base: the folder that the pattern begins in.
        pattern: a folder, a file, or a glob.
        suffixes: the endings that count, in lower case.
        what: image or mask, for messages.
        faults: takes files of the same key.
        option: that gives the pattern, for messages; "" is ``what`` with an s.

    Returns:
        The stem, or what the last wildcards stand for, of each file.

    Raises:
        InputError: there is nothing, or no file of these endings.
    """
    place, option = base / pattern, option or f"{what}s"
    ends = tuple(suffixes)
    # Names are sorted as text, ten times as fast as paths are: there may be many.
    # Unlike pathlib's, these do not fail on a name that is too long.
    if os.path.isdir(place):
        base, keys = place, {}
        with formats.readable(str(place)), os.scandir(place) as entries:
            for entry in entries:
                name = entry.name
                if _ends(name, ends) and name[0] != "." and _file(entry.path):
                    keys[name] = _stem(name, suffixes)
    elif os.path.isfile(place):
        keys = {pattern: _stem(place.name, suffixes)} if _ends(pattern, ends) else {}
    elif glob.has_magic(pattern):
        found = glob.glob(pattern, root_dir=base, recursive=True)
        keys = {name: _wild(name, pattern) for name in found if _ends(name, ends)}
        keys = {name: key for name, key in keys.items() if _file(base / name)}
    else:
        raise InputError(
            f"{place} does not exist: put the {what}s there, or name another folder or "
            f"a glob below {base} in the option `{option}`."
        )
    files: dict[str, Path] = {}
    twice: set[str] = set()
    for name, key in sorted(keys.items()):
        if key in files:
            error = InputError(
                f"{files[key]} and {base / name} are both the {what} {key!r}: keep one "
                "of them, or tell them apart by a glob."
            )
            faults.add(error)
            twice.add(key)
        else:
            files[key] = base / name
    for key in twice:
        del files[key]
    if not files:
        raise nothing(place, base, suffixes, what, option)
    return files


def _stem(name: str, suffixes: Sequence[str]) -> str:
    # the longest first, so that a.nii.gz loses both endings
    for suffix in sorted(suffixes, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _wild(name: str, pattern: str) -> str:
    """What the wildcards of the pattern's last part that has any stand for."""
    names, parts = Path(name).parts, Path(pattern).parts
    for found, part in zip(reversed(names), reversed(parts), strict=False):
        if varies(part):
            return "".join(stands_for(found, part))
    return name


def first_wild(name: str, pattern: str) -> str:
    """What the wildcards of the pattern's first part that has any stand for.

    Without the last of several in a file's name, which tells the files of one image.
    """
    parts = Path(pattern).parts
    at = next((i for i, part in enumerate(parts) if varies(part)), None)
    if at is None:
        return name
    found = stands_for(Path(name).parts[at], parts[at])
    if at == len(parts) - 1 and len(found) > 1:
        found = found[:-1]
    return "".join(found)


def varies(part: str) -> bool:
    """Whether one part of a glob has a wildcard that stands for more than one text."""
    return _rule(part).groups > 0


def stands_for(found: str, part: str) -> tuple[str, ...]:
    """What each wildcard of one part of a glob stands for in a name; else the name."""
    match = _rule(part).fullmatch(found)
    return match.groups() if match else (found,)


@functools.lru_cache
def _rule(part: str) -> re.Pattern[str]:
    """One part of a glob as a regular expression with a group for each wildcard."""
    pieces = re.split(r"(\*+|\?|\[!?\]?[^\]]*\])", part)
    rule = "".join(
        _wildcard(p) if i % 2 else re.escape(p) for i, p in enumerate(pieces)
    )
    return re.compile(rule, re.DOTALL)


def _wildcard(piece: str) -> str:
    # A set of one character is how a glob writes that character: [[] or [*].
    if len(piece) == 3 and piece[0] == "[" and piece[1] != "!":
        return re.escape(piece[1])
    # A set may hold what means something else in a regular expression, or nothing.
    whole = fnmatch.translate(piece).removeprefix("(?s:")
    return f"({whole.rpartition(')')[0]})"


def _ends(name: str, ends: tuple[str, ...]) -> bool:
    return name.lower().endswith(ends)


def _file(path: str | Path) -> bool:
    """Whether it is a file, or a link to nothing, which is a fault and not nothing."""
    return os.path.isfile(path) or not os.path.exists(path)


def exists(base: Path, pattern: str) -> bool:
    """Whether there is anything that a pattern below the base means."""
    if glob.has_magic(pattern):
        return any(True for _ in glob.iglob(pattern, root_dir=base, recursive=True))
    return os.path.exists(base / pattern)


def nothing(
    place: Path, base: Path, suffixes: Sequence[str], what: str, option: str = ""
) -> InputError:
    """That a place holds no file of the endings, as an error; see `by_key`."""
    return InputError(
        f"{place} holds no {what}s: put {', '.join(suffixes)} files there, or name "
        f"another folder or a glob below {base} in the option `{option or what + 's'}`."
    )
