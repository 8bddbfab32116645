"""The U-Net paper's weight map: what it costs to close the gap between two objects.

``w = w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2))`` on the background between two objects,
``w = w_c`` elsewhere; w_c evens out the classes, d1 and d2 are the distances to the
nearest and the second nearest object. `Bordered` fills the weight of a source's
examples with it, for training only: a metric counts pixels, and the one-pixel gaps that
go with the map are not in the truth that it should count.

Reference: Ronneberger et al. 2015, arXiv 1505.04597, section 3, equation 2, figure 3.
"""

import hashlib
import io
import logging
import math
import os
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unet_jax.data.source import NoInstances, Source, Wrapper, overlapping
from unet_jax.types import Example, InputError, NumpyArray, Shape

_LOG = logging.getLogger("unet_jax")

VERSION = 1
"""Of what the disk cache holds: raise it when the same options give another map."""

# A border term below this is 0: a ten-millionth of the paper's largest.
NOTHING = 1e-6


def border_weight(
    instances: NumpyArray,
    *,
    w0: float = 10.0,
    sigma: float = 5.0,
    spacing: Sequence[float] = (),
) -> NumpyArray:
    """The border term of the weight map, without the class balance.

    It is 0 inside the objects, as in the paper's figure 3d: there d1 is 0 and d2 small
    near a neighbour, and the formula would weigh the rims of touching objects like the
    gap between them, which is what it is there to set apart. It is 0 everywhere with
    fewer than two objects.

    Args:
        instances: whole numbers ``[*S]``, one for each object, 0 for the background.
        w0: the term's height, where an object is at no distance on either side.
        sigma: how fast it falls with d1 + d2, in the unit of ``spacing``. It stands in
            the denominator as 2 sigma^2, which many write-ups of the formula lose.
        spacing: size of a pixel along each axis; () is 1. A distance goes from a
            background pixel's centre to that of an object's nearest pixel.

    Returns:
        ``f32[*S]`` between 0 and w0; exact, but that a term below 1e-6 is 0.

    Raises:
        InputError: an option outside its range.
    """
    from scipy import ndimage

    spacing = _spacing(spacing, instances.ndim)
    if w0 < 0 or not sigma > 0:
        raise InputError(
            f"w0 = {w0} must be 0 or more and sigma = {sigma} above 0: the paper has 10"
            " and 5 pixels."
        )
    reach = sigma * math.sqrt(2 * math.log(max(w0 / NOTHING, 1)))
    first = np.full(instances.shape, np.inf, np.float32)
    second = first.copy()
    # A pixel further than `reach` from its second nearest object has no term, so each
    # object is measured in its own box and not in the whole image: 500 objects of
    # 1024 x 1024 are the work of seven images and not of 500.
    for number, box in _boxes(instances):
        near = tuple(
            slice(max(b.start - math.ceil(reach / s), 0), b.stop + math.ceil(reach / s))
            for b, s in zip(box, spacing, strict=True)
        )
        outside = instances[near] != number
        distance = ndimage.distance_transform_edt(outside, sampling=spacing)
        distance = np.asarray(distance, np.float32)
        farther = np.maximum(first[near], distance)
        np.minimum(first[near], distance, out=first[near])
        np.minimum(second[near], farther, out=second[near])
    total = first + second
    term = w0 * np.exp(-np.square(total) / (2 * sigma**2))
    return np.where((instances > 0) | (total > reach), 0, term).astype(np.float32)


def class_balance(
    label: NumpyArray,
    classes: int,
    *,
    weight: NumpyArray | None = None,
    most: float = 10.0,
) -> NumpyArray:
    """The weight of each pixel's class, from how often this image has it.

    ``pixels / (classes that occur * pixels of the class)``, whose mean over the counted
    pixels is 1 and which gives each class that occurs the same sum. After that it is
    capped at ``most``, which takes the mean below 1 where a class is rarer than one
    pixel in ``most`` times the number of classes.

    Args:
        label: whole numbers ``[*S]``, class ids 0 .. classes - 1.
        classes: how many there are.
        weight: ``f32[*S]``; a pixel of weight 0 is not counted. None: all are.
        most: the largest weight of a class, above 0.

    Returns:
        ``f32[*S]``, 0 at pixels that are not counted.
    """
    counted = (label >= 0) & (label < classes)
    if weight is not None:
        counted &= weight > 0
    ids = np.where(counted, label, 0).astype(np.int64)
    counts = np.bincount(ids[counted], minlength=classes)
    occurring = np.count_nonzero(counts)
    table = counts.sum() / np.maximum(occurring * counts, 1)
    return np.where(counted, np.minimum(table, most)[ids], 0).astype(np.float32)


def instances_of(label: NumpyArray) -> NumpyArray:
    """The face-connected components of each class above 0, numbered on from 1.

    Args:
        label: whole numbers ``[*S]``: class ids, or objects of which a number may stand
            for several pieces.

    Returns:
        ``i32[*S]``, 0 where the label is 0. Where two classes touch, two components do.
    """
    from scipy import ndimage

    answer = np.zeros(label.shape, np.int32)
    count = 0
    for number, box in _boxes(label):
        pieces = np.zeros(answer[box].shape, np.int32)
        ndimage.label(label[box] == number, output=pieces)
        inside = pieces > 0
        answer[box][inside] = pieces[inside] + count
        count += int(pieces.max())
    return answer


def separate(instances: NumpyArray) -> NumpyArray:
    """The pixels to turn into background so that no two objects touch any more.

    Two objects touch where two of their pixels share a face (an edge, in 2-D); pixels
    that meet at a corner stay, they belong to no common face-connected component. Of
    two pixels that touch, the one of the larger object goes. What this cuts off from
    the largest piece of an object goes too. An object that would lose more than half in
    these two ways, or all, is taken for smaller than its neighbours, so that they lose
    instead. None vanishes unless it and its neighbours are a pixel or so wide.

    Args:
        instances: whole numbers ``[*S]``, one for each object, 0 for the background.

    Returns:
        ``bool[*S]``. The face-connected components of what remains are the objects: one
        for each (for each of its pieces, if it had several), whose pixels are all its
        own.
    """
    parts = instances_of(instances)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    order = np.empty(len(sizes), np.int64)
    order[np.argsort(sizes, kind="stable")] = np.arange(len(sizes))
    # How far an object has been put forward: 0, 1 for losing half, 2 for losing all.
    served = np.zeros(len(sizes), np.int64)
    turn = 0
    while True:  # each object is served twice at most
        left = np.where(_outranked(parts, order), 0, parts)
        pieces, kept, kept_sizes = _largest_pieces(left, len(sizes))
        need = np.where(kept_sizes > 0, 2 * kept_sizes < sizes, 2 * (sizes > 0))
        if not (need > served).any():
            return (parts > 0) & ((pieces == 0) | (pieces != kept[parts]))
        # Before all that need less, and behind those that were served earlier.
        forward = (turn - 4 * need * len(sizes)) * len(sizes)
        order = np.where(need > served, order % len(sizes) + forward, order)
        served = np.maximum(served, need)
        turn += 1


class Bordered(Wrapper):
    """Training examples with the paper's weight map, and gaps between their objects.

    The objects of example i are those of ``source.instances(i)``; of a source without
    them, the face-connected components of each class above 0. The gap pixels become
    class 0. The weight becomes ``weight * (w_c + border term)``, so that what had the
    weight 0 keeps it and any other weight goes on scaling the loss.

    Args:
        source: whose label is class ids. Not one to evaluate on: the gaps are not in
            the truth.
        w0, sigma, spacing: as for `border_weight`.
        balance: whether w_c is the `class_balance`; otherwise it is 1.
        gap: whether a pixel of background parts touching objects (`separate`).
        most: the cap of the class balance.
        cache: a folder that keeps the maps from run to run; "" is unet_jax/border in
            the user's cache folder, "none" keeps nothing. Files in it may be deleted at
            any time.

    Raises:
        InputError: an option outside its range, or labels that overlap.
    """

    def __init__(
        self,
        source: Source,
        *,
        w0: float = 10.0,
        sigma: float = 5.0,
        balance: bool = True,
        gap: bool = True,
        spacing: Sequence[float] = (),
        most: float = 10.0,
        cache: str = "",
    ) -> None:
        super().__init__(source)
        if w0 and overlapping(source):
            raise InputError(
                "data.border needs one class a pixel, and these labels overlap: leave "
                "data.border.w0 out."
            )
        if not most > 0:
            raise InputError(f"most = {most} must be above 0: leave it out for 10.")
        self.w0, self.sigma, self.spacing = float(w0), float(sigma), tuple(spacing)
        self.balance, self.gap, self.most = balance, gap, most
        self.folder = _folder(cache)
        self._lock, self._can_write = threading.Lock(), True

    def __getitem__(self, i: int, /) -> Example:
        example = self.source[i]
        label, weight = example["label"], example.get("weight")
        if weight is None:
            weight = np.ones(label.shape, np.float32)
        instances = self._instances(i, np.where(weight > 0, label, 0))
        if instances.shape != label.shape:
            raise InputError(
                f"The objects of {self.name(i)} have the size {instances.shape}, but "
                f"its label {label.shape}: give them the same size."
            )
        border, gap = self._map(np.where(weight > 0, instances, 0))
        label = np.where(gap, 0, label).astype(label.dtype)
        classes = len(self.label_names)
        balance = np.float32(1)
        if self.balance:
            balance = class_balance(label, classes, weight=weight, most=self.most)
        weight = (weight * (balance + border)).astype(np.float32)
        return {"image": example["image"], "label": label, "weight": weight}

    def _instances(self, i: int, label: NumpyArray) -> NumpyArray:
        try:
            return self.instances(i)
        except NoInstances:
            return instances_of(label)

    def _map(self, instances: NumpyArray) -> tuple[NumpyArray, NumpyArray]:
        """(border term f32, gap bool), each ``[*S]``, from the disk if it is there."""
        if self.folder is None:
            return self._computed(instances)
        path = self.folder / f"{self._key(instances)}.npz"
        found = _read(path, instances.shape)
        if found is None:
            found = self._computed(instances)
            self._write(path, *found)
        return found

    def _computed(self, instances: NumpyArray) -> tuple[NumpyArray, NumpyArray]:
        gap = np.zeros(instances.shape, bool)
        if self.gap:
            gap = separate(instances)
            instances = np.where(gap, 0, instances)
        options = {"w0": self.w0, "sigma": self.sigma, "spacing": self.spacing}
        return border_weight(instances, **options), gap

    def _key(self, instances: NumpyArray) -> str:
        options = (self.w0, self.sigma, *map(float, self.spacing), self.gap)
        text = repr((VERSION, instances.shape, options))
        digest = hashlib.blake2b(text.encode(), digest_size=20)
        digest.update(np.ascontiguousarray(instances, "<i4").tobytes())
        return digest.hexdigest()

    def _write(self, path: Path, border: NumpyArray, gap: NumpyArray) -> None:
        """Writes a map whole or not at all, also beside others that write the same."""
        if not self._can_write:
            return
        file = io.BytesIO()
        np.savez_compressed(file, border=border, gap=gap)
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_bytes(file.getvalue())
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            with self._lock:
                first, self._can_write = self._can_write, False
            if first:
                _LOG.warning(
                    "%s cannot be written (%s): the border maps are computed anew in"
                    " every run; set data.border.cache to another folder, or to none",
                    path.parent,
                    error.strerror,
                )


def _read(path: Path, shape: Shape) -> tuple[NumpyArray, NumpyArray] | None:
    """A map that was written before, or None if it is not there or not whole."""
    # A damaged zip makes its readers raise almost anything; its checksums tell all.
    try:
        # From bytes: of a file that is no zip NumPy leaves its own handle open.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            border, gap = file["border"], file["gap"]
    except Exception:
        return None
    if border.shape != shape or gap.shape != shape or border.dtype != np.float32:
        return None
    return (border, gap) if gap.dtype == bool else None


def _folder(cache: str) -> Path | None:
    if cache == "none":
        return None
    if cache:
        return Path(cache).expanduser()
    place = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(os.path.expanduser(place)) / "unet_jax" / "border"


def _outranked(parts: NumpyArray, order: NumpyArray) -> NumpyArray:
    """The pixels that share a face with one of a part that comes before theirs."""
    answer = np.zeros(parts.shape, bool)
    for axis in range(parts.ndim):
        before = np.moveaxis(parts, axis, 0)[:-1]
        after = np.moveaxis(parts, axis, 0)[1:]
        meet = (before != after) & (before > 0) & (after > 0)
        later = order[after] > order[before]
        mark = np.moveaxis(answer, axis, 0)
        mark[1:] |= meet & later
        mark[:-1] |= meet & ~later
    return answer


def _largest_pieces(
    parts: NumpyArray, count: int
) -> tuple[NumpyArray, NumpyArray, NumpyArray]:
    """The face-connected pieces of parts that do not touch, and the largest of each.

    Args:
        parts: ``i32[*S]``, from 0 to below ``count``.
        count: how many numbers there are.

    Returns:
        ``(pieces, largest, sizes)``: ``i32[*S]`` numbered from 1; ``i64[count]`` the
        largest piece of each part, 0 if nothing is left of it; ``i64[count]`` its
        pixels.
    """
    from scipy import ndimage

    pieces = np.zeros(parts.shape, np.int32)
    ndimage.label(parts, output=pieces)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    owner = np.zeros(len(sizes), np.int64)
    owner[pieces.ravel()] = parts.ravel()
    rising = np.argsort(sizes, kind="stable")
    largest = np.zeros(count, np.int64)
    largest[owner[rising]] = rising  # where a number comes twice, the last one stays
    return pieces, largest, sizes[largest]


def _boxes(numbers: NumpyArray) -> list[tuple[int, tuple[slice, ...]]]:
    """Each number above 0 with the smallest box around its pixels."""
    from scipy import ndimage

    if numbers.max(initial=0) <= numbers.size:
        found = ndimage.find_objects(np.asarray(numbers, np.int64))
        return [(k, box) for k, box in enumerate(found, 1) if box is not None]
    # The list above has an entry for every number up to the largest.
    values, places = np.unique(numbers, return_inverse=True)
    places = np.where(numbers > 0, places.reshape(numbers.shape) + 1, 0)
    return [(int(values[k - 1]), box) for k, box in _boxes(places)]


def _spacing(spacing: Sequence[float], rank: int) -> tuple[float, ...]:
    sizes = tuple(map(float, spacing)) or (1.0,) * rank
    if len(sizes) != rank or not all(0 < size < math.inf for size in sizes):
        raise InputError(
            f"spacing = {tuple(spacing)} must have a number above 0 for each of the "
            f"{rank} axes: leave it out for pixels."
        )
    return sizes
