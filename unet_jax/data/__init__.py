"""Where examples come from, and in which order: sources, one plan, batches.

``build`` opens the two parts of a data set that a run needs; ``batches.train_batches``
and ``batches.eval_batches`` turn them into batches. The sources themselves (``cells``,
``folder``, ``volumes``, ``ctc``, ``tfds``) are imported only when they are asked for.
"""

import dataclasses
import importlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import numpy as np

from unet_jax.data.ahead import endless
from unet_jax.data.batches import crop_reader, eval_batches, train_batches
from unet_jax.data.border import Bordered
from unet_jax.data.keeping import Mapped, Skipping, skipped
from unet_jax.data.plan import plan
from unet_jax.data.source import (
    Cached,
    Checked,
    Labelled,
    Resized,
    Source,
    Standardised,
)
from unet_jax.normalisation import KINDS
from unet_jax.types import Example, InputError, Shape, Task, choose

__all__ = [
    "Dataset",
    "Source",
    "build",
    "crop_reader",
    "endless",
    "eval_batches",
    "plan",
    "skipped",
    "train_batches",
]

# Up to so many examples are all read and checked when they are opened.
CHECK_AT_OPENING = 500
SOURCES = ("cells", "folder", "volumes", "ctc", "coco", "nnunet", "tfds")
FILES = ("folder", "volumes", "ctc", "coco", "nnunet")  # of which root is the folder
ON_ERROR = ("stop", "skip")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The data of a run: two sources whose examples fit one net.

    ``train``, ``evaluation``: examples as the task wants them, always with a weight.
    ``label_names``: of the K classes or labels that the net predicts.
    ``channels``, ``rank``, ``dtype``: of every image, as a source gives it out.
    """

    train: Source
    evaluation: Source
    task: Task
    label_names: tuple[str, ...]
    channels: int
    rank: int
    dtype: np.dtype


def build(
    *,
    source: str,
    train: str,
    evaluation: str,
    task: Task,
    root: str = "",
    normalisation: str = "auto",
    cache_mb: float = 500,
    cache_dir: str = "",
    on_error: str = "stop",
    links: bool = False,
    resize: Shape = (),
    share: tuple[int, int] = (0, 1),
    border: Mapping[str, Any] | None = None,
    cells: Mapping[str, Any] | None = None,
    folder: Mapping[str, Any] | None = None,
    volumes: Mapping[str, Any] | None = None,
    ctc: Mapping[str, Any] | None = None,
    coco: Mapping[str, Any] | None = None,
    nnunet: Mapping[str, Any] | None = None,
    tfds: Mapping[str, Any] | None = None,
) -> Dataset:
    """Opens the training and the evaluation part of a data set.

    Args:
        source: ``cells``, ``folder``, ``volumes``, ``ctc``, ``coco``, ``nnunet`` or
            ``tfds``.
        train, evaluation: splits (``data.split``), such as ``train[:80%]`` and
            ``train[80%:]``.
        task: ``classes`` or ``labels`` (the background is then no label).
        root: where the files are, of all sources that read some; the TFDS directory
            of ``tfds`` if its options name none; not used by ``cells``.
        normalisation: ``example`` gives every image mean 0 and standard deviation 1
            here, at loading; the others leave it as stored, for the compiled step.
        cache_mb: memory for decoded examples, in 2^20 bytes, training and evaluation
            together, shared by the number of examples; 0 keeps none.
        cache_dir: instead, a folder that they are kept in (`keeping.Mapped`), whatever
            their number: each is decoded once.
        on_error: what becomes of an example that cannot be read: ``stop`` raises the
            sentence that names it, ``skip`` lets it count nowhere (`keeping.Skipping`)
            or, found when the source is opened, leaves it out.
        links: whether files may be links that lead out of the root.
        resize: the spatial size that every example is brought to (`Resized`); () leaves
            them as they are.
        share: which process this is, of how many: each checks its part of the examples.
        border: options of `border.Bordered`, the paper's weight map. They need ``w0``,
            which turns it on unless it is 0. It changes weights and, at its gaps,
            labels of the training part; metrics count the truth as it is, so the
            evaluation part stays without.
        cells, folder, volumes, ctc, coco, nnunet, tfds: options of the source of that
            name. Those of the chosen source are passed to its ``open``, the others are
            not looked at.

    Returns:
        The data set. Up to `CHECK_AT_OPENING` examples have all been read and checked;
        of more, one of each part, and the others are checked when they are read.

    Raises:
        InputError: an unknown source, task or normalisation; parts that share examples
            or do not fit each other; and whatever the source finds wrong.
    """
    choose(SOURCES, source, "data.source =")
    choose(get_args(Task), task, "task =")
    choose(KINDS, normalisation, "data.normalisation =")
    choose(ON_ERROR, on_error, "data.on_error =")
    given = {
        "cells": cells,
        "folder": folder,
        "volumes": volumes,
        "ctc": ctc,
        "coco": coco,
        "nnunet": nnunet,
        "tfds": tfds,
    }
    options = dict(given[source] or {})
    if source in FILES:
        if not root:
            raise InputError(
                f"The source {source!r} needs a folder: give --config.data.root=DIR."
            )
        options |= {"root": _root(root), "links": links, "on_error": on_error}
    elif source == "tfds" and root and not options.get("data_dir"):
        options["data_dir"] = root
    module = importlib.import_module(f"unet_jax.data.{source}")
    parts = [module.open(split=split, **options) for split in (train, evaluation)]
    for part, split in zip(parts, (train, evaluation), strict=True):
        if len(part) == 0:
            raise InputError(
                f"The split {split!r} of the source {source!r} has no examples: check "
                "root and the split."
            )
    if train != evaluation:
        _check_apart(parts, (train, evaluation))
    names = _label_names(parts, (train, evaluation), source)
    like = parts[0][0] if on_error == "stop" else _first_readable(parts[0], train)
    first = like["image"]
    channels, rank = first.shape[-1], first.ndim - 1
    sources: list[Source] = [
        Checked(
            part,
            channels=channels,
            rank=rank,
            dtype=first.dtype,
            label_names=names,
        )
        for part in parts
    ]
    if resize:
        sources = [Resized(part, resize) for part in sources]
    if border:
        sources[0] = _bordered(sources[0], border)
    if normalisation == "example":
        sources = [Standardised(part) for part in sources]
    if cache_dir:
        sources = [Mapped(part, cache_dir) for part in sources]
    else:
        sources = list(_cache(sources, cache_mb))
    if on_error == "skip":
        like = _first_readable(sources[0], train)
        sources = [Skipping(part, like) for part in sources]
    parts = [Labelled(part, task=task) for part in sources]
    dtypes = {part[0]["image"].dtype for part in parts}
    # What is drawn cannot be bad, and to draw it takes longer than to read it.
    if source != "cells" and sum(map(len, parts)) <= CHECK_AT_OPENING:
        # A bad file of a small data set is found before the training and not in it.
        with ThreadPoolExecutor(4) as pool:
            for part in parts:

                def read(i: int, part: Source = part) -> None:
                    part[i]

                list(pool.map(read, range(share[0], len(part), share[1])))
    return Dataset(
        train=parts[0],
        evaluation=parts[1],
        task=task,
        label_names=parts[0].label_names,
        channels=channels,
        rank=rank,
        dtype=dtypes.pop(),
    )


def _root(root: str) -> str:
    """A folder's name without ``~``, where the system can look for it at all."""
    found = os.path.expanduser(root)
    try:
        os.stat(found)
    except FileNotFoundError:
        pass  # each source says what it has looked for
    except (OSError, ValueError) as error:
        raise InputError(
            f"data.root = {root!r:.120} cannot be read"
            f" ({getattr(error, 'strerror', None) or error}): check the path."
        ) from error
    if found.startswith("~"):
        raise InputError(f"data.root = {root!r:.120} names no user there is.")
    return found


def _first_readable(part: Source, split: str) -> Example:
    """The first example that can be read."""
    why = ""
    for i in range(len(part)):
        try:
            return part[i]
        except InputError as error:
            why = why or str(error)
    raise InputError(
        f"No example of the split {split!r} can be read. {why} With data.on_error=skip "
        "at least one must be whole."
    )


def _label_names(
    parts: Sequence[Source], splits: tuple[str, str], source: str
) -> tuple[str, ...]:
    """The names of both parts; of two lists that begin alike the longer one.

    A source that finds the classes in the files may not meet the last of them in a
    small evaluation part; their numbers are the same all the same.
    """
    shorter, longer = sorted((tuple(part.label_names) for part in parts), key=len)
    if longer[: len(shorter)] != shorter:
        raise InputError(
            f"The classes of {splits[0]!r} are {', '.join(parts[0].label_names)}, but "
            f"those of {splits[1]!r} are {', '.join(parts[1].label_names)}: name all "
            f"of them in data.{source}.label_names."
        )
    return longer


def _check_apart(parts: list[Source], splits: tuple[str, str]) -> None:
    """Refuses to evaluate on what is trained on, unless the splits say the same."""
    train, evaluation = ({part.name(i) for i in range(len(part))} for part in parts)
    shared = sorted(train & evaluation)
    if shared:
        raise InputError(
            f"The splits {splits[0]!r} and {splits[1]!r} share {len(shared)} examples,"
            f" {shared[0]} among them: part the list, as in data.train=train[:80%] and"
            " data.evaluation=train[80%:], or give the same split twice if you mean it."
        )


def _bordered(part: Source, options: Mapping[str, Any]) -> Source:
    """The part with its weight map, or as it is if the map is off."""
    if options.get("w0") is None:
        given = ", ".join(f"data.border.{key}" for key in options)
        raise InputError(
            f"{given} does nothing without data.border.w0: set it to 10 as the paper "
            "does, or to 0 for no weight map."
        )
    bordered = Bordered(part, **options)
    return bordered if options["w0"] else part


def _cache(parts: Sequence[Source], megabytes: float) -> Sequence[Source]:
    if megabytes <= 0:
        return parts
    share = len(parts[0]) / (len(parts[0]) + len(parts[1]))
    return [
        Cached(parts[0], megabytes * share),
        Cached(parts[1], megabytes * (1 - share)),
    ]
