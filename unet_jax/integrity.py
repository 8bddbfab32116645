"""Whether a checkpoint is still what was written.

When a checkpoint is complete, the size and the SHA-256 of each of its files are written
to ``workdir/sums/<step>.json``, beside orbax's folder and not in it. They are compared
before it is used. One without sums, of an older version or of a run killed in between,
is whole if all of it can be read; a changed number inside an array is then not noticed.

One that is replaced by another of the same step stays where it is until that one is
complete in ``workdir/checkpoints/again``, which is laid out like a workdir.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from unet_jax.log import replace_file
from unet_jax.types import InputError

CHECKPOINTS = "checkpoints"
SUMS = "sums"
DAMAGED = "damaged"
AGAIN = "again"
_OLD = "old"  # in AGAIN: the checkpoint that makes room, from then on it is the old one
# Smaller files are always read: orbax's JSON is, arrays mostly are not.
SMALL = 1 << 16
# Seconds for which a checkpoint that was read and found whole counts as such, while its
# files look as they did: who starts a run asks several times.
REMEMBERED = 600.0
_Looks = tuple[tuple[str, int, int, int, int], ...]
_whole: dict[Path, tuple[_Looks, float]] = {}


class Sums(NamedTuple):
    """What a checkpoint was when it was complete.

    Attributes:
        step: Its step; a folder that got another name is not this one.
        score: What decides which checkpoint is the best.
        files: Size and SHA-256 of each file, by its path in the folder.
    """

    step: int
    score: float
    files: dict[str, tuple[int, str]]


def folder_of(workdir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return workdir / CHECKPOINTS / str(step)


def _sums_file(workdir: Path, step: int) -> Path:
    return workdir / SUMS / f"{step}.json"


def steps_in(workdir: Path) -> list[int]:
    """The steps that have a checkpoint, damaged or not, in rising order.

    That is all in ``checkpoints`` that has a step's name. What is not finished, and
    what is no checkpoint at all, has another.
    """
    try:
        names = os.listdir(workdir / CHECKPOINTS)
    except (FileNotFoundError, NotADirectoryError):
        return []
    decimal = (name for name in names if name.isascii() and name.isdecimal())
    return sorted(int(name) for name in decimal if str(int(name)) == name)


def again_of(workdir: Path) -> Path:
    """Where a checkpoint is made that replaces another of its step; like a workdir."""
    return workdir / CHECKPOINTS / AGAIN


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def record(workdir: Path, step: int, score: float) -> None:
    """Writes the sums of a complete checkpoint, whole or not at all.

    Args:
        workdir: The run's folder.
        step: Which checkpoint.
        score: Of it.

    Raises:
        InputError: The disk is full.
        OSError: A file cannot be read or written.
    """
    folder = folder_of(workdir, step)
    files = {
        path.relative_to(folder).as_posix(): (path.stat().st_size, _digest(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {"step": step, "score": score, "files": files}
    own = hashlib.sha256(_canonical(content)).hexdigest()
    text = json.dumps({**content, "sha256": own}, indent=1) + "\n"
    replace_file(_sums_file(workdir, step), text.encode())


def sums_of(workdir: Path, step: int) -> Sums | None:
    """The sums of a checkpoint; None where there are none, or they are damaged."""
    try:
        content = json.loads(_sums_file(workdir, step).read_bytes())
        own = content.pop("sha256")
        if own != hashlib.sha256(_canonical(content)).hexdigest():
            return None
        files = {name: (size, sum_) for name, (size, sum_) in content["files"].items()}
        found = Sums(content["step"], float(content["score"]), files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return found if found.step == step else None


def forget(workdir: Path) -> None:
    """Removes the sums of checkpoints that are no longer there."""
    kept = {f"{step}.json" for step in steps_in(workdir)}
    for path in (workdir / SUMS).glob("*.json*"):
        if path.name not in kept:
            path.unlink(missing_ok=True)


def score_of(workdir: Path, step: int) -> float | None:
    """The score of a checkpoint; None where it cannot be known any more."""
    if sums := sums_of(workdir, step):
        return sums.score
    path = folder_of(workdir, step) / "metrics" / "metrics"
    try:
        score = float(json.loads(path.read_bytes())["score"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return None if math.isnan(score) else score


def damage(workdir: Path, step: int, *, whole: bool = True) -> str | None:
    """What is wrong with a checkpoint; None if nothing is.

    Args:
        workdir: The run's folder.
        step: Which checkpoint.
        whole: Look at all of it; else, where there are sums, at the sizes of the files
            and into the small ones.

    Returns:
        Part of a sentence that names the file.

    Raises:
        InputError: A file may not be read.
    """
    folder = folder_of(workdir, step)
    if not folder.is_dir():
        return f"{CHECKPOINTS}/{step} is no folder"
    key, now, looks = folder.absolute(), time.monotonic(), _looks(workdir, step)
    known, since = _whole.get(key, (None, now))
    if looks is not None and known == looks and now - since < REMEMBERED:
        return None
    try:
        if sums := sums_of(workdir, step):
            bad = _changed(folder, sums, whole=whole)
        else:
            whole, bad = True, _unreadable(folder, step)
    except PermissionError as error:
        raise InputError(
            f"{error.filename or folder} may not be read ({error.strerror}): give"
            " yourself the right to, or use another user's account."
        ) from error
    if whole and bad is None and looks is not None:
        _whole[key] = looks, now
    return bad


def _looks(workdir: Path, step: int) -> _Looks | None:
    """What can be told of all files of a checkpoint, and of its sums, unread.

    None where not even that can be.
    """
    folder, sums = folder_of(workdir, step), _sums_file(workdir, step)
    try:
        found = [(path, path.stat()) for path in sorted(folder.rglob("*"))]
        found += [(path, path.stat()) for path in (sums,) if path.exists()]
    except OSError:
        return None
    return tuple(
        (str(path), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)
        for path, s in found
    )


def _changed(folder: Path, sums: Sums, *, whole: bool) -> str | None:
    """The first file that is not what it was."""
    for name, (size, own) in sorted(sums.files.items()):
        path, shown = folder / name, f"{CHECKPOINTS}/{folder.name}/{name}"
        try:
            found = path.stat().st_size
            if found != size:
                return f"{shown}: {found} bytes of {size}"
            if (whole or size <= SMALL) and _digest(path) != own:
                return f"{shown}: its content changed"
        except (FileNotFoundError, NotADirectoryError):
            return f"{shown}: it is missing"
        except PermissionError:
            raise
        except OSError as error:
            return f"{shown}: {error.strerror}"
    return None


def _unreadable(folder: Path, step: int) -> str | None:
    """The first item that cannot be read, of a checkpoint without sums."""
    at = f"{CHECKPOINTS}/{folder.name}"
    name = "_CHECKPOINT_METADATA"
    try:
        handlers = json.loads((folder / name).read_bytes())["item_handlers"]
        for item, handler in sorted(handlers.items()):
            name = item
            if "json" in str(handler).lower():
                # orbax calls the file of a JSON item metadata, and that of the scores
                # metrics.
                file = "metrics" if item == "metrics" else "metadata"
                name = f"{item}/{file}"
                if not isinstance(json.loads((folder / name).read_bytes()), dict):
                    return f"{at}/{name}: it is no JSON object"
                continue
            for array, found in _arrays(folder / item):
                if (item, array) == ("training", "step") and found != step:
                    return f"{at}: it holds step {found}"
    except (MemoryError, PermissionError):
        raise
    # orbax and tensorstore raise errors of any type for files that are damaged.
    except Exception as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return f"{at}/{name}: a file is missing"
        text = " ".join(str(error).split())
        why = f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__
        return f"{at}/{name}: it cannot be read, {why}"
    if "variables" not in handlers or "meta" not in handlers:
        return f"{at}: it holds no net"
    return None


def _arrays(folder: Path) -> Iterator[tuple[str, Any]]:
    """The arrays of an item, each with its name, one after the other on the host.

    Orbax is only asked what there is, and last: it reads all at once, and leaves some
    to be read after the first has failed.
    """
    import orbax.checkpoint as ocp
    import tensorstore as ts

    about = (folder / "_METADATA", folder / "_sharding")
    for path in (*about, *folder.glob("array_metadatas/*")):
        json.loads(path.read_bytes())
    base = {"driver": "file", "path": f"{folder.absolute()}/"}
    kvstore = {"driver": "ocdbt", "base": base}
    keys = ts.KvStore.open(kvstore).result().list().result()
    drivers = {"zarr": b"/.zarray", "zarr3": b"/zarr.json"}
    for driver, end in drivers.items():
        for name in (key[: -len(end)].decode() for key in keys if key.endswith(end)):
            spec = {"driver": driver, "kvstore": {**kvstore, "path": name}}
            yield name, ts.open(spec).result().read().result()
    there: Any = folder  # orbax has a type of its own for paths, and takes any
    ocp.PyTreeCheckpointHandler().metadata(there)


def set_aside(workdir: Path, step: int) -> Path:
    """Moves a damaged checkpoint out of the way, with its sums.

    Returns:
        Where it is now, ``damaged/<step>`` or with a number more.

    Raises:
        InputError: It cannot be moved.
    """
    target = workdir / DAMAGED / str(step)
    more = 1
    while os.path.lexists(target):
        more += 1
        target = workdir / DAMAGED / f"{step}_{more}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder_of(workdir, step), target)
        if (sums := _sums_file(workdir, step)).is_file():
            shutil.move(sums, target.with_name(f"{target.name}.json"))
    except OSError as error:
        raise InputError(
            f"the damaged checkpoint {folder_of(workdir, step)} cannot be moved to"
            f" {target} ({error.strerror}): move it away by hand."
        ) from error
    return target


def replace(workdir: Path, step: int) -> None:
    """Puts the checkpoint made in `again_of` in the place of the one of its step.

    Whenever that is interrupted, `settle` ends it.

    Args:
        workdir: The run's folder.
        step: Of both; the new one is complete and has its sums.

    Raises:
        InputError: It cannot be moved, or the disk is full.
    """
    try:
        folder_of(workdir, step).rename(again_of(workdir) / _OLD)
    except OSError as error:
        raise _not_replaced(workdir, error) from error
    settle(workdir)


def settle(workdir: Path) -> None:
    """Ends what a run left of replacing a checkpoint: goes on with it, or drops it.

    Raises:
        InputError: Something cannot be moved, or the disk is full.
    """
    again = again_of(workdir)
    old = again / _OLD
    try:
        if os.path.lexists(old):
            for sums in (again / SUMS).glob("*.json"):
                step = int(sums.stem)
                # Without sums a checkpoint is read; with another's it is damaged.
                _sums_file(workdir, step).unlink(missing_ok=True)
                if (made := folder_of(again, step)).exists():
                    made.rename(folder_of(workdir, step))
                replace_file(_sums_file(workdir, step), sums.read_bytes())
            old.rename(again / "done")
        if again.exists():
            shutil.rmtree(again)
    except OSError as error:
        raise _not_replaced(workdir, error) from error


def _not_replaced(workdir: Path, error: OSError) -> InputError:
    return InputError(
        f"{error.filename or again_of(workdir)} cannot be moved or removed"
        f" ({error.strerror}), and a checkpoint of {workdir} could not be replaced:"
        " mend that and run the same command again."
    )
