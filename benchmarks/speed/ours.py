"""Our side of every case, used as a user would use it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.speed.cases import CLASSES, MOMENTUM, RATE, WHITE, Case, arrays
from benchmarks.speed.rounds import Program
from unet_jax import losses, models, training
from unet_jax.meta import Meta
from unet_jax.normalisation import normalise
from unet_jax.predict import Predictor
from unet_jax.types import NumpyArray, PyTree


def model_of(case: Case) -> models.UNet:
    """Our net of a case."""
    return models.build(
        case.net,
        num_classes=CLASSES,
        features=case.features,
        padding=case.padding,
        norm=case.norm,
        deep_supervision=False,
        dropout=0.0,
        dtype=case.dtype,
    )


def stats_of(case: Case) -> dict[str, Any]:
    """The normalisation of bytes."""
    shift, scale = (0.0,) * case.channels, (1 / WHITE,) * case.channels
    return {"kind": "range", "dtype": "uint8", "shift": shift, "scale": scale}


def init_of(case: Case) -> Callable[[], training.TrainState]:
    """What makes a state at step 0."""
    shape = (1, *case.size, case.channels)
    return functools.partial(
        training.init_state, model_of(case), optimizer(), seed=0, image_shape=shape
    )


def jitted_init(case: Case) -> Any:
    """The same, to be compiled; it runs once, and so on a CPU without optimisation."""
    on_cpu = jax.default_backend() == "cpu"
    quick = {"xla_backend_optimization_level": 0} if on_cpu else None
    return jax.jit(init_of(case), compiler_options=quick)


def state_of(case: Case) -> training.TrainState:
    """A state at step 0."""
    return jitted_init(case)()


def optimizer() -> optax.GradientTransformation:
    """SGD with momentum."""
    return optax.sgd(RATE, momentum=MOMENTUM)


def batch_of(case: Case) -> dict[str, Any]:
    """A batch on the device, as the training step takes it."""
    image, label = arrays(case)
    batch = {
        "image": image,
        "label": label,
        "weight": np.ones(label.shape, np.float32),
        "index": np.arange(case.batch, dtype=np.int32),
    }
    return jax.device_put(batch)


def jitted_forward(case: Case) -> Any:
    """``(variables, image u8) -> logits``, to be compiled."""
    model, stats = model_of(case), stats_of(case)

    def forward(variables: PyTree, image: jax.Array) -> jax.Array:
        return model.apply(variables, normalise(image, stats), train=False)[0]

    return jax.jit(forward)


def step_of(case: Case) -> training.Step:
    """``(state, batch) -> (state, stats)``."""
    loss_fn = losses.build(task="classes", cross_entropy=1.0)
    return training.make_train_step(
        model_of(case), optimizer(), loss_fn, stats=stats_of(case)
    )


def jitted_step(case: Case) -> Any:
    """The same, to be compiled, the state donated."""
    return jax.jit(step_of(case), donate_argnums=0)


def forward(case: Case, variables: PyTree) -> Program:
    """Evaluation of a batch."""
    fn, image = jitted_forward(case), batch_of(case)["image"]
    return Program(lambda: fn(variables, image), jax.block_until_ready, np.asarray)


def train(case: Case, state: training.TrainState) -> Program:
    """A training step; each goes on from the last. The state given is used up."""
    step, batch = jitted_step(case), batch_of(case)

    def run() -> Any:
        nonlocal state
        state, stats = step(state, batch)
        return stats

    def value(stats: Any) -> Any:
        return np.asarray(stats["loss"] / stats["count"])

    return Program(run, lambda stats: jax.block_until_ready((state, stats)), value)


def predictor(case: Case, variables: PyTree, *, tile: int, batch: int) -> Predictor:
    """A predictor by tiles."""
    model = model_of(case)
    meta = Meta(
        model={"name": case.net, **models.fields(model)},
        task="classes",
        label_names=("background", "object"),
        normalisation=stats_of(case),
        channels=case.channels,
        rank=len(case.size),
    )
    return Predictor.from_model(model, variables, meta, tile=tile, batch_size=batch)


def predict(predictor: Predictor, image: NumpyArray) -> Program:
    """The label of a large image."""

    def run() -> NumpyArray:
        return predictor(image, probabilities=False).label

    return Program(run, lambda label: None, np.asarray)


def shapes_of(case: Case) -> tuple[training.TrainState, dict[str, Any]]:
    """The state and the batch as shapes: nothing is there yet."""
    shape = (case.batch, *case.size)
    batch = {
        "image": jax.ShapeDtypeStruct((*shape, case.channels), jnp.uint8),
        "label": jax.ShapeDtypeStruct(shape, jnp.uint8),
        "weight": jax.ShapeDtypeStruct(shape, jnp.float32),
        "index": jax.ShapeDtypeStruct((case.batch,), jnp.int32),
    }
    return jax.eval_shape(init_of(case)), batch
