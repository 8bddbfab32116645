"""How skips and the up-sampled map become one: beside each other, added, gated, not.

`MERGES` names them. A merge is a module with the fields ``level`` (0 is the finest),
``stride`` (from the level below) and ``kit``, called as ``merge(skips, up, coarse)``:

- ``skips``: one map ``[B, *S, C]``, or for UNet++ several of one size, oldest first;
- ``up``: the up-sampled map, of the same size;
- ``coarse``: the map it was up-sampled from.

It returns the merged map and a tuple of the gates it used, ``[B, *S, 1]`` each. If what
it makes of a skip depends on more than the same pixel of the skip and of the up-sampled
map, it says so by ``on_coarse_grid``. A new merge is a class and an entry in the table.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from unet_jax.layers import Factory, Kit, align
from unet_jax.resample import linear
from unet_jax.types import Array, Shape

Skips = tuple[Array, ...]
Merged = tuple[Array, tuple[Array, ...]]


class Concat(nn.Module):
    """Skips and up-sampled map beside each other in the channels, as in the paper.

    Attributes:
        up_first: The up-sampled map before the skips. It changes nothing but the order
            in which a kernel's channels are stored.
        newest_first: Likewise, the skips from the newest to the oldest.
    """

    level: int
    stride: Shape
    kit: Kit
    up_first: bool = False
    newest_first: bool = False

    @nn.compact
    def __call__(self, skips: Skips, up: Array, coarse: Array) -> Merged:
        skips = skips[::-1] if self.newest_first else skips
        maps = (up, *skips) if self.up_first else (*skips, up)
        return jnp.concatenate(maps, axis=-1), ()


class Sum(nn.Module):
    """Skips and up-sampled map added, as in LinkNet (arXiv 1707.03718).

    A skip whose channels are not those of the up-sampled map is projected to them.
    """

    level: int
    stride: Shape
    kit: Kit

    @nn.compact
    def __call__(self, skips: Skips, up: Array, coarse: Array) -> Merged:
        for i, skip in enumerate(skips):
            if not skip.shape[-1]:
                continue
            if skip.shape[-1] != up.shape[-1]:
                name = f"project{i}"
                skip = self.kit.dense(features=up.shape[-1], name=name)(skip)
            up = up + skip
        return up, ()


class NoSkip(nn.Module):
    """The up-sampled map alone: what a net is without its skips (an ablation)."""

    level: int
    stride: Shape
    kit: Kit

    @nn.compact
    def __call__(self, skips: Skips, up: Array, coarse: Array) -> Merged:
        return up, ()


class GridGate(nn.Module):
    """The additive attention gate, in the grid form of its paper.

    The skip ``x`` is brought to the grid of the gating signal ``g`` (the coarse map) by
    a strided convolution theta without bias, ``g`` by a 1x1 convolution phi;
    ``alpha = sigmoid(psi(relu(theta(x) + phi(g))))`` is interpolated to the size of
    ``x``, which it multiplies; a 1x1 convolution W with the kit's norm follows. Inside
    there are half as many channels as in ``x``.

    Reference: Oktay et al. 2018, arXiv 1804.03999, section 2.2 and figure 2.
    """

    stride: Shape
    kit: Kit

    @nn.compact
    def __call__(self, x: Array, up: Array, coarse: Array) -> tuple[Array, Array]:
        inner = max(x.shape[-1] // 2, 1)
        theta = self.kit.conv(
            features=inner,
            kernel=self.stride,
            stride=self.stride,
            padding="valid",
            use_bias=False,
            name="theta",
        )(x)
        phi = self.kit.dense(features=inner, use_bias=True, name="phi")(coarse)
        theta = align(theta, phi.shape[1:-1])
        psi = self.kit.dense(features=1, use_bias=True, name="psi")
        alpha = linear(nn.sigmoid(psi(nn.relu(theta + phi))), self.stride)
        missing = [n - m for n, m in zip(x.shape[1:-1], alpha.shape[1:-1], strict=True)]
        # Of an odd size the last row has no grid point: it takes its neighbour's.
        ends = [(0, max(n, 0)) for n in missing]
        alpha = jnp.pad(alpha, [(0, 0), *ends, (0, 0)], mode="edge")
        alpha = align(alpha, x.shape[1:-1])
        y = self.kit.dense(features=x.shape[-1], name="w")(alpha * x)
        return self.kit.norm(name="w_norm")(y), alpha


class FullGate(nn.Module):
    """The additive attention gate, at the resolution of the skip.

    The form that most 2-D implementations have: the gating signal is the up-sampled
    map, all three convolutions are 1x1 with bias and norm, and nothing follows.

    Reference: Oktay et al. 2018, arXiv 1804.03999, equations 1 and 2.
    """

    stride: Shape
    kit: Kit

    @nn.compact
    def __call__(self, x: Array, up: Array, coarse: Array) -> tuple[Array, Array]:
        inner = max(x.shape[-1] // 2, 1)
        dense, norm = partial(self.kit.dense, use_bias=True), self.kit.norm
        theta = norm(name="theta_norm")(dense(features=inner, name="theta")(x))
        phi = norm(name="phi_norm")(dense(features=inner, name="phi")(up))
        psi = dense(features=1, name="psi")(nn.relu(theta + phi))
        alpha = nn.sigmoid(norm(name="psi_norm")(psi))
        return alpha * x, alpha


class Gated(nn.Module):
    """Every skip through an attention gate, then concatenated with the up-sampled map.

    Attributes:
        gate: `GridGate` or `FullGate`.
        from_level: The finest level that is gated; above it, plain concatenation. 1 in
            the paper's grid form, which leaves the first skip as it is.
    """

    level: int
    stride: Shape
    kit: Kit
    gate: Factory = GridGate
    from_level: int = 0

    @property
    def on_coarse_grid(self) -> bool:
        """Whether what is gated depends on its neighbours, too."""
        return self.gate is GridGate and self.level >= self.from_level

    @nn.compact
    def __call__(self, skips: Skips, up: Array, coarse: Array) -> Merged:
        if self.level < self.from_level:
            return jnp.concatenate((*skips, up), axis=-1), ()
        gated, alphas = [], []
        for i, skip in enumerate(skips):
            if skip.shape[-1]:
                gate = self.gate(stride=self.stride, kit=self.kit, name=f"gate{i}")
                skip, alpha = gate(skip, up, coarse)
                alphas.append(alpha)
            gated.append(skip)
        return jnp.concatenate((*gated, up), axis=-1), tuple(alphas)


MERGES: dict[str, Factory] = {
    "concat": Concat,
    "concat_up_first": partial(Concat, up_first=True),
    "concat_newest_first": partial(Concat, up_first=True, newest_first=True),
    "sum": Sum,
    "gated": partial(Gated, gate=GridGate, from_level=1),
    "gated_full": partial(Gated, gate=FullGate),
    "none": NoSkip,
}
