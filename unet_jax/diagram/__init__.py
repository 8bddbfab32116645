"""A net seen as a U: every node's shape, what skips carry, what each level costs.

`describe` traces a net and answers with a `Diagram`; `text` writes it for a terminal,
`draw` as a picture. The grid of UNet++ is drawn as its triangle.
"""

from collections.abc import Sequence
from pathlib import Path

from unet_jax.diagram.drawing import draw
from unet_jax.diagram.net import Cost, Diagram, Node, Part, Skip, describe
from unet_jax.diagram.text import text
from unet_jax.models import UNet

__all__ = [
    "Cost",
    "Diagram",
    "Node",
    "Part",
    "Skip",
    "describe",
    "draw",
    "print_and_draw",
    "text",
]


def print_and_draw(
    model: UNet, size: Sequence[int], channels: int, out: str | Path | None = None
) -> None:
    """Prints a net's diagram and draws it where a path is given.

    Args:
        model: The net.
        size: The image's spatial size.
        channels: The image's.
        out: Where to draw it, ``.png`` or ``.svg``; None: nowhere.

    Raises:
        InputError: A size the net does not work at, or another ending of ``out``.
    """
    diagram = describe(model, size, channels)
    if out is not None:
        draw(diagram, out)
    print(text(diagram))
    if out is not None:
        print(f"drawn to {out}")
