"""PyTorch's side of every case, as a good user would set it up."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.speed import peers
from benchmarks.speed.cases import MOMENTUM, RATE, WHITE, Case
from benchmarks.speed.rounds import Program
from unet_jax.types import InputError, NumpyArray


class Setting(NamedTuple):
    """How a net is run.

    Attributes:
        last: Channels last in memory.
        compiled: Through `torch.compile`.
    """

    last: bool = False
    compiled: bool = False


SETTINGS: dict[str, Setting] = {
    "eager": Setting(),
    "channels_last": Setting(last=True),
    "compiled": Setting(last=True, compiled=True),
}


def prepare(device: str, cores: int) -> None:
    """Sets PyTorch up for speed: all cores, the fastest algorithms, TF32 allowed.

    Args:
        device: ``cpu`` or ``cuda``.
        cores: To use.

    Raises:
        InputError: There is no such device.
    """
    torch.set_num_threads(cores)
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise InputError(
            "jax runs on a GPU here and this PyTorch has none: install PyTorch for"
            " CUDA (pytorch.org says how), or set JAX_PLATFORMS=cpu."
        )
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")


def layout(case: Case, setting: Setting) -> torch.memory_format:
    """How maps lie in memory."""
    if not setting.last:
        return torch.contiguous_format
    return torch.channels_last if len(case.size) == 2 else torch.channels_last_3d


def place(net: nn.Module, case: Case, setting: Setting, device: str) -> nn.Module:
    """A net on its device, in its layout, to be compiled where that is asked for."""
    net = net.to(device)
    # nn.Module.to takes a memory format by one overload that type checkers miss.
    net = net.to(memory_format=layout(case, setting))  # pyright: ignore
    return torch.compile(net) if setting.compiled else net  # pyright: ignore


def tensors(
    arrays: tuple[NumpyArray, NumpyArray], case: Case, setting: Setting, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels on the device: normalised already, channels first.

    Args:
        arrays: ``u8[B, *S, C]`` and ``u8[B, *S]``.
        case, setting, device: As everywhere.
    """
    image, label = arrays
    first = np.moveaxis(image, -1, 1).astype(np.float32) / np.float32(WHITE)
    x = torch.from_numpy(first).to(device)
    x = x.contiguous(memory_format=layout(case, setting))
    return x, torch.from_numpy(label.astype(np.int64)).to(device)


def cast(case: Case, device: str) -> Any:
    """The context to compute in: autocast for bfloat16."""
    return torch.autocast(
        device, dtype=torch.bfloat16, enabled=case.dtype == "bfloat16"
    )


def wait(device: str) -> Callable[[Any], object]:
    """What waits for a result."""
    return (lambda _: None) if device == "cpu" else (lambda _: torch.cuda.synchronize())


def to_numpy(x: torch.Tensor) -> NumpyArray:
    """Logits with channels last, or a number."""
    found = x.detach().float().cpu().numpy()
    return np.moveaxis(found, 1, -1) if found.ndim else found


def forward(
    net: nn.Module, x: torch.Tensor, case: Case, device: str
) -> Callable[[], torch.Tensor]:
    """Evaluation of a batch."""
    net.eval()

    def run() -> torch.Tensor:
        with torch.inference_mode(), cast(case, device):
            return net(x)

    return run


def train(
    net: nn.Module, x: torch.Tensor, y: torch.Tensor, case: Case, device: str
) -> Callable[[], torch.Tensor]:
    """A training step; each goes on from the last."""
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), RATE, MOMENTUM, fused=True)
    label: list[torch.Tensor] = []

    def run() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with cast(case, device):
            logits = net(x)
            if not label:  # once: a valid net's logits are smaller
                label.append(_middle(y, logits.shape[2:]))
            loss = F.cross_entropy(logits, label[0])
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def _middle(y: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return peers.centre(y[:, None], size)[:, 0].contiguous()


def program(
    command: str,
    net: nn.Module,
    arrays: tuple[NumpyArray, NumpyArray],
    case: Case,
    setting: Setting,
    device: str,
) -> Program:
    """A candidate.

    Args:
        command: ``forward`` or ``train``.
        net: On the CPU; it is used up.
        arrays: As for `tensors`.
        case, setting, device: As everywhere.
    """
    x, y = tensors(arrays, case, setting, device)
    net = place(net, case, setting, device)
    if command == "forward":
        run = forward(net, x, case, device)
    else:
        run = train(net, x, y, case, device)
    return Program(run, wait(device), to_numpy)


class Cut(NamedTuple):
    """Where tiles lie along an axis.

    Attributes:
        begins: Of each, in the padded image.
        window: Pixels of one.
        before: Pixels mirrored before the image.
    """

    begins: tuple[int, ...]
    window: int
    before: int


def predict(
    net: nn.Module,
    image: NumpyArray,
    cuts: Sequence[Cut],
    *,
    batch: int,
    case: Case,
    setting: Setting,
    device: str,
) -> Callable[[], NumpyArray]:
    """Probabilities of a large image by overlapping tiles, each weighed by a Gaussian.

    Args:
        net: Placed.
        image: ``u8[H, W, C]``, on the host.
        cuts: Of both axes.
        batch: Tiles run together.
        case, setting, device: As everywhere.

    Returns:
        What computes the label, ``u8[H, W]``, on the host.
    """
    net.eval()
    height, width = image.shape[:2]
    rows, columns = cuts
    ends = [cut.begins[-1] + cut.window for cut in cuts]
    pads = [c.before for c in cuts]
    after = [end - n - p for end, n, p in zip(ends, (height, width), pads, strict=True)]
    places = [(y, x) for y in rows.begins for x in columns.begins]
    weight = _gaussian(rows.window)[:, None] * _gaussian(columns.window)
    weight = weight.to(device)

    def run() -> NumpyArray:
        with torch.inference_mode(), cast(case, device):
            given = torch.from_numpy(image).to(device).permute(2, 0, 1)[None]
            given = given.float() / WHITE
            given = F.pad(given, (pads[1], after[1], pads[0], after[0]), "reflect")
            given = given.contiguous(memory_format=layout(case, setting))
            total, count = None, torch.zeros(ends, device=device)
            for i in range(0, len(places), batch):
                some = places[i : i + batch]
                tiles = [
                    given[:, :, y : y + rows.window, x : x + columns.window]
                    for y, x in some
                ]
                stacked = torch.cat(tiles)
                found = torch.softmax(net(stacked).float(), dim=1) * weight
                if total is None:
                    total = torch.zeros((found.shape[1], *ends), device=device)
                for (y, x), tile in zip(some, found, strict=True):
                    total[:, y : y + rows.window, x : x + columns.window] += tile
                    count[y : y + rows.window, x : x + columns.window] += weight
            assert total is not None
            label = (total / count).argmax(0).to(torch.uint8)
            label = label[pads[0] : pads[0] + height, pads[1] : pads[1] + width]
            return label.cpu().numpy()

    return run


def _gaussian(size: int) -> torch.Tensor:
    """Of an eighth of the size, as our tiles have it."""
    place = (torch.arange(size) - (size - 1) / 2) / (size / 8)
    return torch.exp(-0.5 * place**2)
