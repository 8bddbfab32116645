"""U-Net and its family as pure functions in JAX and Flax.

The way of an image through the package is the list of its modules: `data` reads and
batches it, `sharding` places it, `normalisation` and `augment` prepare it inside the
compiled step, `encoders`, `decoders` and `models` turn it into logits, `losses` weigh
and `metrics` count it, `optim` and `training` learn from it, `checkpoint` remembers,
and `predict` does it again for someone else.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unet_jax.predict import Predictor as Predictor

__version__ = "0.1.0"
__all__ = ["Predictor"]


def __getattr__(name: str) -> Any:
    # Only when it is asked for: neither `import unet_jax` nor `--help` loads jax.
    if name == "Predictor":
        from unet_jax.predict import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
