"""Nets from PyTorch as workdirs, and workdirs as files for PyTorch.

`workdir` writes what predict, evaluate and ``model.weights`` of train.py take; `file`
goes back, under the names and in the type that the weights came in.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unet_jax import data, models, normalisation, torch_weights, transfer
from unet_jax.checkpoint import Checkpoints, Meta, load_for_inference
from unet_jax.models import UNet
from unet_jax.report import count_parameters
from unet_jax.torch_weights import FAMILIES, Imported, writing
from unet_jax.torch_weights.family import listed
from unet_jax.types import InputError, Task, choose

DTYPES = ("float32", "float16", "bfloat16", "float64")


# --- What a file holds ---------------------------------------------------------------


def summary(found: Imported, where: str | os.PathLike[str]) -> str:
    """What was found in a file of weights, as a few lines.

    Args:
        found: Of `unet_jax.torch_weights.read`.
        where: The file.
    """
    usual = models.fields(UNet(num_classes=found.model.num_classes))
    own = {k: v for k, v in models.fields(found.model).items() if v != usual[k]}
    fields = ", ".join(f"{k} = {v!r}" for k, v in own.items())
    count = sum(count_parameters(found.variables["params"]).values())
    title = FAMILIES[found.family].title if found.family else "by a table of names"
    lines = [
        f"{os.fspath(where)}: {found.family}: {title}",
        f"net: unet with num_classes = {found.model.num_classes}"
        + (f", {fields}" if fields else ""),
        f"{count:,} parameters, {found.dtype}; for {found.rank}-D images of"
        f" {found.channels} channel(s)",
    ]
    known, usual = models.fields(found.model), {}
    if found.family:
        usual = FAMILIES[found.family].options
    taken = [f"{k} = {v!r}" for k, v in usual.items() if known.get(k, v) == v]
    if taken:
        lines.append(
            f"taken, as the weights do not say: {', '.join(taken)} (--option=KEY=VALUE)"
        )
    if found.dropped:
        lines.append(f"in the file and not needed: {listed(found.dropped)}")
    if found.dtype == "float64":
        lines.append("note: the weights are kept in float32, half of their digits")
    return "\n".join(lines)


def label_names(task: Task, count: int) -> tuple[str, ...]:
    """Names for classes or labels of which nothing is known, as data sources make them.

    Args:
        task: ``classes``: the first is the background. ``labels``: there is none.
        count: How many.
    """
    if task == "classes" and count == 2:
        return ("background", "foreground")
    if task == "labels":
        return (
            tuple(f"class_{i + 1}" for i in range(count))
            if count > 1
            else ("foreground",)
        )
    return ("background", *(f"class_{i}" for i in range(1, count)))


def parse_classes(text: str) -> int | tuple[str, ...]:
    """``3``, or ``background,cell`` -> a number of classes, or their names.

    Raises:
        InputError: Neither.
    """
    if text.strip().isdecimal() and int(text) > 0:
        return int(text)
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names) or text.lstrip("-").isdecimal():
        raise InputError(
            f"--classes={text} must be a number, or names with commas between them,"
            " each once: background,cell."
        )
    return names


# --- In ------------------------------------------------------------------------------


def meta_of(
    found: Imported,
    source: str | os.PathLike[str],
    *,
    classes: int | Sequence[str] | None = None,
    task: str | None = None,
    kind: str | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    config: Mapping[str, Any] | None = None,
) -> Meta:
    """What the checkpoint of a net from PyTorch says about it.

    Args:
        found: Of `unet_jax.torch_weights.read`.
        source: The file.
        classes: The names of its classes or labels, or how many; None: as many as it
            has. Of another number, `workdir` starts the heads anew.
        task: ``classes`` or ``labels``; None: labels for one class, or where the family
            ends in a sigmoid.
        kind: Of `unet_jax.normalisation.KINDS`; ``standard`` without mean is measured
            on the config's training split.
        mean: Of pixels in 0..1, a number for each channel or one for all.
        std: Their deviation, likewise.
        config: Of train.py, whose data and loss ``unet-jax evaluate`` then takes.

    Raises:
        InputError: What does not go together.
    """
    names = () if classes is None or isinstance(classes, int) else tuple(classes)
    count = found.model.num_classes
    if classes is not None:
        count = classes if isinstance(classes, int) else len(names)
    sigmoid = found.family in FAMILIES and FAMILIES[found.family].sigmoid
    task = task or ("labels" if sigmoid or count == 1 else "classes")
    kept: Task = "labels" if task == "labels" else "classes"
    choose(("classes", "labels"), task, "--task =")
    if task == "classes" and count == 1:
        raise InputError(
            "--task=classes needs two classes or more, and the net has 1: use labels."
        )
    if kind == "standard" and not mean and config is not None:
        train = data.build(task=kept, **config["data"]).train
        images = (train[i]["image"] for i in range(len(train)))
        stats = normalisation.measure(kind, images)
        if len(stats["shift"]) != found.channels:
            raise InputError(
                f"the data of the config has {len(stats['shift'])} channel(s) and the"
                f" net {found.channels}: give other data, or --mean and --std."
            )
    else:
        stats = normalisation.stated(kind, found.channels, mean=mean, std=std)
    fields = models.fields(transfer.with_classes(found.model, count))
    model = {"name": "unet", **fields}
    return Meta(
        model=model,
        task=kept,
        label_names=names or label_names(kept, count),
        normalisation=stats,
        channels=found.channels,
        rank=found.rank,
        config={**config, "model": model} if config else {},
        torch=transfer.origin(found, source),
    )


def workdir(
    found: Imported, meta: Meta, out: str | os.PathLike[str], *, seed: int = 0
) -> list[str]:
    """Writes a net from PyTorch as a workdir, at step 0.

    Args:
        found: Of `unet_jax.torch_weights.read`.
        meta: Of `meta_of`; of another number of classes, the heads start anew.
        out: The folder; it must be empty or not there.
        seed: Of what starts anew.

    Returns:
        The paths of the modules that start anew.

    Raises:
        InputError: There is something already, or no room for it.
    """
    folder = check_free(out)
    image = {"channels": meta.channels, "rank": meta.rank}
    model, variables, anew = meta.build_model(), found.variables, []
    if model.num_classes != found.model.num_classes:
        taken, anew = transfer.fitting(model, variables, **image)
        variables = transfer.completed(model, taken, **image, seed=seed)
    with _whole(folder) as unfinished, Checkpoints(unfinished) as checkpoints:
        checkpoints.save_variables(0, variables, meta)
        checkpoints.wait()
    return anew


def check_free(out: str | os.PathLike[str]) -> Path:
    """The folder to write to.

    Raises:
        InputError: There is something in it.
    """
    folder = Path(out)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} is already there: give another --out.")
    if folder.suffix in (".safetensors", ".pth", ".pt"):
        raise InputError(
            f"--out={folder} is the name of a file, and weights from PyTorch become a"
            " workdir: give a folder."
        )
    return folder


def written(
    found: Imported, meta: Meta, out: str | os.PathLike[str], anew: Sequence[str]
) -> str:
    """What a new workdir is and what can be done with it, as a few lines.

    Args:
        found: Of `unet_jax.torch_weights.read`.
        meta: Of `meta_of`.
        out: The workdir.
        anew: What `workdir` says starts anew.
    """
    stats, where = meta.normalisation, os.fspath(out)
    lines = [f"{meta.task}: {', '.join(meta.label_names)}"]
    if anew:
        lines.append(
            f"{listed(anew)} starts anew, for {len(meta.label_names)} class(es) instead"
            f" of {found.model.num_classes}: train it before you predict"
        )
    pixels = {
        "range": "white is 1, floats as they are",
        "example": "each image by its own mean and deviation",
        "standard": "less the mean, by the deviation",
    }
    lines += [
        f"normalisation: {stats['kind']} ({pixels[stats['kind']]})",
        f"{where} is written; what it is good for:",
        f"  unet-jax predict --workdir={where} IMAGES --out=DIR",
        f"  unet-jax evaluate --workdir={where}"
        + ("" if meta.config else " --config=CONFIG"),
        f"  python train.py --config=CONFIG --config.model.weights={where}"
        " --workdir=DIR",
        f"  unet-jax convert {where} --out=back.safetensors",
    ]
    return "\n".join(lines)


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder beside another, which it becomes once everything has gone well."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(
            tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.")
        )
    except OSError as error:
        raise InputError(
            f"{folder} cannot be made ({error.strerror}): use another --out."
        ) from error
    try:
        yield unfinished
        if folder.exists():
            folder.rmdir()
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# --- Out -----------------------------------------------------------------------------


def file(
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    family: str | None = None,
    dtype: str | None = None,
    which: str = "best",
) -> str:
    """Writes the net of a workdir for PyTorch.

    Args:
        workdir: Of train.py, or of `workdir`.
        out: ``.safetensors``, ``.pth`` or ``.pt``; it must not be there.
        family: A name of `unet_jax.torch_weights.FAMILIES`; None for that which the net
            came from.
        dtype: Of the tensors; None for that which they came in, else float32.
        which: ``best`` or ``latest``, or a step.

    Returns:
        What was written, as a line.

    Raises:
        InputError: No such family, or one that has no such net; ``out`` is there.
    """
    if dtype is not None:
        choose(DTYPES, dtype, "--dtype =")
    if Path(out).exists():
        raise InputError(f"{out} is already there: give another --out.")
    model, variables, meta, step = load_for_inference(workdir, which=which)
    came = meta.torch.get("family", "")
    family = came if family is None else family.replace("-", "_")
    if not family:
        fits = []
        for name in FAMILIES:
            with contextlib.suppress(InputError):
                torch_weights.state_dict(model, variables, name)
                fits.append(name)
        raise InputError(
            f"the net of {os.fspath(workdir)} did not come from PyTorch:"
            + (
                f" give --family, of which {listed(fits)} fit(s)."
                if fits
                else " and it is a net of none of the families"
                f" {', '.join(FAMILIES)}; give torch_weights.save a table of names."
            )
        )
    choose(FAMILIES, family, "--family =")
    layout = meta.torch["layout"] if family == came else {}
    dtype = dtype or meta.torch.get("dtype", "float32")
    try:
        tensors = torch_weights.state_dict(
            model, variables, family, dtype=dtype, **layout
        )
    except InputError as error:
        raise InputError(
            f"the net of {os.fspath(workdir)} cannot be a {family} net: {error}"
        ) from error
    writing.write(out, tensors)
    unsaid = _unsaid(model, torch_weights.read(tensors, family), family)
    note = f"; they do not say that it has {', '.join(unsaid)}" if unsaid else ""
    return (
        f"{os.fspath(workdir)}: step {step} -> {os.fspath(out)}: {len(tensors)}"
        f" tensors, {dtype}, of the family {family} ({FAMILIES[family].title}){note}"
    )


def _unsaid(model: UNet, there: Imported, family: str) -> list[str]:
    """What tensors do not say of a net and a reader would take for the usual."""
    own, usual = models.fields(model), models.fields(there.model)
    free = FAMILIES[family].free or tuple(FAMILIES[family].options)
    return [f"{k} = {own[k]!r}" for k in free if k in own and own[k] != usual[k]]
