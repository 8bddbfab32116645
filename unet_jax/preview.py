"""What augmentation makes of the training data: a picture to look at before training.

A row an example: the crop as it is given, then as the first steps of the run would draw
it, by the same keys. A grid of lines on each crop moves along, and so do the tints of
the classes; what has no weight has no tint. Where weights differ they are shown below.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unet_jax import augment, overlay
from unet_jax.normalisation import normalise
from unet_jax.pictures import sheet
from unet_jax.run import Run
from unet_jax.training import augment_keys
from unet_jax.types import Array, InputError, NumpyArray

LINES = 8  # of the grid along each axis
LINE = (240, 228, 66)
PHOTOMETRIC = ("brightness", "contrast", "gamma", "noise")


def picture(run: Run, *, examples: int = 3, draws: int = 5) -> NumpyArray:
    """The first crops of a run, as given and as augmentation would draw them.

    Args:
        run: Of `unet_jax.run.build`.
        examples: Rows.
        draws: How many steps' draws of each.

    Returns:
        ``u8[H, W, 3]``. Of volumes the middle slices are shown.

    Raises:
        InputError: Nothing to draw.
    """
    if examples < 1 or draws < 1:
        raise InputError(
            f"examples = {examples} and draws = {draws} show nothing: use 1 or more of"
            " each."
        )
    rows: list[list[tuple[str, NumpyArray]]] = []
    number = 0
    for batch in run.train_batches(0):
        for b in range(len(batch["index"])):
            rows += _rows(run, {k: batch[k][b] for k in batch}, number, draws)
            number += 1
            if number == examples:
                return sheet(rows)
    raise AssertionError("training batches never end")


def _rows(
    run: Run, example: dict[str, Any], number: int, draws: int
) -> list[list[tuple[str, NumpyArray]]]:
    """The panels of one example: images, and weights where they differ."""
    given = {
        "image": normalise(example["image"], run.meta.normalisation),
        "label": jnp.asarray(example["label"], jnp.int32),
        "weight": jnp.asarray(example["weight"], jnp.float32),
    }
    key = jax.random.split(jax.random.key(run.config["seed"]))[0]
    index = jnp.asarray(example["index"], jnp.int32)[None]
    keys = jnp.concatenate([augment_keys(key, step, index) for step in range(draws)])
    drawn = _drawn(run.config["augment"], keys, given)
    grid = {**given, "image": _grid(given["image"].shape)}
    # The geometry alone: each operation has its own key, so that it is the same.
    still = {k: v for k, v in run.config["augment"].items() if k not in PHOTOMETRIC}
    moved = _drawn(still, keys, grid)["image"]
    images, weights = [], []
    for step in range(-1, draws):
        one, lines = (given, grid["image"])
        if step >= 0:
            one, lines = {k: v[step] for k, v in drawn.items()}, moved[step]
        caption = f"example {number}" if step < 0 else f"step {step}"
        images.append((caption, _panel(run, one, np.asarray(lines))))
        weights.append(np.asarray(one["weight"]))
    if all(np.isin(weight, (0, 1)).all() for weight in weights):
        return [images]
    largest = max(float(weight.max()) for weight in weights)
    panels = [
        (f"weight, at most {weight.max():.1f}", _heat(weight / largest, run))
        for weight in weights
    ]
    return [images, panels]


def _drawn(options: dict[str, Any], keys: Array, example: Any) -> Any:
    """The example under each key; as it is where nothing is to be done."""
    function = augment.build(**options)
    if function is None:
        return jax.tree.map(lambda x: jnp.stack([x] * len(keys)), example)
    return jax.jit(jax.vmap(function, (0, None)))(keys, example)


def _grid(shape: tuple[int, ...]) -> Array:
    """f32 ``[*S, 1]``: ones on lines across the last two spatial axes."""
    lines = np.zeros(shape[:-1], np.float32)
    for axis in (-2, -1):
        size = lines.shape[axis]
        width = max(size // 200, 1)
        along = np.moveaxis(lines, axis, 0)
        for begin in np.linspace(0, size - width, LINES + 1).astype(int):
            along[begin : begin + width] = 1
    return jnp.asarray(lines[..., None])


def _panel(run: Run, example: Any, lines: NumpyArray) -> NumpyArray:
    """One crop with its label and its grid: ``u8[H, W, 3]``."""
    image, label = np.asarray(example["image"]), np.asarray(example["label"])
    options: dict[str, Any] = {"task": run.meta.task}
    drawn = overlay.draw(image, label, label_names=run.meta.label_names, **options)
    plain = overlay.draw(image, label, label_names=(), **options)
    weight = np.asarray(example["weight"])
    if run.meta.task == "labels":
        weight = weight.max(axis=-1)
    drawn = np.where(weight[..., None] > 0, drawn, plain)
    part = np.clip(lines, 0, 1) * 0.8
    drawn = np.rint(drawn * (1 - part) + np.asarray(LINE) * part).astype(np.uint8)
    return drawn[len(drawn) // 2] if drawn.ndim == 4 else drawn


def _heat(weight: NumpyArray, run: Run) -> NumpyArray:
    """Weights in [0, 1] as colours, 0 in grey: ``u8[H, W, 3]``."""
    from matplotlib import colormaps

    if run.meta.task == "labels":
        weight = weight.max(axis=-1)
    weight = weight[len(weight) // 2] if weight.ndim == 3 else weight
    colours = colormaps["inferno"](weight)[..., :3] * 255
    return np.where(weight[..., None] > 0, colours, 150).astype(np.uint8)
