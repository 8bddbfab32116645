"""What a training step needs of each device when one image is split over devices.

    python -m benchmarks.scale

Compiles the steps for virtual devices of the CPU and runs none of them, so that the
sizes may be such as no single machine here has the memory for. Prints a row a program:
the temporaries a device needs, its share of what one device would need, and what the
devices tell each other. `docs/scale.md` has the table.
"""

import argparse
import json
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp

from unet_jax import compiled, losses, models, optim, sharding, training

CASES = {
    "2048": ("unet, 2048 x 2048", {}, (2048, 2048)),
    "valid": ("unet_2015, 2044 x 2044", {"name": "unet_2015"}, (2044, 2044)),
    "4096": ("unet, 4096 x 4096", {}, (4096, 4096)),
    "volume": (
        "unet of 32 to 512 channels, 128 x 128 x 128",
        {"features": (32, 64, 128, 256, 512)},
        (128, 128, 128),
    ),
}


def step_costs(
    fields: dict[str, object], size: tuple[int, ...], space: int
) -> tuple[compiled.Costs, float]:
    """Compiles the step of one image over ``space`` devices: costs and seconds."""
    fields = {"name": "unet", **fields}
    model = models.build(**fields, num_classes=2)  # pyright: ignore[reportArgumentType]
    tx, _ = optim.build(total_steps=100, name="sgd", learning_rate=0.1, momentum=0.9)
    mesh = sharding.make_mesh(1, space, devices=jax.devices()[:space])
    step = training.make_train_step(
        model,
        tx,
        losses.build(task="classes", cross_entropy=1.0),
        stats={"kind": "range", "dtype": "uint8", "shift": (0.0,), "scale": (1 / 255,)},
    )
    init = partial(training.init_state, model, tx, seed=0, image_shape=(1, *size, 1))
    state = jax.eval_shape(init)
    where = sharding.state_shardings(state, mesh)

    def shaped(x: jax.ShapeDtypeStruct, at: jax.sharding.Sharding) -> object:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)

    rows = size[0] + -size[0] % space
    wide = (1, rows, *size[1:])
    batch = {
        "image": jax.ShapeDtypeStruct((*wide, 1), jnp.uint8),
        "label": jax.ShapeDtypeStruct(wide, jnp.uint8),
        "weight": jax.ShapeDtypeStruct(wide, jnp.float32),
        "index": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    batch = {k: shaped(x, sharding.split(mesh, x.ndim)) for k, x in batch.items()}
    compile_step = jax.jit(
        sharding.within(mesh, step),
        out_shardings=(where, sharding.replicated(mesh)),
        donate_argnums=0,
    ).lower(jax.tree.map(shaped, state, where), batch)
    begin = time.perf_counter()
    program = compile_step.compile()
    return compiled.costs(program), time.perf_counter() - begin


def main(argv: list[str]) -> None:
    """Prints the table, or its numbers as JSON."""
    parser = argparse.ArgumentParser(description="Memory a device by the mesh.")
    add = parser.add_argument
    add("--cases", default=",".join(CASES), help="which, with commas between them")
    add("--space", default="1,4,8", help="devices that share an image")
    add("--json", action="store_true", help="one line of JSON a row instead")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    counts = [int(n) for n in arguments.space.split(",")]
    jax.config.update("jax_num_cpu_devices", max(counts))
    if not arguments.json:
        print("| net, image | space | temporaries | of one | collectives | compiled |")
        print("|---|---|---|---|---|---|")
    for case in arguments.cases.split(","):
        name, fields, size = CASES[case]
        one = None
        for space in counts:
            costs, seconds = step_costs(fields, size, space)
            assert costs.temporary is not None and costs.collectives is not None
            one = costs.temporary if one is None else one
            kinds = {kind: found.count for kind, found in costs.collectives.items()}
            if arguments.json:
                row = {"case": case, "space": space, "temporary": costs.temporary}
                print(json.dumps({**row, "collectives": kinds}), flush=True)
                continue
            said = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "none"
            print(
                f"| {name} | {space} | {costs.temporary / 2**30:.2f} GB |"
                f" 1/{one / costs.temporary:.1f} | {said} | {seconds:.0f} s |",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
