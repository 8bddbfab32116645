"""What test_scale runs in processes of its own, with as many devices as it wants.

    python scale_worker.py OUT JOB [JOB ...]

A job is JSON: ``{"name", "mesh", "changes", "steps", "plain"}``, plain being without
augmentation. For each, OUT gets ``NAME.json`` with the collectives of the compiled step
and ``NAME.npz`` with what its steps lead to.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

import train
from configs import default
from unet_jax import compiled, distributed, run, sharding

TINY = {
    "data.cells.size": (32, 32),
    "data.cells.examples": 16,
    "data.cells.radius": (3.0, 6.0),
    "model.features": (4, 8, 16),
    "train.crop": (32, 32),
    "train.batch_size": 8,
    "optim.name": "sgd",
    "optim.momentum": 0.9,
    "optim.learning_rate": 0.02,
    "optim.schedule": "constant",
    "optim.warmup_steps": 0,
    "optim.weight_decay": 0.0,
    "augment.rotate": 20.0,
    "augment.elastic": 2.0,
    "augment.noise": 0.05,
}
PLAIN = {"augment.flip": False, "augment.quarter_turns": False}
PLAIN |= {"augment.rotate": 0.0, "augment.elastic": 0.0, "augment.noise": 0.0}


def build(mesh, changes, *, plain=False):
    config = default.get_config()
    values = {**TINY, **changes, **(PLAIN if plain else {})}
    with config.unlocked():
        for key, value in values.items():
            value = tuple(value) if isinstance(value, list) else value
            config.update_from_flattened_dict({key: value})
    data, space = mesh
    devices = jax.devices()[: data * space] if jax.process_count() == 1 else None
    return run.build(
        train.chosen(config), sharding.make_mesh(data, space, devices=devices)
    )


def do(job, out):
    wired = build(job["mesh"], job["changes"], plain=job.get("plain", True))
    program = wired.train_step.lower(wired.shapes, wired.batch_shapes()).compile()
    kinds = compiled.costs(program).collectives.items()
    said = {"collectives": {kind: [c.count, c.largest] for kind, c in kinds}}
    state, losses = wired.begin(), []
    batches = wired.placed_batches(0)
    for _ in range(job["steps"] // wired.steps_per_call):
        state, stats = program(state, next(batches))
        losses.append(np.asarray(stats["loss"]) / np.asarray(stats["count"]))
    found = wired.evaluate(state, keep=1)
    arrays = jax.tree.leaves(state.params)
    leaves = jax.tree.leaves(sharding.fetch(state.params))
    if not distributed.is_main():
        return
    said["parts"] = [x.addressable_shards[0].data.size / x.size for x in arrays]
    (out / f"{job['name']}.json").write_text(json.dumps(said))
    np.savez(
        out / f"{job['name']}.npz",
        losses=np.concatenate([np.atleast_1d(x) for x in losses]),
        parameters=np.concatenate([np.ravel(x) for x in leaves]),
        evaluation=np.array([found.results["loss"], found.results["dice"]]),
        picture=found.kept[0]["image"],
    )


def main():
    distributed.start()
    out, *jobs = sys.argv[1:]
    for text in jobs:
        do(json.loads(text), Path(out))
    return 0


if __name__ == "__main__":
    sys.exit(distributed.guarded(main))
