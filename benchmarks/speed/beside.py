"""Forward passes, training steps and tiled predictions, ours and PyTorch's in turns.

Both sides are in one process and have the same parameters; before anything is timed,
their answers are compared.
"""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.speed import machine, ours, peers, theirs
from benchmarks.speed.cases import Case, arrays
from benchmarks.speed.rounds import Program, interleaved
from unet_jax import models, tiles
from unet_jax.types import NumpyArray

SIDE, TILE = 2000, 512  # pixels of the image and of a tile that `predict` works on


def measure(
    command: str,
    case: Case,
    *,
    peers_of: Sequence[str],
    rounds: int,
    limit: float,
    scale: float = 1.0,
) -> dict[str, Any]:
    """A row of a table.

    Args:
        command: ``forward``, ``train`` or ``predict``.
        case: What.
        peers_of: Names of `theirs.SETTINGS`.
        rounds, limit: As for `rounds.interleaved`.
        scale: Of the image and the tiles of ``predict``.

    Returns:
        A record that JSON can hold: ``seconds`` of each candidate, one a round, and
        ``difference``, the largest between ours and PyTorch's answers (of labels the
        part of pixels that differ).
    """
    begin = machine.now()
    candidates = programs(command, case, peers_of, scale=scale)
    answers = {name: p.value(p.run()) for name, p in candidates.items()}
    mine = answers.pop("ours")
    difference = max(_difference(command, mine, other) for other in answers.values())
    del answers
    seconds = interleaved(candidates, rounds=rounds, limit=limit)
    del candidates
    clear()
    tiled = command == "predict"
    return {
        "case": case.title if tiled else case.text,
        "batch": case.batch,
        "dtype": case.dtype,
        "seconds": rounded(seconds),
        "difference": float(f"{difference:.2g}"),
        **machine.told(begin),
    }


def rounded(figures: dict[str, list[float]]) -> dict[str, list[float]]:
    """To four digits, for the record."""
    return {n: [float(f"{v:.4g}") for v in some] for n, some in figures.items()}


def clear() -> None:
    """Forgets what one case compiled and held: it is of no use to the next."""
    gc.collect()
    jax.clear_caches()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _difference(command: str, mine: NumpyArray, other: NumpyArray) -> float:
    if command == "predict":
        return float(np.mean(mine != other))
    return float(np.max(np.abs(mine - other)))


def peer(case: Case, model: Any, variables: Any) -> Any:
    """The peer of our net, with its parameters, on the CPU."""
    net = peers.build(case)
    peers.move(model, jax.device_get(variables), net, case)
    return net


def programs(
    command: str, case: Case, peers_of: Sequence[str], *, scale: float = 1.0
) -> dict[str, Program]:
    """The candidates, ours the last; as for `measure`."""
    if command == "predict":
        side, tile = round(scale * SIDE), round(scale * TILE)
        image = arrays(case._replace(batch=1, size=(side, side)))[0][0]
        return predictions(case, peers_of, image, tile=tile)
    model, state, device = ours.model_of(case), ours.state_of(case), machine.device()
    given = arrays(case)
    found = {}
    for name in peers_of:
        net = peer(case, model, state.variables)
        setting = theirs.SETTINGS[name]
        found[name] = theirs.program(command, net, given, case, setting, device)
    if command == "forward":
        return {**found, "ours": ours.forward(case, state.variables)}
    return {**found, "ours": ours.train(case, state)}


def predictions(
    case: Case, peers_of: Sequence[str], image: NumpyArray, *, tile: int
) -> dict[str, Program]:
    """Candidates that predict one image by tiles; a batch is of tiles.

    Args:
        case: Of a 2-D net with same padding.
        peers_of: Names of `theirs.SETTINGS`.
        image: ``u8[H, W, C]``.
        tile: Pixels of a tile's side.
    """
    case = case._replace(size=(tile, tile))
    model, state, device = ours.model_of(case), ours.state_of(case), machine.device()
    cuts = []
    for axis, size in zip(models.covering_axes(model, 2), image.shape, strict=False):
        cut = tiles.cut(axis, size, tile=tile, overlap=0.5, blend="gaussian")
        cuts.append(theirs.Cut(cut.begins, cut.window, cut.before))

    def program(name: str) -> Program:
        setting = theirs.SETTINGS[name]
        net = theirs.place(peer(case, model, state.variables), case, setting, device)
        run: Callable[[], NumpyArray] = theirs.predict(
            net,
            image,
            cuts,
            batch=case.batch,
            case=case,
            setting=setting,
            device=device,
        )
        return Program(run, lambda label: None, np.asarray)

    predictor = ours.predictor(case, state.variables, tile=tile, batch=case.batch)
    return {
        **{name: program(name) for name in peers_of},
        "ours": ours.predict(predictor, image),
    }
