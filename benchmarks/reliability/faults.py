"""What can happen to the newest checkpoint of a run, each as a function that does it.

    for fault in FAULTS:
        fault.inflict(workdir / "checkpoints" / "300")

The workdir must have three checkpoints or more, each with its sums. Afterwards a run
goes on from the newest checkpoint but `Fault.lost`, and everything else is untouched.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    """Something that happens to files.

    Attributes:
        name: Of a test.
        inflict: Is given the folder of the newest checkpoint.
        lost: How many checkpoints are damaged by it, from the newest on.
    """

    name: str
    inflict: Callable[[Path], object]
    lost: int = 1


# One of each kind of file that a checkpoint has, as patterns below its folder.
KINDS = {
    "the step's metadata": "_CHECKPOINT_METADATA",
    "the step's commit": "commit_success.txt",
    "the net's description": "meta/metadata",
    "the score": "metrics/metrics",
    "the item's commit": "variables/commit_success.txt",
    "the tree": "variables/_METADATA",
    "the sharding": "variables/_sharding",
    "the arrays' metadata": "variables/array_metadatas/process_0",
    "the manifest": "variables/manifest.ocdbt",
    "the index": "variables/d/*",
    "the process's manifest": "variables/ocdbt.process_0/manifest.ocdbt",
    "the arrays": "variables/ocdbt.process_0/d/*",
    "the average's arrays": "ema/ocdbt.process_0/d/*",
    "the optimizer's tree": "training/_METADATA",
    "the optimizer's arrays": "training/ocdbt.process_0/d/*",
}


def largest(folder: Path, pattern: str) -> Path:
    """The largest file that fits a pattern, of equal ones the first by name."""
    found = sorted(path for path in folder.glob(pattern) if path.is_file())
    return max(found, key=lambda path: path.stat().st_size)


def empty(file: Path) -> None:
    """Cuts a file to nothing."""
    file.write_bytes(b"")


def halve(file: Path) -> None:
    """Cuts a file to its first half."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    """Changes all bits of the byte in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def append(file: Path) -> None:
    """Adds bytes at the end of a file."""
    file.write_bytes(file.read_bytes() + bytes(7))


def delete(file: Path) -> None:
    """Removes a file."""
    file.unlink()


def swap(folder: Path) -> None:
    """Exchanges the two newest checkpoints."""
    other, away = before(folder), folder.with_name("away")
    folder.rename(away)
    other.rename(folder)
    away.rename(other)


def before(folder: Path) -> Path:
    """The folder of the checkpoint before one."""
    steps = [int(path.name) for path in folder.parent.iterdir() if path.name.isdigit()]
    return folder.with_name(str(max(step for step in steps if step < int(folder.name))))


def sums(folder: Path) -> Path:
    """The file with the sums of a checkpoint."""
    return folder.parents[1] / "sums" / f"{folder.name}.json"


def _to_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"no folder")


def _cleared(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _without_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


def _half_copied(folder: Path) -> None:
    for path in sorted(p for p in folder.rglob("*") if p.is_file())[1::2]:
        path.unlink()


def _renamed(folder: Path, name: str) -> None:
    folder.rename(folder.with_name(name))


def _copied(folder: Path, name: str) -> None:
    shutil.copytree(folder, folder.with_name(name))


def _two(folder: Path) -> None:
    flip(largest(folder, KINDS["the arrays"]))
    empty(largest(before(folder), KINDS["the manifest"]))


def _nested(folder: Path) -> None:
    inner = folder / folder.name
    inner.mkdir()
    for path in folder.iterdir():
        if path != inner:
            path.rename(inner / path.name)


def _file_for_item(folder: Path) -> None:
    shutil.rmtree(folder / "variables")
    (folder / "variables").write_bytes(b"no folder")


def _unfinished(folder: Path) -> None:
    _copied(folder, f"{int(folder.name) + 100}.orbax-checkpoint-tmp-0")


def _note(folder: Path) -> None:
    folder.with_name("notes.txt").write_text("300 is the good one")


_WAYS = {
    "emptied": empty,
    "halved": halve,
    "changed": flip,
    "lengthened": append,
    "deleted": delete,
}
_ON_FILES = [
    Fault(f"{kind} {done}", lambda d, p=pattern, way=way: way(largest(d, p)))
    for kind, pattern in KINDS.items()
    for done, way in _WAYS.items()
]
ON_FILES = len(_ON_FILES)
"""so many of the faults, the first, befall one file"""

FAULTS: list[Fault] = [
    *_ON_FILES,
    *(
        Fault(f"{item} deleted", lambda d, item=item: shutil.rmtree(d / item))
        for item in ("variables", "ema", "training", "meta", "metrics")
    ),
    Fault("an item is a file", _file_for_item),
    Fault("the folder emptied", _cleared),
    Fault("the folder without files", _without_files),
    Fault("the folder half copied", _half_copied),
    Fault("the folder inside itself", _nested),
    Fault("the folder a file", _to_file),
    Fault("the folder deleted", shutil.rmtree),
    Fault("the folder with a later number", partial(_renamed, name="400")),
    Fault("the folder with an earlier number", partial(_renamed, name="150")),
    Fault("the folder with another name", partial(_renamed, name="300 copy")),
    Fault("two exchanged", swap, lost=2),
    Fault("two damaged", _two, lost=2),
    Fault("sums emptied", lambda d: empty(sums(d)), lost=0),
    Fault("sums halved", lambda d: halve(sums(d)), lost=0),
    Fault("sums changed", lambda d: flip(sums(d)), lost=0),
    Fault("sums deleted", lambda d: delete(sums(d)), lost=0),
    Fault("all sums deleted", lambda d: shutil.rmtree(sums(d).parent), lost=0),
    Fault("sums of another step", lambda d: shutil.copy(sums(before(d)), sums(d)), 0),
    Fault("an unfinished save", _unfinished, lost=0),
    Fault("a foreign file", _note, lost=0),
    Fault("a foreign folder", lambda d: d.with_name("abc").mkdir(), lost=0),
    Fault("a copy of another name", partial(_copied, name="300 copy"), lost=0),
    Fault("a copy of a padded number", partial(_copied, name="0300"), lost=0),
    Fault("a foreign file in it", lambda d: (d / "notes.txt").write_text("x"), lost=0),
    Fault("an empty later folder", lambda d: d.with_name("400").mkdir(), lost=0),
    Fault("a later file", lambda d: d.with_name("400").write_text("x"), lost=0),
    Fault("a copy of a later number", partial(_copied, name="400"), lost=0),
]
