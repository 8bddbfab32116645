"""One look at every example as a run would get it: image, label and what counts."""

import contextlib
import dataclasses
import hashlib
import importlib
import inspect as signatures
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from unet_jax.data import FILES
from unet_jax.data.source import Source, overlapping
from unet_jax.inspection.layout import Layout
from unet_jax.types import InputError, NumpyArray, Shape

PARTS = ("train", "evaluation")
AT_ONCE = 2**20  # pixels


@dataclasses.dataclass(frozen=True)
class Look:
    """What one example has to say, without its pixels.

    ``part``, ``number``: of the source it came from.
    ``error``: the sentence of what could not be read, or "".
    ``size``, ``dtype``: of the image.
    ``low``, ``high``, ``mean``, ``square``: of each channel; square is the mean of the
        squares.
    ``grey``: whether three channels are equal everywhere.
    ``digest``: of the pixels; equal for equal images alone.
    ``counts``: pixels of each class (of overlapping labels: of each label).
    ``void``: pixels that count nowhere.
    ``border``: part of the outermost pixels that is foreground.
    ``middle``: the slice of a volume with most foreground.
    """

    part: str
    number: int
    name: str
    error: str = ""
    size: Shape = ()
    dtype: str = ""
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    square: tuple[float, ...] = ()
    grey: bool = False
    digest: bytes = b""
    counts: tuple[int, ...] = ()
    void: int = 0
    border: float = 0.0
    middle: int = 0

    @property
    def pixels(self) -> int:
        """Spatial positions of the image."""
        return int(np.prod(self.size))


@dataclasses.dataclass(frozen=True)
class Opened:
    """The parts of a data set, as far as they can be opened.

    ``sources``: by part, ``train`` and ``evaluation``.
    ``errors``: sentences of those that could not be opened.
    ``said``: what the sources warned of.
    """

    sources: dict[str, Source]
    errors: tuple[str, ...]
    said: tuple[str, ...]


def open_parts(layout: Layout, *, links: bool = False) -> Opened:
    """Opens both parts of a data set, leaving out what is faulty."""
    sources: dict[str, Source] = {}
    errors: list[str] = []
    with _heard() as said:
        for part in PARTS:
            try:
                sources[part] = _open(layout, getattr(layout, part), links)
            except InputError as error:
                if str(error) not in errors:
                    errors.append(str(error))
    return Opened(sources, tuple(errors), tuple(dict.fromkeys(said)))


def look(
    opened: Opened, *, limit: int, done: Callable[[], None] = lambda: None
) -> list[Look]:
    """Looks at the examples of both parts, in four threads.

    Args:
        opened: the parts.
        limit: of more examples than this an even spread is looked at.
        done: called after each.
    """
    places = spread(opened, limit)

    def one(place: tuple[str, int]) -> Look:
        part, number = place
        source = opened.sources[part]
        try:
            found = _look(source, part, number)
        except InputError as error:
            found = Look(part, number, source.name(number), error=str(error))
        done()
        return found

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, places))


def spread(opened: Opened, limit: int) -> list[tuple[str, int]]:
    """(part, number) of all examples, or of so many evenly spread."""
    every = [
        (part, i) for part, source in opened.sources.items() for i in range(len(source))
    ]
    if len(every) <= limit:
        return every
    chosen = np.linspace(0, len(every) - 1, max(limit, 1)).astype(int)
    return [every[i] for i in chosen]


def foreground(label: NumpyArray, *, planes: bool) -> NumpyArray:
    """Where a label is anything but the background, ``bool[*S]``."""
    inside = label > 0
    return np.asarray(inside.any(-1)) if planes else inside


def _open(layout: Layout, split: str, links: bool) -> Source:
    module: Any = importlib.import_module(f"unet_jax.data.{layout.source}")
    options: dict[str, Any] = {**layout.options, "split": split}
    if layout.root is not None:
        options["data_dir" if layout.source == "tfds" else "root"] = str(layout.root)
    if layout.source in FILES:
        known = signatures.signature(module.open).parameters
        given = {"on_error": "skip", "links": links}
        options |= {name: value for name, value in given.items() if name in known}
    source: Source = module.open(**options)
    if not len(source):
        raise InputError(f"The split {split!r} has no examples: choose another one.")
    return source


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """The warnings of the package inside the block, instead of on the terminal."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, ear = logging.getLogger("unet_jax"), Ear(logging.WARNING)
    before = logger.propagate
    logger.addHandler(ear)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(ear)
        logger.propagate = before


def _look(source: Source, part: str, number: int) -> Look:
    example = source[number]
    image, label = np.asarray(example["image"]), np.asarray(example["label"])
    planes = overlapping(source)
    name = source.name(number)
    if label.shape[: image.ndim - 1] != image.shape[:-1]:
        raise InputError(f"{name} and its mask have different sizes.")
    flat = image.reshape(-1, image.shape[-1])
    mean, square = _moments(flat)
    weight = example.get("weight")
    inside = foreground(label, planes=planes)
    counted = np.ones(label.shape, bool) if weight is None else np.asarray(weight) > 0
    if planes:
        if counted.ndim < label.ndim:
            counted = np.broadcast_to(counted[..., None], label.shape)
        counts = ((label > 0) & counted).reshape(-1, label.shape[-1]).sum(0)
        void = int((~counted).any(-1).sum())
    else:
        counts = np.bincount(
            label[counted].ravel().astype(np.int64), minlength=len(source.label_names)
        )
        void = int(counted.size - counted.sum())
    edge = np.ones(inside.shape, bool)
    edge[(slice(1, -1),) * inside.ndim] = False
    per_slice = inside.reshape(len(inside), -1).sum(1)
    return Look(
        part,
        number,
        name,
        size=image.shape[:-1],
        dtype=image.dtype.name,
        low=tuple(map(float, flat.min(0))),
        high=tuple(map(float, flat.max(0))),
        mean=tuple(map(float, mean)),
        square=tuple(map(float, square)),
        grey=image.shape[-1] == 3 and bool((flat == flat[:, :1]).all()),
        digest=_digest(image),
        counts=tuple(map(int, counts)),
        void=void,
        border=float(inside[edge].mean()),
        middle=int(per_slice.argmax()) if per_slice.any() else len(inside) // 2,
    )


def _moments(flat: NumpyArray) -> tuple[NumpyArray, NumpyArray]:
    """Mean and mean square of each channel, without a copy of all pixels in f64."""
    total, squares = np.zeros(flat.shape[-1]), np.zeros(flat.shape[-1])
    for begin in range(0, len(flat), AT_ONCE):
        some = flat[begin : begin + AT_ONCE].astype(np.float64)
        total += some.sum(0)
        squares += np.square(some).sum(0)
    return total / len(flat), squares / len(flat)


def _digest(image: NumpyArray) -> bytes:
    begun = hashlib.blake2b(f"{image.shape} {image.dtype}".encode(), digest_size=16)
    begun.update(np.ascontiguousarray(image).data)
    return begun.digest()
