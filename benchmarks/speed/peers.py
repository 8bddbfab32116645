"""The same nets in plain PyTorch, and our parameters moved into them.

Written as a PyTorch user writes them: modules, in-place ReLU, no tricks. Submodules
have the names that ours have, so that one rule of names moves the parameters over
(`unet_jax.torch_weights.tensors` knows how their tensors lie).
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.cases import CLASSES, Case

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_UP = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOL = {2: F.max_pool2d, 3: F.max_pool3d}


class Block(nn.Module):
    """Twice convolution, batch norm (if any), ReLU."""

    def __init__(self, inside: int, out: int, case: Case) -> None:
        super().__init__()
        rank, normed = len(case.size), case.norm == "batch"
        pad = 0 if case.padding == "valid" else 1
        conv, norm = _CONV[rank], _NORM[rank]
        self.conv0 = conv(inside, out, 3, padding=pad, bias=not normed)
        self.norm0 = norm(out) if normed else nn.Identity()
        self.conv1 = conv(out, out, 3, padding=pad, bias=not normed)
        self.norm1 = norm(out) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.conv0(x)), inplace=True)
        return F.relu(self.norm1(self.conv1(x)), inplace=True)


class Gate(nn.Module):
    """The additive attention gate on the grid of the coarse map (1804.03999)."""

    def __init__(self, width: int, coarse: int) -> None:
        super().__init__()
        inner = width // 2
        self.theta = nn.Conv2d(width, inner, 2, stride=2, bias=False)
        self.phi = nn.Conv2d(coarse, inner, 1)
        self.psi = nn.Conv2d(inner, 1, 1)
        self.w = nn.Conv2d(width, width, 1, bias=False)
        self.w_norm = nn.BatchNorm2d(width)

    def forward(self, skip: Tensor, coarse: Tensor) -> Tensor:
        both = F.relu(self.theta(skip) + self.phi(coarse), inplace=True)
        alpha = torch.sigmoid(self.psi(both))
        alpha = F.interpolate(alpha, scale_factor=2, mode="bilinear")
        return self.w_norm(self.w(alpha * skip))


def _encoder(case: Case) -> nn.ModuleDict:
    inputs = (case.channels, *case.features)
    return nn.ModuleDict(
        {
            f"level{i}": Block(inside, out, case)
            for i, (inside, out) in enumerate(zip(inputs, case.features, strict=False))
        }
    )


class UNet(nn.Module):
    """U-Net of any depth and widths in 2-D or 3-D, padded or valid, gated or not."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        features, rank = case.features, len(case.size)
        self.depth, self.pool = len(features) - 1, _POOL[rank]
        self.encoder, self.decoder = _encoder(case), nn.ModuleDict()
        for i in range(self.depth):
            fine, coarse = features[i], features[i + 1]
            self.decoder[f"up{i}"] = _UP[rank](coarse, fine, 2, stride=2)
            self.decoder[f"level{i}"] = Block(2 * fine, fine, case)
            if case.net == "attention_unet" and i:
                self.decoder[f"gate{i}"] = Gate(fine, coarse)
        self.head = _CONV[rank](features[0], CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for i in range(self.depth + 1):
            x = self.encoder[f"level{i}"](self.pool(x, 2) if i else x)
            maps.append(x)
        for i in reversed(range(self.depth)):
            up, skip = self.decoder[f"up{i}"](x), maps[i]
            if f"gate{i}" in self.decoder:
                skip = self.decoder[f"gate{i}"](skip, x)
            x = torch.cat([centre(skip, up.shape[2:]), up], dim=1)
            x = self.decoder[f"level{i}"](x)
        return self.head(x)


class Nested(nn.Module):
    """UNet++ with one head, at the end of its finest row."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        features, rank = case.features, len(case.size)
        self.depth, self.pool = len(features) - 1, _POOL[rank]
        self.encoder, self.decoder = _encoder(case), nn.ModuleDict()
        for j in range(1, self.depth + 1):
            for i in range(self.depth + 1 - j):
                fine, coarse = features[i], features[i + 1]
                self.decoder[f"up{i}_{j}"] = _UP[rank](coarse, fine, 2, stride=2)
                self.decoder[f"node{i}_{j}"] = Block((j + 1) * fine, fine, case)
        self.head = _CONV[rank](features[0], CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        grid = []
        for i in range(self.depth + 1):
            x = self.encoder[f"level{i}"](self.pool(x, 2) if i else x)
            grid.append([x])
        for j in range(1, self.depth + 1):
            for i in range(self.depth + 1 - j):
                up = self.decoder[f"up{i}_{j}"](grid[i + 1][j - 1])
                node = self.decoder[f"node{i}_{j}"]
                grid[i].append(node(torch.cat([*grid[i], up], dim=1)))
        return self.head(grid[0][-1])


def centre(x: Tensor, size: Any) -> Tensor:
    """The middle of a map, as a valid net's skips are cropped."""
    for axis, n in enumerate(size, start=2):
        if x.shape[axis] != n:
            x = x.narrow(axis, (x.shape[axis] - n) // 2, n)
    return x


def build(case: Case) -> nn.Module:
    """The peer of a case, with parameters of its own."""
    return Nested(case) if case.net == "unetpp" else UNet(case)


def move(model: Any, variables: Any, net: nn.Module, case: Case) -> None:
    """Gives a peer our parameters and running statistics.

    Args:
        model: Our net.
        variables: Of it.
        net: Its peer.
        case: What both are of.
    """
    from unet_jax.torch_weights import tensors

    rank = len(case.size)
    leaves, _ = tensors.structure(model, case.channels, rank)
    names = {"/".join(path[1:-1]): _name(path[1:-1]) for path in leaves}
    plan = tensors.plan(model, names, channels=case.channels, rank=rank)
    found = tensors.to_tensors(plan, variables)
    # Copies, as what comes from a device's buffer cannot be written to.
    net.load_state_dict({k: torch.tensor(v) for k, v in found.items()})


def _name(path: tuple[str, ...]) -> str:
    """Of a module of theirs; where the parameters lie one module deeper in ours."""
    name = re.sub(r"merge(\d+)\.gate0", r"gate\1", ".".join(path))
    return re.sub(r"(up\w+)\.conv$", r"\1", name)
