"""A real training of ours, in a process of its own that runs as long as it is told.

Built by `unet_jax.run.build` from ``configs/default.py``, as train.py does, with the
loop's order: a step is begun, and then the next batch is asked for.
"""

from pathlib import Path
from typing import Any

from benchmarks.speed.end_to_end import SETTINGS, Setup, serve


def config_of(setup: Setup, *, resident: bool, steps_per_call: int) -> dict[str, Any]:
    """The config of the run.

    Args:
        setup: What is trained on what.
        resident: Whether the data set lies on the device, where there is a choice.
        steps_per_call: Of a dispatch.
    """
    from configs import default
    from train import chosen

    config = chosen(default.get_config())
    config["data"]["cells"] = {"size": setup.size, "examples": setup.examples}
    config["model"] = {
        "name": "unet",
        "features": setup.features,
        "dtype": setup.dtype,
    }
    config["augment"] = {
        "rotate": SETTINGS.rotate,
        "elastic": SETTINGS.elastic,
        "brightness": SETTINGS.brightness,
        "noise": SETTINGS.noise,
    }
    config["loss"] = {"cross_entropy": 1.0}
    config["optim"] = {
        "name": "sgd",
        "learning_rate": SETTINGS.rate,
        "momentum": SETTINGS.momentum,
        "schedule": "constant",
    }
    train = config["train"]
    train |= {"batch_size": setup.batch, "crop": setup.crop, "steps": 10**6}
    # What happens every so many steps is of whole calls.
    train |= {"steps_per_call": steps_per_call, "log_every": 8 * steps_per_call}
    train |= {"eval_every": 10**6, "save_every": 10**6, "ema": 0.0}
    config["mesh"]["data"] = 1
    if where := section():
        config[where]["resident"] = resident
    return config


def section() -> str:
    """The section with the key ``resident``, or "" where there is none."""
    from configs import default

    config: Any = default.get_config()
    return next((s for s in ("data", "train") if "resident" in config[s]), "")


def main(setup: Setup, *, resident: bool, steps_per_call: int) -> None:
    """Trains as long as it is told; see `end_to_end.serve`."""
    import jax

    from unet_jax import sharding
    from unet_jax.run import build

    config = config_of(setup, resident=resident, steps_per_call=steps_per_call)
    run = build(config, sharding.make_mesh(1, 1))
    state, batches = run.begin(), run.placed_batches(0)
    batch = next(batches)
    step_fn = run.train_step.lower(state, batch).compile()
    stats: Any = None

    def call() -> int:
        nonlocal state, batch, stats
        state, stats = step_fn(state, batch)
        batch = next(batches)
        return setup.batch * steps_per_call

    serve(call, lambda: jax.block_until_ready(stats), setup)


def data_of(setup: Setup, path: Path) -> None:
    """Writes what the other side trains on: the same examples, decoded."""
    import numpy as np

    from unet_jax.data import cells

    source = cells.open(split="train", size=setup.size, examples=setup.examples)
    examples = [source[i] for i in range(len(source))]
    np.savez(
        path,
        image=np.stack([example["image"] for example in examples]),
        label=np.stack([example["label"] for example in examples]),
    )
