"""Small PyTorch nets to compare with, written for these tests from the papers.

Their modules are named as public code names them, so that a state dict of theirs is
read like a checkpoint. Imported by tests that have PyTorch only.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn


def filled(net, seed=0):
    """Random parameters and running statistics of some size, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(x, scale=1.0, shift=0.0):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x.data = shift + scale * noise

    net = net.double()
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d):
            fan = module.weight[0].numel()
            normal(module.weight, (2 / fan) ** 0.5)
            if module.bias is not None:
                normal(module.bias, 0.1)
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            normal(module.weight, 0.2, 1.0)
            normal(module.bias, 0.2)
            if isinstance(module, nn.BatchNorm2d):
                normal(module.running_mean, 0.5)
                u = torch.rand(module.running_var.shape, generator=generator)
                module.running_var.data = (0.5 + 1.5 * u).double()
    return net.eval()


class Double(nn.Module):
    """Twice convolution, batch norm (if any), ReLU."""

    def __init__(self, inside, out, mid=None, *, bias=False, norm=True, pad=1):
        super().__init__()
        layers = []
        for a, b in ((inside, mid or out), (mid or out, out)):
            layers.append(nn.Conv2d(a, b, 3, padding=pad, bias=bias))
            layers += [nn.BatchNorm2d(b)] if norm else []
            layers.append(nn.ReLU())
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x):
        return self.double_conv(x)


class Down(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), Double(*args, **kwargs))

    def forward(self, x):
        return self.maxpool_conv(x)


def to_size(up, skip):
    """Zeros around a map that is smaller than its skip."""
    dy, dx = (s - u for s, u in zip(skip.shape[2:], up.shape[2:], strict=True))
    return F.pad(up, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])


class Up(nn.Module):
    def __init__(self, coarse, skip, out, *, bilinear, valid=False, **kwargs):
        super().__init__()
        self.valid = valid
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            inside = coarse + skip
            self.conv = Double(inside, out, inside // 2, **kwargs)
        else:
            self.up = nn.ConvTranspose2d(coarse, coarse // 2, 2, stride=2)
            self.conv = Double(coarse // 2 + skip, out, **kwargs)

    def forward(self, coarse, skip):
        up = self.up(coarse)
        if self.valid:
            dy, dx = (s - u for s, u in zip(skip.shape[2:], up.shape[2:], strict=True))
            y, x = dy // 2, dx // 2
            skip = skip[:, :, y : y + up.shape[2], x : x + up.shape[3]]
        return self.conv(torch.cat([skip, to_size(up, skip)], dim=1))


class Net(nn.Module):
    """U-Net of any depth and widths."""

    def __init__(
        self, channels, classes, widths, *, bilinear=False, bare=False, **kwargs
    ):
        super().__init__()
        valid = kwargs.get("valid", False)
        own = {k: v for k, v in kwargs.items() if k != "valid"}
        own |= {"pad": 0} if valid else {}
        widths = list(widths)
        if bilinear:  # the coarsest level keeps its channels
            widths[-1] = widths[-2]
        self.depth = len(widths) - 1
        self.inc = Double(channels, widths[0], **own)
        coarse = widths[-1]
        for i in range(1, self.depth + 1):
            setattr(self, f"down{i}", Down(widths[i - 1], widths[i], **own))
            level = self.depth - i
            out = widths[level]
            if bilinear and level:
                out = widths[level - 1]
            how = {"bilinear": bilinear, "valid": valid, **own}
            setattr(self, f"up{i}", Up(coarse, widths[level], out, **how))
            coarse = out
        head = nn.Conv2d(coarse, classes, 1)
        self.outc = head if bare else nn.ModuleDict({"conv": head})
        self.bare = bare

    def forward(self, x):
        maps = [self.inc(x)]
        for i in range(1, self.depth + 1):
            maps.append(getattr(self, f"down{i}")(maps[-1]))
        x = maps.pop()
        for i in range(1, self.depth + 1):
            x = getattr(self, f"up{i}")(x, maps.pop())
        return self.outc(x) if self.bare else self.outc["conv"](x)


class Blog(nn.Module):
    """The 2015 net as nine sequences; ``slices``: those of 572, one pixel off."""

    SLICES = ((3, 59), (15, 119), (39, 239), (87, 479))

    def __init__(self, channels, classes, width, *, slices=False):
        super().__init__()
        self.slices = slices
        f = [width * 2**i for i in range(5)]

        def convs(inside, out, *first):
            layers = [*first]
            for a in (inside, out):
                layers += [nn.Conv2d(a, out, 3), nn.ReLU()]
            return layers

        def up(inside, out):
            return nn.ConvTranspose2d(inside, out, 2, stride=2)

        self.layer1 = nn.Sequential(*convs(channels, f[0]))
        for i in range(1, 5):
            layers = convs(f[i - 1], f[i], nn.MaxPool2d(2))
            layers += [up(f[4], f[3])] if i == 4 else []
            setattr(self, f"layer{i + 1}", nn.Sequential(*layers))
        for i, level in ((6, 3), (7, 2), (8, 1)):
            layers = [*convs(f[level + 1], f[level]), up(f[level], f[level - 1])]
            setattr(self, f"layer{i}", nn.Sequential(*layers))
        self.layer9 = nn.Sequential(*convs(f[1], f[0]), nn.Conv2d(f[0], classes, 1))

    def forward(self, x):
        maps = []
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
            maps.append(x)
        x = self.layer5(x)
        for i in range(6, 10):
            skip, n = maps.pop(), x.shape[-1]
            if self.slices:
                begin, end = self.SLICES[i - 6]
            else:
                begin = (skip.shape[-1] - n) // 2
                end = begin + n
            skip = skip[..., begin:end, begin:end]
            x = getattr(self, f"layer{i}")(torch.cat([skip, x], dim=-3))
        return x


class Node(nn.Module):
    """Two convolutions with norms, named as in a nested U-Net."""

    def __init__(self, inside, out):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class Nested(nn.Module):
    """UNet++ by its definition, with heads on the finest row or one at its end."""

    def __init__(self, channels, classes, widths, *, heads=True):
        super().__init__()
        self.depth, self.heads = len(widths) - 1, heads
        for i, width in enumerate(widths):
            below = widths[i - 1] if i else channels
            setattr(self, f"conv{i}_0", Node(below, width))
            for j in range(1, self.depth + 1 - i):
                node = Node(j * width + widths[i + 1], width)
                setattr(self, f"conv{i}_{j}", node)
        for j in range(1, self.depth + 1):
            if heads:
                setattr(self, f"final{j}", nn.Conv2d(widths[0], classes, 1))
        if not heads:
            self.final = nn.Conv2d(widths[0], classes, 1)

    def up(self, x):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)

    def forward(self, x):
        grid = []
        for i in range(self.depth + 1):
            x = F.max_pool2d(x, 2) if i else x
            x = getattr(self, f"conv{i}_0")(x)
            grid.append([x])
        for j in range(1, self.depth + 1):
            for i in range(self.depth + 1 - j):
                maps = [*grid[i], self.up(grid[i + 1][j - 1])]
                x = getattr(self, f"conv{i}_{j}")(torch.cat(maps, dim=1))
                grid[i].append(x)
        if not self.heads:
            return [self.final(grid[0][-1])]
        return [
            getattr(self, f"final{j}")(grid[0][j]) for j in range(1, self.depth + 1)
        ]


class TutorialNode(nn.Module):
    def __init__(self, coarse, skips, out):
        super().__init__()
        self.up = nn.ConvTranspose2d(coarse, out, 2, stride=2)
        self.conv = Double(out + skips, out, bias=True)

    def forward(self, coarse, skips):
        return self.conv(torch.cat([self.up(coarse), *skips], dim=1))


class TutorialNested(nn.Module):
    """UNet++ with the blocks of `Net`, ``up1.x{i}_{j}``, and heads ``outc.x0_{j}``."""

    def __init__(self, channels, classes, widths):
        super().__init__()
        self.depth = len(widths) - 1
        self.inc = Double(channels, widths[0], bias=True)
        for i in range(1, self.depth + 1):
            setattr(self, f"down{i}", Down(widths[i - 1], widths[i], bias=True))
        places = [
            (i, j) for j in range(1, self.depth + 1) for i in range(self.depth + 1 - j)
        ]
        self.up1 = nn.ModuleDict(
            {
                f"x{i}_{j}": TutorialNode(widths[i + 1], j * widths[i], widths[i])
                for i, j in places
            }
        )
        self.places = places
        self.outc = nn.ModuleDict(
            {
                f"x0_{j}": nn.Conv2d(widths[0], classes, 1)
                for j in range(1, self.depth + 1)
            }
        )

    def forward(self, x):
        grid = [[self.inc(x)]]
        for i in range(1, self.depth + 1):
            grid.append([getattr(self, f"down{i}")(grid[-1][0])])
        for i, j in self.places:
            grid[i].append(self.up1[f"x{i}_{j}"](grid[i + 1][j - 1], grid[i]))
        return [self.outc[f"x0_{j}"](grid[0][j]) for j in range(1, self.depth + 1)]


class Gate(nn.Module):
    """The additive attention gate at full resolution (1804.03999, equations 1, 2)."""

    def __init__(self, width):
        super().__init__()
        inner = width // 2
        self.W_g = nn.Sequential(nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner))
        self.W_x = nn.Sequential(nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner))
        self.psi = nn.Sequential(
            nn.Conv2d(inner, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid()
        )

    def forward(self, up, skip):
        return skip * self.psi(F.relu(self.W_g(up) + self.W_x(skip)))


class Convs(nn.Module):
    def __init__(self, inside, out):
        super().__init__()
        self.conv = Double(inside, out, bias=True).double_conv

    def forward(self, x):
        return self.conv(x)


class UpUnit(nn.Module):
    def __init__(self, inside, out):
        super().__init__()
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2),
            nn.Conv2d(inside, out, 3, padding=1),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        )

    def forward(self, x):
        return self.up(x)


class Attention(nn.Module):
    """A U-Net whose skips go through gates."""

    def __init__(self, channels, classes, widths):
        super().__init__()
        self.depth = len(widths) - 1
        for i, width in enumerate(widths, start=1):
            below = widths[i - 2] if i > 1 else channels
            setattr(self, f"Conv{i}", Convs(below, width))
            if i > 1:
                setattr(self, f"Up{i}", UpUnit(width, below))
                setattr(self, f"Att{i}", Gate(below))
                setattr(self, f"Up_conv{i}", Convs(2 * below, below))
        self.Conv_1x1 = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x):
        maps = []
        for i in range(1, self.depth + 2):
            x = F.max_pool2d(x, 2) if i > 1 else x
            x = getattr(self, f"Conv{i}")(x)
            maps.append(x)
        maps.pop()
        for i in range(self.depth + 1, 1, -1):
            up, skip = getattr(self, f"Up{i}")(x), maps.pop()
            skip = getattr(self, f"Att{i}")(up, skip)
            x = getattr(self, f"Up_conv{i}")(torch.cat([skip, up], dim=1))
        return self.Conv_1x1(x)


class Paths(nn.Module):
    """A padded U-Net with norms after activations and bilinear up-sampling."""

    def __init__(self, channels, classes, widths, *, norm=True):
        super().__init__()

        def block(inside, out):
            layers = []
            for a in (inside, out):
                layers += [nn.Conv2d(a, out, 3, padding=1), nn.ReLU()]
                layers += [nn.BatchNorm2d(out)] if norm else []
            return nn.ModuleDict({"block": nn.Sequential(*layers)})

        downs = zip((channels, *widths), widths, strict=False)
        self.down_path = nn.ModuleList(block(a, b) for a, b in downs)
        ups = list(itertools.pairwise(widths))[::-1]
        self.up_path = nn.ModuleList(
            nn.ModuleDict(
                {
                    "up": nn.Sequential(
                        nn.Upsample(mode="bilinear", scale_factor=2),
                        nn.Conv2d(coarse, fine, 1),
                    ),
                    "conv_block": block(2 * fine, fine),
                }
            )
            for fine, coarse in ups
        )
        self.last = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x):
        maps = []
        for i, down in enumerate(self.down_path):
            x = F.max_pool2d(x, 2) if i else x
            x = down["block"](x)
            maps.append(x)
        maps.pop()
        for up in self.up_path:
            x = torch.cat([up["up"](x), maps.pop()], dim=1)
            x = up["conv_block"]["block"](x)
        return self.last(x)


class Residual(nn.Module):
    """A ResNet's block, of two convolutions or of three with a narrow middle."""

    def __init__(self, inside, out, stride, *, bottleneck):
        super().__init__()
        mid = out // 4 if bottleneck else out
        plan = [(inside, mid, 3, stride), (mid, out, 3, 1)]
        if bottleneck:
            plan = [(inside, mid, 1, 1), (mid, mid, 3, stride), (mid, out, 1, 1)]
        self.count = len(plan)
        for i, (a, b, k, s) in enumerate(plan, start=1):
            conv = nn.Conv2d(a, b, k, stride=s, padding=k // 2, bias=False)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
        self.downsample = None
        if stride > 1 or inside != out:
            conv = nn.Conv2d(inside, out, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y) if i < self.count else y
        return F.relu(y + (self.downsample(x) if self.downsample else x))


class ResNet(nn.Module):
    """A ResNet without its classifier, as a pyramid that begins with the image."""

    def __init__(self, channels, widths, counts, *, bottleneck):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        for stage, count in enumerate(counts, start=1):
            inside, out = widths[stage - 1], widths[stage]
            blocks = [
                Residual(
                    out if i else inside,
                    out,
                    2 if stage > 1 and i == 0 else 1,
                    bottleneck=bottleneck,
                )
                for i in range(count)
            ]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))

    def forward(self, x):
        maps = [x, F.relu(self.bn1(self.conv1(x)))]
        x = F.max_pool2d(maps[-1], 3, 2, 1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
            maps.append(x)
        return maps


class Excite(nn.Module):
    """Channel and pixel gates, added (1803.02579)."""

    def __init__(self, width):
        super().__init__()
        inner = max(width // 16, 1)
        self.attention = nn.Module()
        self.attention.cSE = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, inner, 1),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1),
            nn.Sigmoid(),
        )
        self.attention.sSE = nn.Sequential(nn.Conv2d(width, 1, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.attention.cSE(x) + x * self.attention.sSE(x)


class Joint(nn.Module):
    def __init__(self, coarse, skip, out, *, excited):
        super().__init__()

        def unit(a, b):
            conv = nn.Conv2d(a, b, 3, padding=1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(b), nn.ReLU())

        self.conv1, self.conv2 = unit(coarse + skip, out), unit(out, out)
        self.excited = excited
        if excited:
            self.attention1 = Excite(coarse + skip)
            self.attention2 = Excite(out)

    def forward(self, x, skip, size):
        x = F.interpolate(x, size=size, mode="nearest")
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
            x = self.attention1(x) if self.excited else x
        x = self.conv2(self.conv1(x))
        return self.attention2(x) if self.excited else x


class ResUNet(nn.Module):
    """A U-Net on a ResNet, up-sampled to the exact size of each skip."""

    def __init__(
        self, channels, classes, widths, counts, out, *, bottleneck=False, excited=False
    ):
        super().__init__()
        self.encoder = ResNet(channels, widths, counts, bottleneck=bottleneck)
        skips = [*widths[-2::-1], 0]
        self.decoder = nn.Module()
        self.decoder.blocks = nn.ModuleList(
            Joint(coarse, skip, width, excited=excited)
            for coarse, skip, width in zip(
                (widths[-1], *out[:-1]), skips, out, strict=True
            )
        )
        self.segmentation_head = nn.Sequential(
            nn.Conv2d(out[-1], classes, 3, padding=1)
        )

    def forward(self, x):
        maps = self.encoder(x)
        y = maps.pop()
        for block in self.decoder.blocks:
            skip = maps.pop()
            size = skip.shape[2:]
            y = block(y, skip if maps else None, size)
        return self.segmentation_head(y)
