"""Augmentation of one example inside the compiled step: ``(key, example) -> example``.

Each operation exists twice: a deterministic function (``flip``), whose amount is an
argument and may be traced, and a random one (``random_flip``), key first, which draws
the amount. All take one example without a batch axis (``image`` f32 ``[*S, C]``,
``label`` ``[*S]`` or ``[*S, K]``, ``weight`` f32 like ``label``), keep every shape and
dtype, and are pure; the step maps them over a batch with one key an example. ``*S`` is
(H, W) or (D, H, W), read from the image.

Geometry moves image, label and weight together. Flips and quarter turns only move
pixels; ``unet_jax.warp.resample`` is the one place where they are interpolated, so that
rotation, scale, shift and elastic deformation cost one interpolation. What comes from
outside the frame is the mirrored image with weight 0.

The image is expected in its normalised range, of roughly unit scale: ``brightness`` and
``noise`` are in its units.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np

from unet_jax.types import Array, AugmentFn, Example, InputError, Shape, choose
from unet_jax.warp import (
    Interpolation,
    affine_field,
    flip_field,
    grid_displacement,
    quarter_turn_field,
    resample,
    smooth_displacement,
)

Elastic = Literal["cubic", "linear", "dense"]


def flip(example: Example, *, flipped: Any) -> Example:
    """Mirror an example along some of its spatial axes, exactly.

    Args:
        example: one example.
        flipped: for each spatial axis whether to mirror it: bool ``[rank]``, a tuple
            or an array, which may be traced.

    Returns:
        The example, mirrored where asked.
    """
    rank = _rank(example)
    flipped = jnp.asarray(flipped, jnp.bool_)
    chex.assert_shape(flipped, (rank,))

    def move(array: Array) -> Array:
        for axis in range(rank):
            array = jnp.where(flipped[axis], jnp.flip(array, axis), array)
        return array

    return _map(move, example)


def random_flip(key: Array, example: Example) -> Example:
    """Mirror along each spatial axis with probability one half."""
    return flip(example, flipped=_draw_flips(key, example))


def quarter_turn(example: Example, *, turns: Any) -> Example:
    """Turn the last two spatial axes by quarter turns, exactly, as ``np.rot90`` does.

    Args:
        example: one example.
        turns: integer ``[]``, may be traced; counter-clockwise with the row axis down.
            Where the last two spatial axes differ in size it must be even.

    Returns:
        The example, turned.

    Raises:
        InputError: an odd number of turns of axes that differ in size.
    """
    rows, columns = _rank(example) - 2, _rank(example) - 1
    shape = example["image"].shape[:-1]
    square = shape[rows] == shape[columns]
    if isinstance(turns, int) and turns % 2 and not square:
        raise InputError(
            f"{turns} quarter turns of a {shape} image change its shape: "
            "use an even number, or a square crop"
        )
    turns = jnp.asarray(turns, jnp.int32) % 4

    # A quarter turn is a transposition and mirrors, which are selections between two
    # arrays; a branch for each number of turns would compute all four under vmap.
    def move(array: Array) -> Array:
        if square:
            array = jnp.where(turns % 2 == 1, jnp.swapaxes(array, rows, columns), array)
        array = jnp.where((turns == 1) | (turns == 2), jnp.flip(array, rows), array)
        return jnp.where(turns >= 2, jnp.flip(array, columns), array)

    return _map(move, example)


def random_quarter_turn(key: Array, example: Example) -> Example:
    """Turn by 0 to 3 quarters in the last two spatial axes; 0 or 2 if not square."""
    return quarter_turn(example, turns=_draw_turns(key, example))


def random_affine(key: Array, example: Example, **options: Any) -> Example:
    """Rotate, scale and shift at once; options as for ``random_affine_field``."""
    shape = example["image"].shape[:-1]
    return resample(example, random_affine_field(key, shape, **options))


def random_affine_field(
    key: Array,
    shape: Shape,
    *,
    rotate: float = 0.0,
    scale: float = 0.0,
    shift: float = 0.0,
    rotate_3d: bool = False,
    probability: float = 1.0,
    displacement: Array | None = None,
) -> Array:
    """A random rotation, scale and shift, as the field that ``resample`` reads at.

    Args:
        key: PRNG key.
        shape: ``*S``.
        rotate: degrees; the angle is uniform in +-rotate, in the plane of the last two
            spatial axes.
        scale: the factor is log-uniform in ``[1 / (1 + scale), 1 + scale]``.
        shift: fraction of the size; the shift of each axis is uniform in +-shift.
        rotate_3d: rotate in all three planes of a volume.
        probability: how often there is any of them at all.
        displacement: f32 ``[rank, *S]``, see ``unet_jax.warp.affine_field``.

    Returns:
        f32 ``[rank, *S]``.
    """
    turn_key, zoom_key, shift_key, use_key = jax.random.split(key, 4)
    planes = 3 if rotate_3d and len(shape) == 3 else 1
    # An example that stays has amounts of 0: its field is the identity, exactly.
    use = jax.random.bernoulli(use_key, probability).astype(jnp.float32)
    angles = use * _symmetric(turn_key, math.radians(rotate), (planes,))
    zoom = jnp.exp(use * _symmetric(zoom_key, math.log1p(scale)))
    size = jnp.asarray(shape, jnp.float32)
    pixels = use * _symmetric(shift_key, shift, (len(shape),)) * size
    return affine_field(
        shape,
        angles=angles if rotate else (),
        zoom=zoom if scale else 1.0,
        shift=pixels if shift else (),
        displacement=displacement,
    )


def random_elastic(key: Array, example: Example, **options: Any) -> Example:
    """Deform elastically; options as for ``random_displacement_field``."""
    shape = example["image"].shape[:-1]
    bent = random_displacement_field(key, shape, **options)
    return resample(example, affine_field(shape, displacement=bent))


def random_displacement_field(
    key: Array,
    shape: Shape,
    *,
    elastic: float | Sequence[float] = 10.0,
    grid: int = 3,
    method: Elastic = "cubic",
    sigma: float = 0.0,
    probability: float = 1.0,
) -> Array:
    """A random smooth displacement of every pixel.

    Args:
        key: PRNG key.
        shape: ``*S``.
        elastic: deviation of the Gaussian displacements in pixels, one number or one
            for each axis.
        grid: nodes of the coarse grid along each axis, 2 or more; ``dense`` has none.
        method: how pixels between the nodes are displaced, ``cubic`` or ``linear``; or
            ``dense``: each pixel has a vector of its own, and they are smoothed.
        sigma: of the smoothing, in pixels; only ``dense`` uses it.
        probability: how often there is any displacement at all.

    Returns:
        f32 ``[rank, *S]``, pixels. At the nodes, and with ``dense`` everywhere, its
        deviation is ``elastic``.

    Reference:
        Ronneberger et al., U-Net, 2015, section 3.1: vectors on a 3 x 3 grid, Gaussian
        with 10 pixels, bicubic interpolation. ``dense``: Simard et al. 2003.
    """
    vector_key, use_key = jax.random.split(key)
    rank = len(shape)
    use = jax.random.bernoulli(use_key, probability).astype(jnp.float32)
    size = jnp.broadcast_to(jnp.asarray(elastic, jnp.float32), (rank,))
    size = (use * size).reshape(rank, *[1] * rank)
    nodes = shape if method == "dense" else (grid,) * rank
    vectors = size * jax.random.normal(vector_key, (rank, *nodes), jnp.float32)
    if method == "dense":
        return smooth_displacement(vectors, sigma=sigma)
    return grid_displacement(vectors, shape, method=method)


def brightness(example: Example, *, delta: Any) -> Example:
    """Add ``delta``, in the image's units, to every pixel and channel."""
    return _photometric(example, example["image"] + delta)


def random_brightness(key: Array, example: Example, *, limit: float) -> Example:
    """Add an amount uniform in +-limit."""
    return brightness(example, delta=_symmetric(key, limit))


def contrast(example: Example, *, factor: Any) -> Example:
    """Scale each channel about its own mean: ``(x - mean) * factor + mean``."""
    image = example["image"]
    mean = jnp.mean(image, axis=tuple(range(image.ndim - 1)), keepdims=True)
    return _photometric(example, (image - mean) * factor + mean)


def random_contrast(key: Array, example: Example, *, limit: float) -> Example:
    """Contrast by a factor log-uniform in ``[1 / (1 + limit), 1 + limit]``."""
    return contrast(example, factor=jnp.exp(_symmetric(key, math.log1p(limit))))


def gamma(example: Example, *, exponent: Any) -> Example:
    """Raise the image to a power on its own range, so that min and max stay.

    ``((x - min) / (max - min)) ** exponent * (max - min) + min``, with the extremes of
    the whole image over all channels. A constant image is unchanged.
    """
    image = example["image"]
    low, high = jnp.min(image), jnp.max(image)
    span = jnp.where(high > low, high - low, 1)
    return _photometric(example, ((image - low) / span) ** exponent * span + low)


def random_gamma(key: Array, example: Example, *, limit: float) -> Example:
    """Gamma with an exponent log-uniform in ``[1 / (1 + limit), 1 + limit]``."""
    return gamma(example, exponent=jnp.exp(_symmetric(key, math.log1p(limit))))


def noise(key: Array, example: Example, *, sigma: Any) -> Example:
    """Add independent Gaussian noise of standard deviation ``sigma``."""
    image = example["image"]
    grain = jax.random.normal(key, image.shape, jnp.float32)
    return _photometric(example, image + sigma * grain)


def random_noise(key: Array, example: Example, *, limit: float) -> Example:
    """Gaussian noise whose standard deviation is uniform in ``[0, limit]``."""
    sigma_key, noise_key = jax.random.split(key)
    sigma = jax.random.uniform(sigma_key, (), jnp.float32, 0.0, limit)
    return noise(noise_key, example, sigma=sigma)


def build(
    *,
    flip: bool = False,
    flip_axes: Sequence[int] = (),
    quarter_turns: bool = False,
    rotate: float = 0.0,
    scale: float = 0.0,
    shift: float = 0.0,
    rotate_3d: bool = False,
    elastic: float | Sequence[float] = 0.0,
    elastic_grid: int = 3,
    elastic_method: Elastic = "cubic",
    elastic_sigma: float = 12.0,
    interpolation: Interpolation = "linear",
    probability: float = 1.0,
    brightness: float = 0.0,
    contrast: float = 0.0,
    gamma: float = 0.0,
    noise: float = 0.0,
) -> AugmentFn | None:
    """The augmentations that a configuration asks for, as one function.

    The order is flips, quarter turns, the affine map, elastic deformation, contrast,
    brightness, gamma, noise. Each has its own key, so that turning one on does not
    change another.

    Args:
        flip: mirror along every spatial axis with probability one half.
        flip_axes: along these only, counted from 0; () for all. In a body left and
            right may be exchanged, front and back may not.
        quarter_turns: turn by quarters in the last two spatial axes.
        rotate: degrees, see ``random_affine``.
        scale: see ``random_affine``.
        shift: fraction of the size, see ``random_affine``.
        rotate_3d: see ``random_affine``.
        elastic: deviation of the displacements in pixels, one number or one for each
            axis; the paper's is 10, on tiles of 572 pixels. See
            ``random_displacement_field``.
        elastic_grid: nodes of the coarse grid along each axis of the crop.
        elastic_method: ``cubic``, ``linear`` or ``dense``.
        elastic_sigma: pixels over which ``dense`` is smooth.
        interpolation: of the image, ``linear`` or ``cubic``.
        probability: of rotation, scale and shift together, and of the elastic
            deformation.
        brightness: limit in the image's units.
        contrast: limit of the factor, minus 1.
        gamma: limit of the exponent, minus 1.
        noise: largest standard deviation in the image's units.

    Returns:
        ``(key, example) -> example``, or None when everything is off.

    Raises:
        InputError: an amount that is negative or not finite, a probability outside
            [0, 1], a grid of fewer than 2 nodes, or a method that is not known.
    """
    amounts: dict[str, float | Sequence[float]] = {
        "rotate": rotate,
        "scale": scale,
        "shift": shift,
        "elastic": elastic,
        "brightness": brightness,
        "contrast": contrast,
        "gamma": gamma,
        "noise": noise,
    }
    for name, amount in amounts.items():
        each = amount if isinstance(amount, Sequence) else (amount,)
        if not each or not all(0 <= value < math.inf for value in each):
            raise InputError(
                f"augment.{name}={amount} must be a finite number of 0 or more "
                "(0 turns it off; both directions are drawn)"
            )
    choose(get_args(Elastic), elastic_method, "augment.elastic_method =")
    choose(get_args(Interpolation), interpolation, "augment.interpolation =")
    if elastic_grid < 2 or not 0 < elastic_sigma < math.inf:
        raise InputError(
            f"augment.elastic_grid={elastic_grid} and elastic_sigma={elastic_sigma}"
            " must be at least 2 nodes and more than 0 pixels: the paper has a grid"
            " of 3"
        )
    if not 0 <= probability <= 1:
        raise InputError(f"augment.probability={probability} must lie in 0 to 1")
    if not all(axis in range(3) for axis in flip_axes):
        raise InputError(
            f"augment.flip_axes={tuple(flip_axes)} must be spatial axes, counted from"
            " 0: such as (1,), the columns of an image"
        )
    affine: dict[str, Any] = {"rotate": rotate, "scale": scale, "shift": shift}
    affine |= {"rotate_3d": rotate_3d, "probability": probability}
    if not (probability > 0 and (rotate > 0 or scale > 0 or shift > 0)):
        affine = {}
    bend: dict[str, Any] = {"elastic": elastic, "grid": elastic_grid}
    bend |= {"method": elastic_method, "sigma": elastic_sigma}
    bend |= {"probability": probability}
    if not (probability > 0 and np.any(np.asarray(elastic) > 0)):
        bend = {}
    limits = (contrast, brightness, gamma, noise)
    if not (flip or quarter_turns or affine or bend or any(limits)):
        return None

    def augment(key: Array, example: Example) -> Example:
        flip_key, turn_key, affine_key, *keys, elastic_key = jax.random.split(
            key, 4 + len(limits)
        )
        field = None
        if affine or bend:
            shape = example["image"].shape[:-1]
            _check_axes(elastic, len(shape))
            bent = (
                random_displacement_field(elastic_key, shape, **bend) if bend else None
            )
            field = random_affine_field(affine_key, shape, displacement=bent, **affine)
        example = _move(
            example,
            flips=_draw_flips(flip_key, example, flip_axes) if flip else None,
            turns=_draw_turns(turn_key, example) if quarter_turns else None,
            field=field,
            interpolation=interpolation,
        )
        operations = (random_contrast, random_brightness, random_gamma, random_noise)
        for operation, limit, own in zip(operations, limits, keys, strict=True):
            if limit > 0:
                example = operation(own, example, limit=limit)
        return example

    return augment


def _move(
    example: Example,
    *,
    flips: Array | None,
    turns: Array | None,
    field: Array | None,
    interpolation: Interpolation,
) -> Example:
    """Flip, then turn, then read at a field, if there is one.

    With a field the others become part of it: XLA would otherwise repeat them for
    every corner of every pixel that is interpolated (6 times slower on CPU).
    """
    if field is None:
        if flips is not None:
            example = flip(example, flipped=flips)
        if turns is not None:
            example = quarter_turn(example, turns=turns)
        return example
    if turns is not None:
        field = quarter_turn_field(field, turns=turns)
    if flips is not None:
        field = flip_field(field, flipped=flips)
    return resample(example, field, interpolation=interpolation)


def _check_axes(elastic: float | Sequence[float], rank: int) -> None:
    """Refuses a displacement for each axis that fits other images."""
    if isinstance(elastic, Sequence) and len(elastic) != rank:
        raise InputError(
            f"augment.elastic={tuple(elastic)} has {len(elastic)} numbers and the"
            f" images have {rank} axes: give one number, or one for each axis"
        )


def _draw_flips(key: Array, example: Example, axes: Sequence[int] = ()) -> Array:
    rank = _rank(example)
    if any(axis >= rank for axis in axes):
        raise InputError(
            f"augment.flip_axes={tuple(axes)} has an axis that the images, which have"
            f" {rank}, do not have: count them from 0"
        )
    allowed = np.array([axis in axes or not axes for axis in range(rank)])
    return jax.random.bernoulli(key, shape=(rank,)) & allowed


def _draw_turns(key: Array, example: Example) -> Array:
    height, width = example["image"].shape[-3:-1]
    step = 1 if height == width else 2
    return step * jax.random.randint(key, (), 0, 4 // step, jnp.int32)


def _rank(example: Example) -> int:
    return example["image"].ndim - 1


def _map(function: Callable[[Array], Array], example: Example) -> Example:
    """Apply one function to image, label and, if there is one, weight."""
    moved: Example = {
        **example,
        "image": function(example["image"]),
        "label": function(example["label"]),
    }
    if "weight" in example:
        moved["weight"] = function(example["weight"])
    return moved


def _photometric(example: Example, image: Array) -> Example:
    return {**example, "image": image.astype(example["image"].dtype)}


def _symmetric(key: Array, limit: float, shape: tuple[int, ...] = ()) -> Array:
    return jax.random.uniform(key, shape, jnp.float32, -limit, limit)
