"""Whole training sets, read once for the device, and whether they are."""

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unet_jax import budget, sharding
from unet_jax.compiled import bytes_text
from unet_jax.data import Source, trust
from unet_jax.resident.crops import Resident
from unet_jax.types import InputError, NumpyArray, Shape, size_text

Say = Callable[[str], None]
"""prints a line for a person"""

PART = 0.1  # of a device's memory that is taken without being asked
MOST = 0.5  # of it, where it is asked for: the net needs some, too
PADDED = 2.0  # times the pixels that there are, for images of different sizes
LONG = 2**30  # bytes from which the reading is announced


def wanted(config: Mapping[str, Any], mesh: Mesh) -> bool | None:
    """Whether a run keeps its training set on the device; None where its size decides.

    Args:
        config: Of a run; ``train.resident`` is asked.
        mesh: Where it runs.

    Raises:
        InputError: It is demanded of a run that cannot.
    """
    asked = config["train"].get("resident")
    obstacles = {
        "mesh.pmap = True": config.get("mesh", {}).get("pmap", False),
        f"{jax.process_count()} processes": jax.process_count() > 1,
    }
    found = [what for what, there in obstacles.items() if there]
    if not found:
        # On CPU to cut and send a batch takes less than a hundredth of a step, and that
        # is all there is to gain: no reason to hold all examples twice in one memory.
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        return False if asked is None and on_cpu else asked
    if asked:
        raise InputError(
            f"train.resident = True does not go with {found[0]}: leave out"
            " train.resident, the images are then sent batch by batch."
        )
    return False


class Kept:
    """The training set of a run, read when it is first asked for.

    Args:
        source: Examples as the task wants them.
        crop: What is cut from them.
        mesh: Where they are to be.
        wanted: Whether they are; None where they take at most a tenth of a device.
        threads: From the bytes of an example to how many threads read.
        say: Is told.
    """

    def __init__(
        self,
        source: Source,
        *,
        crop: Shape,
        mesh: Mesh,
        wanted: bool | None,
        threads: Callable[[int], int],
        say: Say | None = None,
    ) -> None:
        self._source, self._crop, self._mesh = source, tuple(crop), mesh
        self._wanted, self._threads = wanted, threads
        self._say = say or (lambda text: None)
        self._lock = threading.Lock()
        self._resident: Resident | None = None

    def __call__(self) -> Resident | None:
        """The examples on the mesh, or None if they stay on the host.

        Raises:
            InputError: They are demanded and cannot be kept, or one cannot be read.
        """
        with self._lock:
            if self._wanted is not False and self._resident is None:
                self._wanted = self._read()
            return self._resident

    def _read(self) -> bool:
        room = _room(self._source, demanded=bool(self._wanted))
        if room is None:
            return False
        shape, size = room
        if size > LONG:
            self._say(
                f"reading {len(self._source)} training images, {bytes_text(size)} ..."
            )
        threads = self._threads(size // len(self._source))
        arrays = read(self._source, shape, self._crop, threads=threads)
        self._resident = jax.device_put(arrays, sharding.replicated(self._mesh))
        one = len(self._source) == 1
        self._say(
            f"{len(self._source)} training {'image is' if one else 'images are'} kept"
            f" on the device ({bytes_text(bytes_of(arrays))})"
        )
        return True


def bytes_of(arrays: Any) -> int:
    """What the arrays of a tree take together."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def _room(source: Source, *, demanded: bool) -> tuple[Shape, int] | None:
    """The size of the largest image, and the bytes of all in arrays of that size.

    Of weights it goes by the first example's.

    Returns:
        None where they are not to be kept.

    Raises:
        InputError: The same, if they are demanded.
    """
    memory = budget.device_memory() or 0
    limit = int(memory * PART)
    if demanded:
        limit = int(memory * MOST) or int(trust.memory() * trust.MOST)
    first: Any = source[0]
    arrays = [first["image"], first["label"]]
    if (weight := _compact(first["weight"])) is not None:
        arrays.append(weight)
    largest, total = first["image"].shape[:-1], 0
    each = sum(array.nbytes for array in arrays) // math.prod(largest)
    size = 0
    for i in range(len(source)):
        own = tuple(source.size(i))
        if len(own) != len(largest):
            continue  # refused by its name when it is read
        total += math.prod(own)
        largest = tuple(map(max, largest, own))
        # Asked of each, so that of a data set far too large few sizes are looked up.
        size = len(source) * math.prod(largest) * each
        if size > limit:
            if demanded:
                raise InputError(
                    f"train.resident = True needs at least {bytes_text(size)} for"
                    f" {len(source)} images of up to {size_text(largest)}, and there"
                    f" are {bytes_text(limit)} for it: leave out train.resident, or"
                    " make the images smaller with data.resize."
                )
            return None
    if len(source) * math.prod(largest) <= PADDED * total:
        return largest, size
    if demanded:
        raise InputError(
            "train.resident = True keeps every image in the size of the largest,"
            f" {size_text(largest)}, which makes {bytes_text(size)} of"
            f" {bytes_text(total * each)}: leave out train.resident, or bring the"
            " images to one size with data.resize."
        )
    return None


def read(source: Source, shape: Shape, crop: Shape, *, threads: int) -> Resident:
    """All examples, on the host.

    Args:
        source: Examples as the task wants them.
        shape: Of the largest of them.
        crop: What is to be cut from them.
        threads: How many read, 1 or more.

    Raises:
        InputError: One cannot be read, or is larger than its source says.
    """
    count, first = len(source), source[0]
    rank = len(shape)

    def empty(array: NumpyArray) -> NumpyArray:
        return np.zeros((count, *shape, *array.shape[rank:]), array.dtype)

    image, label = empty(first["image"]), empty(first["label"])
    sizes, weights = np.zeros((count, rank), np.int32), {}
    for i, example in enumerate(_in_threads(source, threads)):
        size = example["image"].shape[:-1]
        if any(n > most for n, most in zip(size, shape, strict=True)):
            raise InputError(
                f"{source.name(i)} has the size {size_text(size)}, but its header says"
                f" {size_text(tuple(source.size(i)))}: save it again."
            )
        here = (i, *map(slice, size))
        image[here], sizes[i] = example["image"], size
        label = label.astype(np.result_type(label, example["label"]), copy=False)
        label[here] = example["label"]
        if (weight := _compact(example["weight"])) is not None:
            weights[i] = weight
    return Resident(image, label, _weight(weights, label), sizes, tuple(crop))


def _in_threads(source: Source, threads: int) -> Iterator[Any]:
    """The examples in order, a few read ahead."""
    count, some = len(source), 2 * threads
    with ThreadPoolExecutor(threads) as pool:
        for begin in range(0, count, some):
            numbers = range(begin, min(begin + some, count))
            yield from pool.map(source.__getitem__, numbers)


def _compact(weight: NumpyArray) -> NumpyArray | None:
    """None where it is one everywhere, u8 where there are only zeros and ones."""
    one = weight == 1
    if one.all():
        return None
    return one.astype(np.uint8) if (one | (weight == 0)).all() else weight


def _weight(weights: dict[int, NumpyArray], label: NumpyArray) -> NumpyArray:
    """The weights of all examples, of those that are not one everywhere."""
    if not weights:
        # Looked up like any other: computed, it is added up in another order on CPU.
        return np.ones((1, *label.shape[1:]), np.uint8)
    dtype = np.result_type(*weights.values())
    made = np.ones(label.shape, dtype)
    for i, weight in weights.items():
        made[(i, *map(slice, weight.shape))] = weight
    return made
