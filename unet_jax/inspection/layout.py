"""How a data set lies in its files: what a rule finds and all later steps read."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unet_jax.data.images import SUFFIXES as FLAT
from unet_jax.data.stacks import NIFTI
from unet_jax.types import InputError

SUFFIXES = (*FLAT, *NIFTI)
TRAIN, EVALUATION = "train[:80%]", "train[80%:]"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A data set as `unet_jax.data.build` would be told of it.

    ``source``: ``folder``, ``volumes``, ``ctc``, ``coco``, ``nnunet``, ``cells`` or
        ``tfds``.
    ``root``: the folder everything is under; None where there is none.
    ``options``: of the source's ``open``, less root and split.
    ``train``, ``evaluation``: splits.
    ``why``: what it was recognised by.
    ``notes``: what a reader should know of it, a sentence each.
    """

    source: str
    root: Path | None
    options: Mapping[str, Any]
    train: str = TRAIN
    evaluation: str = EVALUATION
    why: str = ""
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def listable() -> Iterator[None]:
    """Turns a folder that cannot be listed inside the block into one sentence."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be listed ({error.strerror}): check its"
            " permissions."
        ) from error


def suffix_of(name: str) -> str:
    """The ending of a name that can be read, in lower case: ``.nii.gz``; else ""."""
    lower = name.lower()
    found = [suffix for suffix in SUFFIXES if lower.endswith(suffix)]
    return max(found, key=len, default="")


def stem_of(name: str) -> str:
    """A file's name without that ending."""
    return name[: len(name) - len(suffix_of(name))]


def files_in(place: Path) -> list[Path]:
    """The files of a folder that can be read, sorted by name; hidden ones left out."""
    return sorted(
        path
        for path in place.iterdir()
        if not path.name.startswith(".") and suffix_of(path.name) and path.is_file()
    )


def folders_in(place: Path) -> list[Path]:
    """The folders in a folder, sorted by name; hidden ones left out."""
    return sorted(
        path
        for path in place.iterdir()
        if not path.name.startswith((".", "__")) and path.is_dir()
    )
