"""The data's own types, and the shape legend that every docstring uses.

Shape legend:
    B   examples in a batch          *S  the spatial axes: (H, W) or (D, H, W)
    C   channels of the image        K   classes (softmax) or labels (sigmoid)
    f32, i32, u8 ... are dtypes; ``f32[B, *S, K]`` is an array of that dtype and shape.

3-D is a rank, not another model: every layer, loss, metric and augmentation reads the
number of spatial axes from the array.

Tasks:
    ``classes``  one class a pixel: softmax, argmax, label ``[B, *S]`` of class ids
    ``labels``   any number of labels a pixel: sigmoid, threshold, label ``[B, *S, K]``
                 of zeros and ones (a binary sigmoid net is ``labels`` with K = 1)
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

import jax
import numpy as np

Array = jax.Array
PyTree = Any
Task = Literal["classes", "labels"]


class Example(TypedDict):
    """One example, without the batch axis.

    On the host its arrays are NumPy arrays, inside a compiled step JAX arrays.

    ``image``:  ``[*S, C]`` as stored (u8, u16 or f32), normalised f32 inside the step.
    ``label``:  ``[*S]`` class ids, or ``[*S, K]`` zeros and ones; any integer dtype.
    ``weight``: ``f32`` like ``label``. The only mask there is: 0 means "not counted"
        (padding, void, not annotated, from outside the frame), any other value scales
        the loss. Absent from a source's example it means one everywhere.
    """

    image: Any
    label: Any
    weight: NotRequired[Any]


class Batch(TypedDict):
    """Examples stacked along a leading axis B, each with its number in the data set.

    ``index``: ``i32[B]``, -1 for a row that only fills up the last batch (weight 0).
    """

    image: Any
    label: Any
    weight: Any
    index: Any


LossFn = Callable[[Array, Array, Array], Array]
"""(logits f32[B, *S, K], label, weight) -> f32[B]"""

AugmentFn = Callable[[Array, Example], Example]
"""(key, example) -> example, one example at a time; the step vmaps it"""

Pads = tuple[tuple[int, int], ...]
"""(pixels before, pixels after) for each spatial axis"""

Shape = tuple[int, ...]
NumpyArray = np.ndarray[Any, Any]


class InputError(ValueError):
    """What a user can mend: one sentence that names the culprit and the remedy.

    The command line prints it without a traceback; everything else is a bug and keeps
    its traceback.
    """


def choose(table: Collection[Any], name: Any, what: str) -> Any:
    """The entry ``name`` of a dict, or ``name`` itself if another collection has it.

    Args:
        table: What there is.
        name: What is asked for.
        what: What the sentence calls it, such as ``"model.act ="``.

    Raises:
        InputError: It is not there; the sentence lists what is.
    """
    if name not in table:
        known = ", ".join(map(str, sorted(table)))
        raise InputError(f"{what} {name!r} is not known: use one of {known}.")
    return table[name] if isinstance(table, Mapping) else name


def size_text(size: Sequence[int]) -> str:
    """A spatial size for people: ``572 x 572``."""
    return " x ".join(map(str, size))
