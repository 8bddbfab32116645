"""What augmentation inside the compiled step costs: the step with it and without.

    python -m benchmarks.augmentation [--repeats=15] [--features=16,32,64,128,256]

The same batch, the same net, steps of every kind in turns; the ratio is the median of
the turns' own ratios to the plain step, so that other work on the machine cancels out.
The last column is the augmentation compiled by itself.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unet_jax import augment, losses, models, optim, training

AFFINE = {"flip": True, "quarter_turns": True, "rotate": 180.0, "scale": 0.15}
GREY = {"brightness": 0.1, "contrast": 0.2, "gamma": 0.2, "noise": 0.03}
ELASTIC = {"elastic": 10.0}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "flips and quarter turns": {"flip": True, "quarter_turns": True},
    "rotation and scale as well": AFFINE,
    "and elastic, 3 x 3 grid": AFFINE | ELASTIC,
    "and grey values": AFFINE | ELASTIC | GREY,
    "the same, elastic dense": AFFINE | GREY | ELASTIC | {"elastic_method": "dense"},
    "the same, image cubic": AFFINE | GREY | ELASTIC | {"interpolation": "cubic"},
}


def timed(function: Callable[[], Any]) -> float:
    """Seconds until the result is there."""
    begin = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begin


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", default=15, type=int)
    parser.add_argument("--features", default="16,32,64,128,256")
    parser.add_argument("--size", default=256, type=int)
    parser.add_argument("--batch_size", default=4, type=int)
    arguments = parser.parse_args()
    features = tuple(int(n) for n in arguments.features.split(","))
    model = models.build("unet", num_classes=2, features=features)
    loss_fn = losses.build(task="classes", cross_entropy=1.0, dice=1.0)
    tx, _ = optim.build(name="adamw", learning_rate=1e-3, total_steps=100)
    stats = {"shift": (0.0,), "scale": (1 / 255,)}
    shape = (arguments.batch_size, arguments.size, arguments.size)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 1), np.uint8)
    batch: Any = {
        "image": image,
        "label": (image[..., 0] > 127).astype(np.uint8),
        "weight": np.ones(shape, np.float32),
        "index": np.arange(shape[0], dtype=np.int32),
    }
    example = {
        "image": jnp.asarray(image, jnp.float32) / 255,
        "label": jnp.asarray(batch["label"], jnp.int32),
        "weight": jnp.asarray(batch["weight"]),
    }
    keys = jax.random.split(jax.random.key(0), shape[0])
    steps, alone = {}, {}
    state = training.init_state(model, tx, seed=0, image_shape=(*shape, 1))
    for name, options in KINDS.items():
        function = augment.build(**options)
        step = jax.jit(
            training.make_train_step(model, tx, loss_fn, function, stats=stats)
        )
        steps[name] = lambda step=step: step(state, batch)[1]
        timed(steps[name])
        if function is not None:
            only = jax.jit(jax.vmap(function))
            alone[name] = lambda only=only: only(keys, example)
            timed(alone[name])
    seconds = {name: [] for name in KINDS}
    for _ in range(arguments.repeats):
        for name, step in steps.items():
            seconds[name].append(timed(step))
    plain = np.asarray(seconds["plain"])
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}: {shape}, features {features}")
    print(
        "| augmentation | step, ms | ratio to plain | by itself, ms |\n"
        + 4 * "|---"
        + "|"
    )
    for name in KINDS:
        ratio = float(np.median(np.asarray(seconds[name]) / plain))
        own = ""
        if name in alone:
            own = f"{1e3 * np.median([timed(alone[name]) for _ in range(15)]):.1f}"
        step = 1e3 * np.median(seconds[name])
        print(f"| {name} | {step:.0f} | {ratio:.3f} | {own} |")


if __name__ == "__main__":
    main()
