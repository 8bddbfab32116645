"""Examples that are kept once decoded, on disk, and examples that cannot be had.

Two more layers of those that `source` has: `Mapped` is for data sets larger than the
memory, `Skipping` for files that may turn out to be damaged, or be deleted, while a run
is reading them.
"""

import logging
import math
import os
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any, cast

import numpy as np

from unet_jax.data.source import NoInstances, Source, Wrapper
from unet_jax.types import Example, InputError, NumpyArray, Shape

_LOG = logging.getLogger("unet_jax")

ALIGN = 64  # bytes that arrays begin at multiples of, as NumPy aligns them


class Mapped(Wrapper):
    """Keeps decoded examples in one file, which is mapped: each is decoded once.

    The file has no name and ends with the process, however that ends, so there is
    nothing to clean up or to be out of date. The system holds as much of it in memory
    as is free. Where the disk is full the rest is decoded each time, and said so.

    Args:
        source: any source whose examples are always the same.
        folder: where the file is.

    Raises:
        InputError: the folder cannot be written to.
    """

    def __init__(self, source: Source, folder: str | Path) -> None:
        super().__init__(source)
        folder = Path(folder).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            raise InputError(
                f"data.cache_dir = {folder} cannot be written to ({error.strerror}): "
                "name a folder on a disk with room for all decoded examples."
            ) from error
        weakref.finalize(self, self._file.close)
        self._folder = folder
        self._kept: dict[int, dict[str, tuple[int, Shape, np.dtype]]] = {}
        self._end, self._full = 0, False
        self._lock = threading.Lock()

    def __getitem__(self, i: int, /) -> Example:
        places = self._kept.get(i)
        if places is not None:
            arrays = {key: self._map(*place) for key, place in places.items()}
            return cast(Example, arrays)
        example = self.source[i]
        if not self._full:
            try:
                self._kept[i] = self._write(cast(dict[str, NumpyArray], example))
            except OSError as error:
                self._full = True
                _LOG.warning(
                    "data.cache_dir = %s takes no more (%s): %d of %d examples are "
                    "kept there, the others are decoded each time",
                    self._folder,
                    error.strerror,
                    len(self._kept),
                    len(self),
                )
        return example

    def _map(self, offset: int, shape: Shape, dtype: np.dtype) -> NumpyArray:
        # Mapped anew each time: kept open, each would hold a file handle.
        file: Any = self._file
        return np.memmap(file, dtype, "r", offset, shape).view(np.ndarray)

    def _write(
        self, example: dict[str, NumpyArray]
    ) -> dict[str, tuple[int, Shape, np.dtype]]:
        sizes = [-(-array.nbytes // ALIGN) * ALIGN for array in example.values()]
        with self._lock:
            begin = self._end
            self._end += sum(sizes)
        places = {}
        for (key, array), size in zip(example.items(), sizes, strict=True):
            flat: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            view = memoryview(flat)
            done = 0
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], begin + done)
            places[key] = (begin, array.shape, array.dtype)
            begin += size
        return places


class Skipping(Wrapper):
    """Puts an example that counts nowhere in the place of one that cannot be read.

    It has zeros throughout, of weight 0 too. All others keep their numbers, so that
    what they are trained in does not depend on which files are damaged. It stands
    outside of what keeps examples: a file that can be read again counts again.

    Args:
        source: examples of one type, number of channels and rank.
        like: one of them, which says what the others are like.

    Attributes:
        skipped: why, by the examples' numbers; of those that were asked for so far.
    """

    def __init__(self, source: Source, like: Example) -> None:
        super().__init__(source)
        image, label = like["image"], like["label"]
        self._size = image.shape[:-1]
        self._image = (image.shape[-1:], image.dtype)
        self._label = (label.shape[len(self._size) :], label.dtype)
        self.skipped: dict[int, str] = {}
        self._sizes: dict[int, Shape] = {}

    def __getitem__(self, i: int, /) -> Example:
        try:
            return self.source[i]
        except (InputError, OSError) as error:
            self._note(i, error)
        size = self.size(i)
        return {
            "image": np.zeros((*size, *self._image[0]), self._image[1]),
            "label": np.zeros((*size, *self._label[0]), self._label[1]),
            "weight": np.zeros(size, np.float32),
        }

    def size(self, i: int, /) -> Shape:
        if i not in self._sizes:
            try:
                size = tuple(self.source.size(i))
                # A header may say anything; what is made of zeros should not be large.
                if len(size) != len(self._size) or math.prod(size) > 2**28:
                    size = self._size
            except (InputError, OSError) as error:
                self._note(i, error)
                size = self._size
            self._sizes[i] = size
        return self._sizes[i]

    def instances(self, i: int, /) -> NumpyArray:
        try:
            return super().instances(i)
        except NoInstances:  # of a sound example that only has classes
            raise
        except (InputError, OSError) as error:
            self._note(i, error)
        return np.zeros(self.size(i), np.int32)

    def _note(self, i: int, error: Exception) -> None:
        if i not in self.skipped:
            self.skipped[i] = str(error)
            _LOG.warning("left out: %s", error)


def skipped(source: Source) -> list[str]:
    """Why examples of a source have been left out so far, one sentence each."""
    while not isinstance(source, Skipping):
        if not isinstance(source, Wrapper):
            return []
        source = source.source
    return list(source.skipped.values())
