"""What a data source is, and the layers that every source is wrapped in.

A source is a random-access list of examples. It knows nothing about batches, crops,
epochs, valid padding or the task: ``plan`` and ``batches`` do that for all of them.
``data.build`` stacks the wrappers in this order::

    Labelled(Skipping(Cached(Standardised(Bordered(Resized(Checked(source)))))))

of which `keeping.Skipping`, `border.Bordered` and `Resized` are there if they are asked
for, the border around the training part only. `keeping.Mapped` may stand for `Cached`.
"""

import threading
from typing import Protocol, cast

import numpy as np

from unet_jax import normalisation
from unet_jax.data.stacks import resample_to
from unet_jax.types import Example, InputError, NumpyArray, Shape, Task, size_text


class Source(Protocol):
    """A random-access list of examples; safe to read from several threads at once.

    ``label_names``: the names of the class ids 0 .. K-1; id 0 is the background.

    ``source[i]``: the example, NumPy arrays: image ``[*S, C]`` u8, u16 or f32 as
        stored (any range); label ``[*S]`` class ids of any integer dtype; and, where
        not all pixels count alike, weight ``f32[*S]`` (0: not counted; the label there
        may be anything). The caller may not write into the arrays.

    A source that tells objects of one class apart also has a method of the signature of
    `instances`, less the source, which gives their numbers.

    A source of labels that may overlap has the attribute ``overlapping = True``. Its
    ``label_names`` are K labels without a background, its label ``u8[*S, K]`` zeros and
    ones, and its weight, if any, ``f32[*S]`` or ``f32[*S, K]``: 0 where that label is
    not annotated.
    """

    @property
    def label_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Example: ...

    def name(self, i: int, /) -> str:
        """The file name, or what else a person knows example i by."""
        ...

    def size(self, i: int, /) -> Shape:
        """The spatial shape of example i, found without decoding it if possible."""
        ...


class NoInstances(InputError):
    """The source has classes only, and no numbers of objects."""


def overlapping(source: Source) -> bool:
    """Whether a pixel of the source may have several labels (see `Source`)."""
    return bool(getattr(source, "overlapping", False))


def instances(source: Source, i: int) -> NumpyArray:
    """The number of the object that each pixel of example i belongs to.

    Returns:
        ``i32[*S]``, 0 for the background and above 0 for objects; numbers may be left
        out.

    Raises:
        NoInstances: a source that has none: `border.instances_of` makes some of a
            label.
        InputError: what reading them raises.
    """
    own = getattr(source, "instances", None)
    if own is None:
        raise NoInstances(
            f"{source.name(i)} comes with classes and without numbers of objects: save "
            "masks with one number for each object, for a source that reads these "
            "(folder and volumes with mask=instances, ctc)."
        )
    return own(i)


class Wrapper:
    """A source around another; passes everything through."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.source.label_names

    @property
    def overlapping(self) -> bool:
        return overlapping(self.source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int, /) -> Example:
        return self.source[i]

    def name(self, i: int, /) -> str:
        return self.source.name(i)

    def size(self, i: int, /) -> Shape:
        return self.source.size(i)

    def instances(self, i: int, /) -> NumpyArray:
        """`instances` of the source within; of the size of this one's examples."""
        return instances(self.source, i)


class Checked(Wrapper):
    """Refuses, by name, an example that would fail later inside a compiled step.

    Args:
        source: any source.
        channels, rank, dtype: what every image must have, those of the first example
            of the training split.
        label_names: of all classes of the data set, instead of the source's own.
    """

    def __init__(
        self,
        source: Source,
        *,
        channels: int,
        rank: int,
        dtype: np.dtype,
        label_names: tuple[str, ...] = (),
    ) -> None:
        super().__init__(source)
        self.channels, self.rank, self.dtype = channels, rank, dtype
        self._label_names = label_names

    @property
    def label_names(self) -> tuple[str, ...]:
        return self._label_names or self.source.label_names

    def __getitem__(self, i: int, /) -> Example:
        example = self.source[i]
        image, label = example["image"], example["label"]
        name = self.name(i)
        if image.ndim != self.rank + 1:
            raise InputError(
                f"{name} has {image.ndim - 1} spatial axes, but the first training "
                f"image has {self.rank}: keep 2-D images and volumes apart."
            )
        if image.shape[-1] != self.channels:
            raise InputError(
                f"{name} has {image.shape[-1]} channels, but the first training image "
                f"has {self.channels}: set the source's option `channels` to convert "
                "all of them."
            )
        if image.dtype != self.dtype:
            raise InputError(
                f"{name} is stored as {image.dtype}, but the first training image as "
                f"{self.dtype}: convert the files to one type, so that one brightness "
                "means one thing."
            )
        size = image.shape[:-1]
        have = label.shape[: self.rank] if self.overlapping else label.shape
        if have != size:
            raise InputError(
                f"The mask of {name} has the size {size_text(have)}, but the "
                f"image {size_text(size)}: give them the same size."
            )
        if image.dtype.kind == "f" and not np.isfinite(image).all():
            raise InputError(
                f"{name} has pixels that are NaN or infinite: replace them in the file "
                "or leave it out."
            )
        self._check_label(example, name)
        return example

    def _check_label(self, example: Example, name: str) -> None:
        label, names = example["label"], self.label_names
        if label.dtype.kind not in "iu":
            raise InputError(
                f"The mask of {name} holds {label.dtype} numbers: give class ids as "
                "whole numbers."
            )
        weight = example.get("weight")
        if self.overlapping:
            self._check_planes(label, weight, name)
            return
        bad = (label < 0) | (label >= len(names))
        if weight is not None:
            bad &= weight > 0
        if bad.any():
            value = label[bad].flat[0]
            raise InputError(
                f"The mask of {name} has the value {value}, but the {len(names)} "
                f"classes {', '.join(names)} are numbered 0 to {len(names) - 1}: mend "
                "the mask or name more classes in `label_names`."
            )

    def _check_planes(
        self, label: NumpyArray, weight: NumpyArray | None, name: str
    ) -> None:
        names, planes = self.label_names, label.shape[self.rank :]
        if planes != (len(names),):
            raise InputError(
                f"The mask of {name} has {size_text(planes) or 'no'} planes, but there "
                f"are {len(names)} labels, {', '.join(names)}: give one for each."
            )
        if weight is None:
            weight = np.ones(label.shape[:-1], np.float32)
        if weight.shape not in (label.shape, label.shape[:-1]):
            raise InputError(
                f"The weight of {name} has the size {size_text(weight.shape)}, but the "
                f"labels {size_text(label.shape)}: give them the same size, or one "
                "weight a pixel."
            )
        if weight.ndim < label.ndim:
            weight = weight[..., None]
        bad = ((label < 0) | (label > 1)) & (weight > 0)
        if bad.any():
            raise InputError(
                f"The mask of {name} has the value {label[bad].flat[0]}, but a plane "
                "of a label holds zeros and ones: mend the mask."
            )


class Resized(Wrapper):
    """Every example brought to one size, whatever becomes of its proportions.

    The image is interpolated linearly, and averaged first over what falls between the
    new pixels where it shrinks; label, weight and objects take the nearest pixel.

    Args:
        source: any source with one example or more.
        shape: pixels of each spatial axis, 1 or more.

    Raises:
        InputError: a size of another rank than the first example, or below 1.
    """

    def __init__(self, source: Source, shape: Shape) -> None:
        super().__init__(source)
        self.shape = tuple(map(int, shape))
        rank = len(source.size(0))
        if len(self.shape) != rank or min(self.shape) < 1:
            raise InputError(
                f"data.resize is {self.shape}, but the images have {rank} axes: give "
                f"{rank} numbers of 1 or more, or () to leave them as they are."
            )

    def __getitem__(self, i: int, /) -> Example:
        example = self.source[i].copy()
        example["image"] = _linear(example["image"], self.shape)
        example["label"] = resample_to(example["label"], self.shape, order=0)
        if "weight" in example:
            example["weight"] = resample_to(example["weight"], self.shape, order=0)
        return example

    def size(self, i: int, /) -> Shape:
        return self.shape

    def instances(self, i: int, /) -> NumpyArray:
        return resample_to(super().instances(i), self.shape, order=0)


class Standardised(Wrapper):
    """Images with mean 0 and standard deviation 1 each, as f32.

    The one normalisation that is done at loading: a crop does not know the statistics
    of the volume it was cut from.
    """

    def __getitem__(self, i: int, /) -> Example:
        example = self.source[i].copy()
        example["image"] = normalisation.standardise(example["image"])
        return example


class Cached(Wrapper):
    """Keeps decoded examples in memory, first come first kept, up to a budget.

    What is kept is never dropped: with an epoch's random order, dropping the oldest
    would miss almost every time on a data set slightly larger than the budget.

    Args:
        source: any source whose examples are always the same.
        megabytes: the budget in 2^20 bytes, 0 or more.
    """

    def __init__(self, source: Source, megabytes: float) -> None:
        super().__init__(source)
        self._left = int(megabytes * 2**20)
        self._kept: dict[int, Example] = {}
        self._lock = threading.Lock()

    def __getitem__(self, i: int, /) -> Example:
        found = self._kept.get(i)
        if found is not None:
            return found
        example = self.source[i]
        arrays = cast(dict[str, NumpyArray], example).values()
        size = sum(array.nbytes for array in arrays)
        with self._lock:
            if i not in self._kept and size <= self._left:
                self._left -= size
                for array in arrays:
                    array.flags.writeable = False
                self._kept[i] = example
        return example


class Labelled(Wrapper):
    """Examples as the task wants them, always with a weight.

    Args:
        source: any source; its label is class ids 0 .. K-1, of which 0 is background,
            or K overlapping labels.
        task: ``classes`` keeps the ids, label ``[*S]``; ``labels`` gives one plane of
            zeros and ones for each id but 0, label ``u8[*S, K-1]``, and names K-1.
            Overlapping labels stay as they are.

    Raises:
        InputError: ``labels`` with no class beside the background; ``classes`` of
            labels that overlap.
    """

    def __init__(self, source: Source, *, task: Task) -> None:
        super().__init__(source)
        if self.overlapping and task == "classes":
            raise InputError(
                f"A pixel of the data may have several of the labels "
                f"{', '.join(source.label_names)} (the labels overlap): use "
                "--config.task=labels."
            )
        if task == "labels" and not self.overlapping and len(source.label_names) < 2:
            raise InputError(
                f"The data has no class but {', '.join(source.label_names)}, which "
                "the task `labels` counts as background: name a second one in "
                "`label_names`."
            )
        self.task = task

    @property
    def label_names(self) -> tuple[str, ...]:
        names = self.source.label_names
        return names if self.task == "classes" or self.overlapping else names[1:]

    def __getitem__(self, i: int, /) -> Example:
        example = self.source[i]
        label, weight = example["label"], example.get("weight")
        if weight is None:
            weight = np.ones(label.shape, np.float32)
        if self.overlapping:
            label = label.astype(np.uint8, copy=False)
        elif self.task == "labels":
            ids = np.arange(1, len(self.source.label_names))
            label = (label[..., None] == ids).astype(np.uint8)
        if weight.ndim < label.ndim:
            weight = np.broadcast_to(weight[..., None], label.shape)
        return {"image": example["image"], "label": label, "weight": weight}


def _linear(image: NumpyArray, shape: Shape) -> NumpyArray:
    """``[*S, C]`` -> ``[*shape, C]`` of the same dtype, one axis after another."""
    from PIL import Image

    array = image.astype(np.float32)
    for axis, new in enumerate(shape):
        if array.shape[axis] == new:
            continue
        rows = np.moveaxis(array, axis, 0)
        # Pillow knows planes of f32; of this one it only touches the height.
        plane = Image.fromarray(np.ascontiguousarray(rows.reshape(len(rows), -1)))
        plane = plane.resize((plane.width, new), Image.Resampling.BILINEAR)
        rows = np.asarray(plane).reshape(new, *rows.shape[1:])
        array = np.moveaxis(rows, 0, axis)
    if image.dtype.kind in "iu":
        array = np.rint(array)
    return np.ascontiguousarray(array.astype(image.dtype))
