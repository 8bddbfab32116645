"""What ``unet-jax evaluate --metrics`` can measure: a row an image, then the figures.

Every measure counts one image at a time (`Measure.count`) and makes its figures from
the rows of all (`Measure.summarise`), so that images can be drawn again for intervals.

    pixels     Dice, IoU, precision, recall, accuracy (`unet_jax.metrics`)
    isbi2012   V_Rand, V_Info, pixel and Rand error (`unet_jax.partition`)
    objects    panoptic quality, AP, F1, SEG of instances (`unet_jax.objects`)
    boundary   Hausdorff 95 and surface Dice of each class (`unet_jax.boundary`)
    roads      relaxed break-even point (`unet_jax.boundary`)
    nvidia     the soft Dice of NVIDIA's U-Net on ISBI 2012
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from unet_jax import boundary, metrics, models, objects, partition, postprocess
from unet_jax.data.border import instances_of
from unet_jax.data.source import NoInstances, Source, instances
from unet_jax.predict import Prediction, Predictor, make_probability_fn
from unet_jax.types import Example, InputError, NumpyArray, Task, choose, size_text

# NVIDIA's net sees 388 pixels with 92 of its mid-grey around them.
_INNER, _OUTER = (388, 388), (572, 572)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all images of a data set have in common.

    Attributes:
        predictor: The net.
        task: ``classes`` or ``labels``.
        label_names: Of the K classes or labels.
        empty: See `unet_jax.metrics`.
        tolerance: Of surface Dice and of roads, in pixels or units of ``spacing``; None
            for 1 and 3.
        spacing: Size of a pixel along each axis, for ``boundary``.
        instances: Options of `unet_jax.postprocess.instances`, for ``objects``.
    """

    predictor: Predictor
    task: Task
    label_names: tuple[str, ...]
    empty: metrics.Empty = "skip"
    tolerance: float | None = None
    spacing: tuple[float, ...] | None = None
    instances: dict[str, Any] = dataclasses.field(default_factory=dict)


class Case(NamedTuple):
    """One image: what is true and what the net says.

    Attributes:
        example: ``image``, ``label`` and ``weight`` as the task wants them.
        prediction: With its probability.
        objects: ``() -> i32[*S]``, the number of the object each pixel belongs to.
    """

    example: Example
    prediction: Prediction
    objects: Callable[[], NumpyArray]


@dataclasses.dataclass(frozen=True)
class Measure:
    """How a measure counts one image, and what follows from all rows ``[N, ...]``."""

    count: Callable[[Case], NumpyArray]
    summarise: Callable[[NumpyArray], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Rows:
    """What was counted of a source.

    Attributes:
        index: ``i64[N]``, the numbers of the examples, rising. Those of which nothing
            has weight are not among them.
        of: By the name of a measure the rows ``[N, ...]``, and what summarises them.
    """

    index: NumpyArray
    of: dict[str, tuple[NumpyArray, Measure]]

    def only(self, index: NumpyArray) -> "Rows":
        """The rows of some examples: those that are in ``index`` as well."""
        kept = np.isin(self.index, index)
        of = {name: (rows[kept], kind) for name, (rows, kind) in self.of.items()}
        return Rows(self.index[kept], of)


def rows(
    names: Sequence[str],
    setting: Setting,
    source: Source,
    *,
    done: Callable[[int], Any] | None = None,
) -> Rows:
    """Measures every image of a source of which anything has weight.

    Args:
        names: Keys of `MEASURES`.
        setting: The net and how it is measured.
        source: Examples as the task wants them (`unet_jax.data.source.Labelled`).
        done: Called with the number of each image that is done with.

    Raises:
        InputError: A measure that is not known or does not fit the task; nothing in
            the source has weight.
    """
    made = {name: choose(MEASURES, name, "--metrics =")(setting) for name in names}
    counted: dict[str, list[NumpyArray]] = {name: [] for name in names}
    index = []
    for i in range(len(source)):
        example = source[i]
        # Not all measures ask for the weight, and one that is left out has no truth.
        if (np.asarray(example.get("weight", 1)) > 0).any():
            prediction = setting.predictor(example["image"], name=source.name(i))
            case = Case(example, prediction, functools.partial(_objects, source, i))
            for name, measure in made.items():
                counted[name].append(measure.count(case))
            index.append(i)
        if done is not None:
            done(i)
    if not index:
        raise InputError(
            f"nothing counts in any of the {len(source)} examples, {source.name(0)}"
            " among them: measure a --split whose masks leave something to count."
        )
    of = {name: (np.stack(counted[name]), made[name]) for name in names}
    return Rows(np.asarray(index), of)


def _objects(source: Source, i: int) -> NumpyArray:
    """The objects that the source knows, else the connected parts of its label."""
    try:
        return instances(source, i)
    except NoInstances:
        label = source[i]["label"]
        return instances_of(
            label[..., 0] if label.ndim > len(source.size(i)) else label
        )


# --- What is foreground --------------------------------------------------------------


def _foreground(case: Case, setting: Setting) -> tuple[NumpyArray, NumpyArray]:
    """The probability ``f32[*S]`` of not being class 0, and where that is true."""
    probability, label = case.prediction.probability, case.example["label"]
    assert probability is not None
    if setting.task == "labels":
        return probability[..., 0], label[..., 0] > 0
    return 1 - probability[..., 0], label > 0


def _weight(case: Case, setting: Setting) -> NumpyArray:
    weight = case.example.get("weight")
    assert weight is not None
    return weight[..., 0] if setting.task == "labels" else weight


def _one(setting: Setting, name: str) -> None:
    """Refuses several labels, of which none is the foreground."""
    if setting.task == "labels" and len(setting.label_names) > 1:
        raise InputError(
            f"--metrics={name} asks for one foreground, and this net has the labels"
            f" {', '.join(setting.label_names)}: train one on a single label, or with"
            " the task classes."
        )


def _two(setting: Setting, name: str) -> None:
    _one(setting, name)
    if setting.task == "classes" and len(setting.label_names) != 2:
        raise InputError(
            f"--metrics={name} asks for two classes, and this net has"
            f" {', '.join(setting.label_names)}."
        )


def _images(setting: Setting, name: str) -> None:
    if setting.predictor.meta.rank != 2:
        raise InputError(f"--metrics={name} is of images, and this net is of volumes.")


# --- The measures --------------------------------------------------------------------


def _pixels(setting: Setting) -> Measure:
    classes = len(setting.label_names)
    options: dict[str, Any] = {"task": setting.task}

    def count(case: Case) -> NumpyArray:
        label, weight = case.example["label"], case.example.get("weight")
        assert weight is not None
        said = case.prediction.label
        if setting.task == "labels":
            said = said.reshape(label.shape)
            tables = [
                _table(label[..., k], said[..., k], weight[..., k], 2)
                for k in range(classes)
            ]
            return np.stack(tables)
        return _table(label, said, weight, classes)

    summarise = functools.partial(
        metrics.summarise,
        label_names=setting.label_names,
        empty=setting.empty,
        **options,
    )
    return Measure(count, summarise)


def _table(
    label: NumpyArray, said: NumpyArray, weight: NumpyArray, classes: int
) -> NumpyArray:
    """``i64[classes, classes]``, [true, predicted]."""
    counted = weight > 0
    pairs = label[counted].astype(np.int64) * classes + said[counted]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def _isbi2012(setting: Setting) -> Measure:
    _two(setting, "isbi2012")
    _images(setting, "isbi2012")

    def count(case: Case) -> NumpyArray:
        probability, label = _foreground(case, setting)
        return partition.isbi2012_counts(np.clip(probability, 0, 1), label)

    return Measure(count, partition.isbi2012)


def _of_objects(setting: Setting) -> Measure:
    _one(setting, "objects")
    options = {"threshold": setting.predictor.meta.threshold, **setting.instances}

    def count(case: Case) -> NumpyArray:
        probability, _ = _foreground(case, setting)
        found = postprocess.instances(probability, **options)
        return objects.counts(case.objects(), found, _weight(case, setting))

    return Measure(count, objects.summarise)


def _boundary(setting: Setting) -> Measure:
    inner = [
        (k, name) for k, name in enumerate(setting.label_names) if name != "background"
    ]
    tolerance = 1.0 if setting.tolerance is None else setting.tolerance
    spacing = setting.spacing or None

    def count(case: Case) -> NumpyArray:
        label, weight = case.example["label"], case.example.get("weight")
        assert weight is not None
        said = case.prediction.label
        row = []
        for k, _ in inner:
            if setting.task == "labels":
                true, found = label[..., k] > 0, said.reshape(label.shape)[..., k] > 0
                counted = weight[..., k] > 0
            else:
                true, found, counted = label == k, said == k, weight > 0
            true, found = true & counted, found & counted
            row.append(
                [
                    boundary.hausdorff(true, found, spacing=spacing),
                    boundary.surface_dice(
                        true, found, tolerance=tolerance, spacing=spacing
                    ),
                ]
            )
        return np.asarray(row)

    def summarise(rows: NumpyArray) -> dict[str, float]:
        means = rows.mean(axis=0)
        figures = {}
        for j, key in enumerate(("hausdorff95", "surface_dice")):
            for (_, name), row in zip(inner, means, strict=True):
                figures[f"{key}/{name}"] = float(row[j])
        return figures

    return Measure(count, summarise)


def _roads(setting: Setting) -> Measure:
    _one(setting, "roads")
    tolerance = 3.0 if setting.tolerance is None else setting.tolerance

    def count(case: Case) -> NumpyArray:
        probability, label = _foreground(case, setting)
        weight = _weight(case, setting)
        return boundary.relaxed_counts(probability, label, weight, tolerance=tolerance)

    return Measure(count, boundary.break_even)


def _nvidia(setting: Setting) -> Measure:
    """The Dice that NVIDIA's TensorFlow 2 UNet_Medical reports on ISBI 2012.

    The image is brought to 388 x 388 (linear, no antialiasing), mid-grey is put around
    it up to 572 x 572, and what the net says about the 388 x 388 is compared with the
    label of that size: for each class 2 sum(p t) / sum(p^2 + t^2) with its probability
    p, then the mean of both classes and of the images. NVIDIA's 0.8900 is a mean over
    five folds that overlap, of images drawn at random, so that neighbours of an image
    are among those trained on.
    """
    _two(setting, "nvidia")
    _images(setting, "nvidia")

    predictor = setting.predictor
    nets = [
        functools.partial(
            jax.jit(
                make_probability_fn(
                    net.model, task=setting.task, stats=net.meta.normalisation
                )
            ),
            net.variables,
        )
        for net in predictor.nets
    ]
    out = models.output_size(predictor.model, _OUTER)
    if min(out) < _INNER[0]:
        raise InputError(
            f"--metrics=nvidia gives the net {size_text(_OUTER)} pixels and needs"
            f" {size_text(_INNER)} back; this one answers {size_text(out)}."
        )

    def count(case: Case) -> NumpyArray:
        framed, true = nvidia_pair(case.example, task=setting.task)
        found = sum(np.asarray(net(framed[None])[0]) for net in nets) / len(nets)
        begins = [(n - m) // 2 for n, m in zip(out, _INNER, strict=True)]
        inner = (slice(b, b + n) for b, n in zip(begins, _INNER, strict=True))
        probability = np.asarray(found)[tuple(inner)].astype(np.float64)
        if setting.task == "labels":
            probability = np.concatenate([1 - probability, probability], axis=-1)
        together = 2 * (probability * true).sum((0, 1)) + 1e-6
        return together / ((probability**2 + true**2).sum((0, 1)) + 1e-6)

    def summarise(rows: NumpyArray) -> dict[str, float]:
        return {"nvidia_dice": float(rows.mean())}

    return Measure(count, summarise)


def nvidia_pair(example: Example, *, task: Task) -> tuple[NumpyArray, NumpyArray]:
    """An image and its truth as NVIDIA's protocol has them.

    Args:
        example: ``image [H, W, C]``, ``label``.
        task: ``classes`` or ``labels``.

    Returns:
        The image with mid-grey around it, ``f32[572, 572, C]`` in the stored range, and
        the truth of both classes, zeros and ones, ``f64[388, 388, 2]``.
    """

    def resized(x: NumpyArray) -> NumpyArray:
        shape = (*_INNER, *x.shape[2:])
        whole = x.astype(np.float32)
        return np.asarray(jax.image.resize(whole, shape, "linear", antialias=False))

    image = example["image"]
    # Theirs are zeros, around an image that goes from -1 to 1.
    middle = 0.0 if image.dtype.kind == "f" else np.iinfo(image.dtype).max / 2
    edge = (_OUTER[0] - _INNER[0]) // 2
    widths = ((edge, edge), (edge, edge), (0, 0))
    framed = np.pad(resized(image), widths, constant_values=np.float32(middle))
    label = example["label"][..., 0] if task == "labels" else example["label"]
    true = (resized(label > 0) >= 0.5).astype(np.float64)
    return framed, np.stack([1 - true, true], axis=-1)


MEASURES: dict[str, Callable[[Setting], Measure]] = {
    "pixels": _pixels,
    "isbi2012": _isbi2012,
    "objects": _of_objects,
    "boundary": _boundary,
    "roads": _roads,
    "nvidia": _nvidia,
}
"""By name."""
