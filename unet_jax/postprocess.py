"""What follows a prediction: small parts and holes gone, objects told apart.

All of it works on the host, on one image or volume. Pixels hang together across faces
(4 neighbours in 2-D, 6 in 3-D). A label here is ``[*S]``: class ids, or the zeros and
ones of one label; what is taken out of it becomes the background.

    largest     of each class the largest component, the rest gone
    small=N     components of fewer than N pixels gone
    fill        background that one class encloses becomes that class

`build` makes one function of them for a run's predictions. The objects of a class are
numbered by `instances`, after a net that leaves a gap between touching objects (as the
U-Net paper's border weights teach it) or after one that does not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from unet_jax.types import InputError, NumpyArray, Task, choose

if TYPE_CHECKING:
    from unet_jax.predict import Prediction

METHODS = ("components", "watershed", "distance")
STEPS = ("largest", "small", "fill")


def largest_component(label: Any, *, background: int = 0) -> NumpyArray:
    """Of each class only the largest component; of equal ones the first in the array.

    Args:
        label: ``[*S]``, whole numbers.
        background: The class that is left as it is, and that the rest becomes.

    Returns:
        ``[*S]`` of the same dtype.
    """

    def keep(sizes: NumpyArray) -> NumpyArray:
        return np.arange(len(sizes)) == sizes.argmax()

    return _components_kept(label, background, keep)


def remove_small(label: Any, size: int, *, background: int = 0) -> NumpyArray:
    """Without the components that are smaller than a size.

    Args:
        label: ``[*S]``, whole numbers.
        size: Pixels that a component must have to stay.
        background: The class that is left as it is, and that the rest becomes.

    Returns:
        ``[*S]`` of the same dtype.
    """
    return _components_kept(label, background, lambda sizes: sizes >= size)


def _components_kept(
    label: Any, background: int, keep: Callable[[NumpyArray], NumpyArray]
) -> NumpyArray:
    """``keep``: the sizes of a class's components -> which of them stay."""
    label = _whole(label)
    out = np.full_like(label, background)
    for value in _classes(label, background):
        parts, count = _components(label == value)
        kept = np.zeros(count + 1, bool)
        kept[1:] = keep(np.bincount(parts.ravel(), minlength=count + 1)[1:])
        out[kept[parts]] = value
    return out


def fill_holes(label: Any, *, background: int = 0) -> NumpyArray:
    """Background from which no way leads to the border but through one class, filled.

    Of several classes around a hole, as of rings in rings, it becomes the innermost:
    the one that has most faces in common with it.

    Args:
        label: ``[*S]``, whole numbers.
        background: The class of holes.

    Returns:
        ``[*S]`` of the same dtype; only background has changed.
    """
    from scipy import ndimage

    label = _whole(label)
    fill: Any = ndimage.binary_fill_holes
    empty = label == background
    holes, count = _components(empty)
    most, chosen = np.zeros(count + 1, np.int64), np.full(count + 1, background)
    for value in _classes(label, background):
        inside = label == value
        enclosed = np.zeros(count + 1, bool)
        enclosed[holes[fill(inside) & empty]] = True
        touched = np.zeros(count + 1, np.int64)
        for here, there in _neighbours(label.ndim):
            for one, other in ((here, there), (there, here)):
                pairs = empty[one] & inside[other]
                touched += np.bincount(holes[one][pairs], minlength=count + 1)
        better = enclosed & (touched > most)
        most[better], chosen[better] = touched[better], value
    return np.where(empty, chosen[holes], label).astype(label.dtype)


# --- Objects -------------------------------------------------------------------------


def instances(
    foreground: Any,
    *,
    method: str = "components",
    threshold: float = 0.5,
    seed_threshold: float = 0.8,
    min_size: int = 0,
) -> NumpyArray:
    """The objects of a foreground, numbered.

    - ``components``: its components. For a net that leaves a gap between objects.
    - ``watershed``: each component of what is above ``seed_threshold`` is an object and
      grows to what is above ``threshold``, where it is most probable first. For a net
      that is less sure between objects than in them. A component of the foreground
      without a seed is one object.
    - ``distance``: by their form alone. The foreground is parted where it is narrower
      than ``seed_threshold`` times the narrower of the two objects at its widest, both
      measured by the distance to the nearest background (what is beyond the image does
      not count).

    Args:
        foreground: ``[*S]``: the probability of it, or a mask.
        method: One of `METHODS`.
        threshold: Above which it is foreground, in (0, 1).
        seed_threshold: From the threshold to below 1 for ``watershed``, of which a mask
            is all seed; in (0, 1) for ``distance``.
        min_size: Objects of fewer pixels are left out.

    Returns:
        ``i32[*S]``, 0 for none, 1 to n in the order of their first pixels.

    Raises:
        InputError: An unknown method, or a number out of its range.

    Reference: Cousty et al. 2009, doi 10.1109/TPAMI.2008.173 (watersheds as minimum
    spanning forests).
    """
    foreground = np.asarray(foreground)
    mask = foreground if foreground.dtype == bool else foreground > threshold
    low = threshold if method == "watershed" else 0
    choose(METHODS, method, "instances: method =")
    if not (0 < threshold < 1 and low <= seed_threshold < 1 and seed_threshold > 0):
        raise InputError(
            f"threshold = {threshold} and seed_threshold = {seed_threshold} must be"
            " above 0 and below 1, and seeds not below the foreground: use 0.5 and 0.8."
        )
    return _numbered(
        _objects(mask, foreground, method=method, seed_threshold=seed_threshold),
        min_size,
    )


def _objects(
    mask: NumpyArray, height: NumpyArray, *, method: str, seed_threshold: float
) -> NumpyArray:
    """``instances`` of a mask, where the foreground is ``height``; any numbers."""
    parts, count = _components(mask)
    if method == "components" or not count:
        return parts
    if method == "distance":
        return _parted(mask, seed_threshold)
    seeds, found = _components(mask & (height > seed_threshold))
    seeded = np.zeros(count + 1, bool)
    seeded[parts[seeds > 0]] = True
    alone = mask & ~seeded[parts]
    seeds = np.where(alone, parts + found, seeds)
    return flood(height, seeds, mask)


def flood(height: NumpyArray, seeds: NumpyArray, mask: NumpyArray) -> NumpyArray:
    """Seeds grown over a mask from the highest pixels down: a watershed without dams.

    A pixel joins its highest neighbour that leads to a seed without going through lower
    ones than it must. Of equally high pixels those nearer to a seed come first.

    Args:
        height: ``[*S]``, real numbers.
        seeds: ``[*S]``, whole numbers, 0 for none.
        mask: ``bool[*S]``; seeds lie in it.

    Returns:
        ``i32[*S]``: 0 outside the mask and in components of it without a seed.

    Reference: Cousty et al. 2009, doi 10.1109/TPAMI.2008.173.
    """
    from scipy import ndimage, sparse

    distance: Any = ndimage.distance_transform_edt
    places = np.flatnonzero(mask)
    seed = seeds.ravel()[places]
    if not seed.any():
        return np.zeros(mask.shape, np.int32)
    # All pixels in one order, seeds first, so that no two edges weigh the same.
    lower = -height.ravel()[places].astype(np.float64)
    keys = (distance(seeds == 0).ravel()[places], lower, seed == 0)
    rank = np.empty(len(places), np.int64)
    rank[np.lexsort(keys)] = np.arange(len(places))
    number = np.zeros(mask.shape, np.int64)
    number.ravel()[places] = np.arange(len(places))
    ends = []
    for here, there in _neighbours(mask.ndim):
        both = mask[here] & mask[there]
        ends.append((number[here][both], number[there][both]))
    one, other = (np.concatenate(side) for side in zip(*ends, strict=True))
    # A path is as low as its lowest pixel; then the higher neighbour counts.
    later = np.maximum(rank[one], rank[other]).astype(np.float64)
    weight = later * len(places) + np.minimum(rank[one], rank[other]) + 2
    # Every seed is tied to a root that weighs less than any edge, and cut off again.
    root, tied = len(places), np.flatnonzero(seed)
    shape = (root + 1, root + 1)
    rows, columns = np.append(one, tied), np.append(other, np.full(len(tied), root))
    weights = np.append(weight, np.full(len(tied), 0.5))
    graph: Any = sparse.csgraph
    tree = graph.minimum_spanning_tree(
        sparse.csr_array((weights, (rows, columns)), shape=shape)
    ).tocoo()
    inner = tree.data > 1
    forest = sparse.csr_array(
        (tree.data[inner], (tree.row[inner], tree.col[inner])), shape=shape
    )
    _, part = graph.connected_components(forest, directed=False)
    owner = np.zeros(part.max() + 1, np.int32)
    owner[part[tied]] = seed[tied]
    out = np.zeros(mask.shape, np.int32)
    out.ravel()[places] = owner[part[:root]]
    return out


def _parted(mask: NumpyArray, ratio: float) -> NumpyArray:
    """A mask parted at its necks: the method ``distance``.

    Every top of the distance map is flooded by itself; then tops are joined over the
    highest passes first, unless the pass is below ``ratio`` of the lower of the two.
    """
    from scipy import ndimage

    distance: Any = ndimage.distance_transform_edt
    highest: Any = ndimage.maximum_filter
    # A mask without background has no distance to it.
    height = distance(mask) if not mask.all() else np.ones(mask.shape)
    cross = ndimage.generate_binary_structure(mask.ndim, 1)
    tops, count = _components(mask & (highest(height, footprint=cross) == height))
    regions = flood(height, tops, mask)
    peak = np.zeros(count + 1)
    np.maximum.at(peak, regions.ravel(), height.ravel())
    pairs, passes = [], []
    for here, there in _neighbours(mask.ndim):
        a, b = regions[here], regions[there]
        border = (a != b) & (a > 0) & (b > 0)
        pairs.append(np.stack([a[border], b[border]], axis=-1))
        passes.append(np.minimum(height[here], height[there])[border])
    group = np.arange(count + 1)

    def find(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    edges, level = np.concatenate(pairs), np.concatenate(passes)
    for i in np.argsort(-level, kind="stable"):
        a, b = (find(int(end)) for end in edges[i])
        if a != b and level[i] >= ratio * min(peak[a], peak[b]):
            low, high = sorted((a, b), key=lambda top: peak[top])
            group[low] = high
    return np.array([find(i) for i in range(count + 1)])[regions]


def _numbered(objects: NumpyArray, min_size: int) -> NumpyArray:
    """Any numbers above 0 -> 1 to n in the order of their first pixels, ``i32``."""
    ids, first, back, sizes = np.unique(
        objects, return_index=True, return_inverse=True, return_counts=True
    )
    kept = np.flatnonzero((ids > 0) & (sizes >= min_size))
    number = np.zeros(len(ids), np.int32)
    number[kept[np.argsort(first[kept])]] = np.arange(1, len(kept) + 1)
    return number[back].reshape(objects.shape)


def as_ids(objects: NumpyArray) -> NumpyArray:
    """Objects as files hold them: u16, or u32 where there are more than 65535."""
    return objects.astype(np.uint16 if objects.max(initial=0) < 2**16 else np.uint32)


# --- For a run -----------------------------------------------------------------------


def parse(text: str) -> tuple[tuple[str, int], ...]:
    """``"largest,fill,small=30"`` as steps and their numbers, in that order.

    Raises:
        InputError: An unknown step, or a number that is missing or out of place.
    """
    steps = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, number = part.partition("=")
        choose(STEPS, name, "postprocess:")
        if bool(equals) != (name == "small") or (equals and not number.isdecimal()):
            raise InputError(
                f"postprocess: {part!r} is not understood: write largest, fill, and"
                " small=30 with the pixels that a component must have."
            )
        steps.append((name, int(number) if equals else 0))
    return tuple(steps)


def build(
    *,
    task: Task,
    label_names: Sequence[str],
    steps: str = "",
    instances: str | None = None,
    seed_threshold: float = 0.8,
    min_size: int = 0,
) -> Callable[["Prediction"], NumpyArray]:
    """A function from a run's prediction to what is to be made of it.

    Args:
        task: Of the run.
        label_names: Of its classes or labels. The class called ``background``, or else
            the first, is what no object is made of.
        steps: Those of the module, in order and with commas: ``"largest,small=30"``.
        instances: Number the objects by this one of `METHODS`, after the steps; None:
            do not. Of several classes the objects of each are numbered, one after the
            other, and do not grow into another class.
        seed_threshold, min_size: As for `instances`.

    Returns:
        ``prediction -> label``, of the shape and dtype of ``prediction.label``; with
        ``instances`` i32 of that shape, of several labels numbered each by itself.

    Raises:
        InputError: Steps or a method that are not known.
    """
    made = [
        partial(remove_small, size=number) if name == "small" else _STEPS[name]
        for name, number in parse(steps)
    ]
    if instances is not None:
        choose(METHODS, instances, "instances =")
    names = list(label_names)
    named = task == "classes" and "background" in names
    background = names.index("background") if named else 0

    def plane(
        label: NumpyArray, probability: Mapping[int, NumpyArray] | None
    ) -> NumpyArray:
        """A label ``[*S]``, and for each value in it the probability ``f32[*S]``."""
        for step in made:
            label = step(label, background=background)
        if instances is None:
            return label
        found = np.zeros(label.shape, np.int32)
        for value in _classes(label, background):
            mask = label == value
            height = mask if probability is None else probability[value]
            objects = _objects(
                mask, height, method=instances, seed_threshold=seed_threshold
            )
            objects = _numbered(objects, min_size)
            found += np.where(objects > 0, objects + found.max(), 0).astype(np.int32)
        return found

    def post(prediction: "Prediction") -> NumpyArray:
        label, probability = prediction
        maps = None if probability is None else np.moveaxis(probability, -1, 0)
        if instances == "watershed" and maps is None:
            raise InputError(
                "instances = 'watershed' grows by the probabilities: predict with"
                " probabilities = True, or use 'components' or 'distance'."
            )
        if task == "classes":
            return plane(label, None if maps is None else dict(enumerate(maps)))
        planes = [label] if len(names) == 1 else np.moveaxis(label, -1, 0)
        out = [
            plane(one, None if maps is None else {1: maps[k]})
            for k, one in enumerate(planes)
        ]
        return out[0] if len(names) == 1 else np.stack(out, axis=-1)

    return post


_STEPS: dict[str, Callable[..., NumpyArray]] = {
    "largest": largest_component,
    "fill": fill_holes,
}


def _classes(label: NumpyArray, background: int) -> list[int]:
    return [int(value) for value in np.unique(label) if value != background]


def _components(mask: NumpyArray) -> tuple[NumpyArray, int]:
    """``i32[*S]`` numbered from 1, and how many."""
    from scipy import ndimage

    label: Any = ndimage.label
    return label(mask)


def _neighbours(rank: int) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Along each axis: all pixels that have a next one, and these next ones."""
    for axis in range(rank):
        before, after = [slice(None)] * rank, [slice(None)] * rank
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        yield tuple(before), tuple(after)


def _whole(label: Any) -> NumpyArray:
    label = np.asarray(label)
    if label.dtype.kind not in "biu":
        raise InputError(
            f"a label of {label.dtype} has no classes: give class ids, or decide on the"
            " probabilities first (unet_jax.predict.decide)."
        )
    return label
