"""PyTorch nets of medical imaging: MONAI, nnU-Net, pytorch-3dunet; numbers and names.

What was computed by the libraries themselves is in ``golden`` beside the data; where
that is absent, or has no net of a kind, PyTorch computes the same here from what is
known of the net.
"""

import json
import math
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from unet_jax import models
from unet_jax import torch_weights as tw
from unet_jax.torch_weights import containers, tensors
from unet_jax.torch_weights.family import Shapes
from unet_jax.types import InputError


def golden(*names: str) -> Path:
    here = Path(__file__).resolve().parents[1]
    place = os.environ.get("UNET_JAX_DATA", here.parent / "shared" / "data")
    place = Path(place).parent.joinpath("golden", *names)
    if not place.exists():
        pytest.skip(f"{place} is not there (set UNET_JAX_DATA)")
    return place


# ---- what the libraries computed

FIXTURES = {
    "monai__basicunet_2d": ("monai_basicunet", {}),
    "monai__basicunet_2d_batch_nontrainable": ("monai_basicunet", {"act": "relu"}),
    "monai__basicunet_3d": ("monai_basicunet", {}),
    "monai__unetpp_2d_ds": ("monai_basicunetpp", {}),
    "monai__attunet_2d": ("monai_attentionunet", {}),
    "monai__unet_2d_res2_instance": ("monai_unet", {}),
    "monai__unet_3d_spleen_narrow": ("monai_unet", {}),
    "monai__dynunet_2d": ("monai_dynunet", {}),
    "nnunetv1__2d_ds": ("nnunet_v1", {}),
    "unetpp__2d_ds": ("nnunet_unetpp", {}),
    "dna__plain_2d": ("nnunet_v2", {}),
    "dna__plain_3d_aniso_ds": ("nnunet_v2", {}),
    "dna__resenc_2d_ds": ("nnunet_v2", {}),
    "wolny__unet2d_cbld_bilinear": (
        "pytorch3dunet",
        {"layer_order": "cbld", "upsample": "bilinear"},
    ),
    "wolny__unet3d_gcr": ("pytorch3dunet", {}),
}


@pytest.mark.parametrize("name", FIXTURES)
def test_the_libraries_numbers(name):
    family, options = FIXTURES[name]
    folder = golden(name)
    found = tw.read(folder / "weights.safetensors", **options)
    assert found.family == family
    with np.load(folder / "io.npz") as file:
        image = np.moveaxis(file["input"], 1, -1)
        stored = [k for k in file if k == "logits"] or [
            k for k in file if k == "output"
        ]
        stored = stored or sorted(k for k in file if k[-1].isdigit() and "f64" not in k)
        expected = [np.moveaxis(file[key], 1, -1) for key in stored]
    logits, aux = jax.jit(found.model.apply)(found.variables, image)
    if len(expected) == 1:
        got = [logits]
    else:
        got = aux["heads"][:: -1 if family == "nnunet_unetpp" else 1]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()
    told = tw.read(folder / "weights.safetensors", family, **options)
    assert told.model == found.model


@pytest.mark.parametrize("name", ["monai__unetpp_2d_ds", "unetpp__2d_ds"])
def test_without_deep_supervision_it_is_the_last_head(name):
    folder = golden(name)
    model, variables = tw.load(folder / "weights.safetensors")
    with np.load(folder / "io.npz") as file:
        image = np.moveaxis(file["input"], 1, -1)
        last = {"monai__unetpp_2d_ds": "output_3", "unetpp__2d_ds": "output_0"}[name]
        expected = np.moveaxis(file[last], 1, -1)
    small = model.clone(level=model.depth)
    logits, _ = jax.jit(small.apply)(variables, image)
    assert np.abs(logits - expected).max() <= 2e-5 * np.abs(expected).max()


def same(ours, theirs) -> bool:
    return (
        ours.dtype == theirs.dtype
        and ours.shape == theirs.shape
        and ours.tobytes() == theirs.tobytes()
    )


def stored(folder: Path) -> dict[str, np.ndarray]:
    """What the library's own file holds, with every name of a tensor."""
    path = folder / "weights.pt"
    path = path if path.exists() else folder / "weights.safetensors"
    return containers.read(path)[0]


@pytest.mark.parametrize("name", FIXTURES)
def test_out_again_bit_for_bit(name, tmp_path):
    family, options = FIXTURES[name]
    theirs = stored(golden(name))
    found = tw.read(theirs, **options)
    path = tmp_path / "back.safetensors"
    tw.save(path, found.model, found.variables, family, **found.layout)
    ours, _ = containers.read(path)
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert key.endswith("num_batches_tracked") or same(ours[key], value), key
    # What only the layout says is found in the net, or is the library's usual.
    plain = tw.state_dict(found.model, found.variables, family)
    assert set(plain) == set(theirs)
    again = tw.read(path, **options)
    assert again.model == found.model


@pytest.mark.parametrize("name", ["monai__dynunet_2d", "dna__resenc_2d_ds"])
@pytest.mark.parametrize("keep", [0, -1])
def test_any_of_a_tensors_names_will_do(name, keep):
    """``safetensors.torch.save_model`` keeps but the first of a tensor's names."""
    whole = stored(golden(name))
    groups: dict[bytes, list[str]] = {}
    for key, value in whole.items():
        groups.setdefault(value.tobytes(), []).append(key)
    names = [sorted(keys)[keep] for keys in groups.values()]
    assert len(names) < len(whole) * 0.6
    ours = tw.read({key: whole[key] for key in names})
    theirs = tw.read(whole)
    assert ours.model == theirs.model
    for a, b in zip(
        jax.tree.leaves(ours.variables), jax.tree.leaves(theirs.variables), strict=True
    ):
        assert same(np.asarray(a), np.asarray(b))


def test_a_dropout_moves_the_norms_copy():
    state = {
        key.replace(".all_modules.1.", ".all_modules.2."): value
        for key, value in stored(golden("dna__plain_2d")).items()
    }
    found = tw.read(state)
    assert found.layout == {"norm_place": 2}
    back = tw.state_dict(found.model, found.variables, "nnunet_v2", **found.layout)
    assert set(back) == set(state)


def test_copies_that_differ_are_refused():
    whole = stored(golden("monai__dynunet_2d"))
    key = "skip_layers.next_layer.downsample.conv1.conv.weight"
    with pytest.raises(InputError, match="aliases that differ.*" + key):
        tw.read({**whole, key: whole[key] + np.float32(1)})


# ---- their names and shapes at full width

FULL = {
    "monai_basicunet_2d": "monai_basicunet",
    "monai_basicunet_3d": "monai_basicunet",
    "monai_unetpp_2d": "monai_basicunetpp",
    "monai_attunet_2d": "monai_attentionunet",
    "monai_unet_2d_nores": "monai_unet",
    "monai_unet_3d_inst": "monai_unet",
    "monai_unet_spleen_3d": "monai_unet",
    "monai_dynunet_3d": "monai_dynunet",
    "nnunet_v1_3d": "nnunet_v1",
    "unetpp_2d": "nnunet_unetpp",
    "unetpp_3d": "nnunet_unetpp",
    "dna_plain_3d": "nnunet_v2",
    "dna_resenc_3d": "nnunet_v2",
    "wolny_UNet2D_32": "pytorch3dunet",
    "wolny_UNet3D": "pytorch3dunet",
    "wolny_ResidualUNet3D": "pytorch3dunet",
    "wolny_ResidualUNetSE3D": "pytorch3dunet",
}


def planned(shapes: Shapes, family: tw.Family, **options):
    """The plan of a net of these shapes, and every name it is stored under."""
    net = family.read(shapes, **options)
    model = models.build("unet", **net.fields)
    names = family.names(model, net.rank, **net.layout)
    own = tensors.plan(model, names, channels=net.channels, rank=net.rank)
    stored = [*own, *tensors.counters(own)]
    return own, {a for key in stored for a in (key, *family.aliases(key, net.layout))}


@pytest.mark.parametrize("name", FULL)
def test_every_name_has_its_place(name):
    shapes = json.loads(golden("full_width_keys", f"{name}.json").read_text())
    shapes = Shapes({key: tuple(shape) for key, shape in shapes.items()})
    alike = [f.name for f in tw.FAMILIES.values() if f.recognises(shapes)]
    assert alike == [FULL[name]]
    own, names = planned(shapes, tw.FAMILIES[FULL[name]])
    assert names == set(shapes)
    assert {key: entry.shape for key, entry in own.items()} == {
        key: shapes[key] for key in own
    }
    counts = json.loads(golden("param_counts.json").read_text())
    params = [e.shape for e in own.values() if e.path[0] == "params"]
    assert sum(map(math.prod, params)) == counts[name]["params"]


# ---- what PyTorch computes here


class Weights:
    """Layers of PyTorch whose random tensors are made when they are first named."""

    def __init__(self, rank: int) -> None:
        self.torch = pytest.importorskip("torch")
        self.f = self.torch.nn.functional
        self.rank, self.state = rank, {}
        self.rng = np.random.default_rng(rank)

    def tensor(self, name, *shape, spread=0.3, centre=0.0):
        value = self.rng.normal(centre, spread, shape)
        self.state[name] = self.torch.from_numpy(value)
        return self.state[name]

    def image(self, channels, *size):
        return self.torch.from_numpy(self.rng.normal(size=(2, channels, *size)))

    def axes(self, value):
        return (value,) * self.rank if isinstance(value, int) else tuple(value)

    def conv(self, name, x, out, kernel=3, stride=1, bias=True, pad=None):
        kernel = self.axes(kernel)
        spread = (x.shape[1] * math.prod(kernel)) ** -0.5
        weight = self.tensor(f"{name}.weight", out, x.shape[1], *kernel, spread=spread)
        bias = self.tensor(f"{name}.bias", out) if bias else None
        pad = [k // 2 for k in kernel] if pad is None else pad
        function = getattr(self.f, f"conv{self.rank}d")
        return function(x, weight, bias, stride=self.axes(stride), padding=pad)

    def up(self, name, x, out, kernel, stride=2, bias=True, pad=0, end=0):
        kernel = self.axes(kernel)
        weight = self.tensor(f"{name}.weight", x.shape[1], out, *kernel)
        bias = self.tensor(f"{name}.bias", out) if bias else None
        function = getattr(self.f, f"conv_transpose{self.rank}d")
        return function(
            x, weight, bias, self.axes(stride), padding=pad, output_padding=end
        )

    def affine(self, name, width):
        return {
            "weight": self.tensor(f"{name}.weight", width, centre=1.0),
            "bias": self.tensor(f"{name}.bias", width),
        }

    def batch(self, name, x):
        mean = self.tensor(f"{name}.running_mean", x.shape[1])
        var = self.tensor(f"{name}.running_var", x.shape[1]).abs_().add_(0.5)
        self.state[f"{name}.num_batches_tracked"] = self.torch.tensor(7)
        return self.f.batch_norm(x, mean, var, **self.affine(name, x.shape[1]))

    def instance(self, name, x):
        return self.f.instance_norm(x, **self.affine(name, x.shape[1]))

    def group(self, name, x, groups):
        groups = groups if x.shape[1] >= groups else 1
        return self.f.group_norm(x, groups, **self.affine(name, x.shape[1]))

    def prelu(self, name, x):
        return self.f.prelu(x, self.tensor(f"{name}.weight", 1))

    def pool(self, kind, x, stride=2):
        return getattr(self.f, f"{kind}_pool{self.rank}d")(x, self.axes(stride))


def assert_same(weights: Weights, image, expected, family: str, **options) -> None:
    """In float64 our net answers the same, and its tensors go out as they came."""
    expected = [np.moveaxis(x.numpy(), 1, -1) for x in expected]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        found = tw.read(weights.state, dtype="float64", **options)
        assert found.family == family
        x = np.moveaxis(image.numpy(), 1, -1)
        logits, aux = jax.jit(found.model.apply)(found.variables, x)
        got = aux["heads"] if len(expected) > 1 else (logits,)
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.dtype == np.float64
            assert ours.shape == theirs.shape
            assert np.abs(ours - theirs).max() <= 1e-9 * np.abs(theirs).max()
        back = tw.state_dict(found.model, found.variables, family, **found.layout)
    for key, value in weights.state.items():
        assert key.endswith("tracked") or same(back[key], value.numpy()), key


@pytest.mark.parametrize(
    ("rank", "order", "gates", "old"),
    [
        (3, "gcr", False, False),
        (3, "gcl", True, False),
        (3, "cge", False, True),
        (2, "cbl", True, False),
        (2, "bcr", False, True),
    ],
)
def test_pytorch3dunet_residual(rank, order, gates, old):
    w = Weights(rank)
    f, widths = w.f, (6, 8, 16)
    acts = {"r": f.relu, "l": f.leaky_relu, "e": f.elu}

    def unit(name, x, out, order):
        for letter in order:
            if letter == "c":
                x = w.conv(f"{name}.conv", x, out, bias=False)
            elif letter == "g":
                x = w.group(f"{name}.groupnorm", x, 8)
            elif letter == "b":
                x = w.batch(f"{name}.batchnorm", x)
            else:
                x = acts[letter](x)
        return x

    def block(name, x, out):
        if x.shape[1] != out:
            x = w.conv(f"{name}.conv1", x, out, 1)
        y = unit(f"{name}.conv2", x, out, order)
        y = unit(f"{name}.conv3", y, out, order.replace(order.strip("cgb"), "")) + x
        y = f.leaky_relu(y, 0.1) if "l" in order else acts[order.strip("cgb")](y)
        if not gates:
            return y
        name = f"{name}.se_module"
        gate = y.flatten(2).mean(2)
        for fc, act in (("fc1", f.relu), ("fc2", w.torch.sigmoid)):
            weight = w.tensor(f"{name}.cSE.{fc}.weight", out, out)
            gate = act(f.linear(gate, weight, w.tensor(f"{name}.cSE.{fc}.bias", out)))
        pixel = w.torch.sigmoid(w.conv(f"{name}.sSE.conv", y, 1, 1))
        return w.torch.maximum(y * gate.reshape(*gate.shape, *(1,) * rank), y * pixel)

    # Before 1.8.2 sizes that are no multiple of 4 were refused.
    image = w.image(2, *((12, 8, 16) if old else (13, 8, 10))[:rank])
    x, skips = image, []
    for level, width in enumerate(widths):
        x = w.pool("max", x) if level else x
        x = block(f"encoders.{level}.basic_module", x, width)
        skips.append(x)
    for i, skip in enumerate(skips[-2::-1]):
        name = f"decoders.{i}.upsampling.upsample"
        if old:
            x = w.up(name, x, skip.shape[1], 3, pad=1, end=1)
        else:
            x = w.up(f"{name}.conv_transposed", x, skip.shape[1], 3, bias=False, pad=1)
            x = f.interpolate(x, size=skip.shape[2:])
        x = block(f"decoders.{i}.basic_module", x + skip, skip.shape[1])
    expected = w.conv("final_conv", x, 3, 1)
    # Where all norms are as wide as their inputs, the file does not say the order.
    assert_same(w, image, [expected], "pytorch3dunet", layer_order=order)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("heads", [0, 2])
def test_monai_dynunet(residual, heads):
    w, f = Weights(3), Weights(3).f
    widths, kernels = (4, 6, 8, 10), ((1, 3, 3), 3, (3, 3, 1), 3)
    strides = ((1, 2, 2), 2, (2, 2, 1))

    def block(name, x, out, kernel, stride=1, residual=False):
        kernel, stride = w.axes(kernel), w.axes(stride)

        def conv(number, x, kernel, stride):
            pad = [int((k - s + 1) / 2) for k, s in zip(kernel, stride, strict=True)]
            name_ = f"{name}.conv{number}.conv"
            x = w.conv(name_, x, out, kernel, stride, bias=False, pad=pad)
            return w.instance(f"{name}.norm{number}", x)

        y = f.leaky_relu(conv(1, x, kernel, stride))
        y = conv(2, y, kernel, w.axes(1))
        if residual:
            if x.shape[1] != out or max(stride) > 1:
                x = conv(3, x, w.axes(1), stride)
            y = y + x
        return f.leaky_relu(y)

    image = w.image(2, 4, 16, 8)
    names = ["input_block", "downsamples.0", "downsamples.1", "bottleneck"]
    x, skips = image, []
    for level, name in enumerate(names):
        stride = strides[level - 1] if level else 1
        x = block(name, x, widths[level], kernels[level], stride, residual)
        skips.append(x)
    outputs = []
    for i in range(3):
        level = 2 - i
        name, stride = f"upsamples.{i}", strides[level]
        up = f"{name}.transp_conv.conv"
        x = w.up(up, x, widths[level], stride, stride, bias=False)
        x = w.torch.cat([x, skips[level]], 1)
        x = block(f"{name}.conv_block", x, widths[level], kernels[level + 1])
        if level <= heads:
            head = f"deep_supervision_heads.{level - 1}" if level else "output_block"
            outputs.insert(0, w.conv(f"{head}.conv.conv", x, 3, 1))
    assert_same(w, image, outputs, "monai_dynunet")


@pytest.mark.parametrize("units", [0, 1, 3])
@pytest.mark.parametrize(
    ("strides", "order", "norm"),
    [((2, 2), "cna", "batch"), ((2, 1), "can", "instance"), ((1, 2), "cna", "none")],
)
def test_monai_unet(units, strides, order, norm):
    w, widths = Weights(2), (4, 6, 8)

    def after(name, x):
        for letter in order[1:]:
            if letter == "a":
                x = w.prelu(f"{name}.adn.A", x)
            elif norm == "none":
                x = w.f.instance_norm(x)
            else:
                x = getattr(w, norm)(f"{name}.adn.N", x)
        return x

    def block(name, x, out, stride=1, units=units, bare=False):
        if not units:
            return after(name, w.conv(f"{name}.conv", x, out, stride=stride))
        y = x
        for i in range(units):
            place = f"{name}.conv.unit{i}"
            y = w.conv(f"{place}.conv", y, out, stride=1 if i else stride)
            y = y if bare and i == units - 1 else after(place, y)
        if stride > 1 or x.shape[1] != out:
            kernel = 3 if stride > 1 else 1
            x = w.conv(f"{name}.residual", x, out, kernel, stride)
        return x + y

    def level(name, x, out, number):
        if number == len(strides):
            return block(name, x, widths[number])
        stride = strides[number]
        x = block(f"{name}.0", x, widths[number], stride)
        below = level(f"{name}.1.submodule", x, widths[number], number + 1)
        x = w.torch.cat([x, below], 1)
        place = f"{name}.2.0" if units else f"{name}.2"
        x = w.up(f"{place}.conv", x, out, 3, stride, pad=1, end=stride - 1)
        if not units:
            return x if number == 0 else after(place, x)
        return block(f"{name}.2.1", after(place, x), out, units=1, bare=number == 0)

    image = w.image(3, 8, 12)
    expected = level("model", image, 2, 0)
    options = {"strides": strides, "order": order}
    assert_same(w, image, [expected], "monai_unet", **options)


@pytest.mark.parametrize("rank", [2, 3])
def test_monai_basicunet_by_pixel_shuffle(rank):
    w, widths = Weights(rank), (4, 6, 8, 8, 10)
    f, last = w.f, 5

    def block(name, x, out):
        for i in range(2):
            x = w.conv(f"{name}.conv_{i}.conv", x, out, bias=False)
            x = f.leaky_relu(w.instance(f"{name}.conv_{i}.adn.N", x), 0.1)
        return x

    def shuffled(x, out):
        if rank == 2:
            return f.pixel_shuffle(x, 2)
        parts = x.reshape(len(x), out, 8, *x.shape[2:])
        y = w.torch.zeros(len(x), out, *(2 * n for n in x.shape[2:]), dtype=x.dtype)
        for n, (i, j, k) in enumerate(np.ndindex(2, 2, 2)):
            y[:, :, i::2, j::2, k::2] = parts[:, :, n]
        return y

    image = w.image(3, *(34, 32, 19)[:rank])
    x, skips = block("conv_0", image, widths[0]), []
    for i in range(1, 5):
        skips.append(x)
        x = block(f"down_{i}.convs", w.pool("max", x), widths[i])
    for i in (4, 3, 2, 1):
        name, skip = f"upcat_{i}", skips[i - 1]
        out = x.shape[1] if i == 1 else x.shape[1] // 2
        x = w.conv(f"{name}.upsample.pixelshuffle.conv_block", x, 2**rank * out)
        x = f.pad(shuffled(x, out), (1, 0) * rank)
        x = getattr(f, f"avg_pool{rank}d")(x, 2, stride=1)
        missing = [n - m for n, m in zip(skip.shape[2:], x.shape[2:], strict=True)]
        x = f.pad(x, [n for m in missing[::-1] for n in (0, m)], mode="replicate")
        out = last if i == 1 else skip.shape[1]
        x = block(f"{name}.convs", w.torch.cat([skip, x], 1), out)
    assert_same(w, image, [w.conv("final_conv", x, 2, 1)], "monai_basicunet")


@pytest.mark.parametrize("nested", [False, True])
def test_nnunet_v1_with_uneven_kernels(nested):
    """A block of the decoder has the kernel of the level it comes from."""
    w, widths = Weights(3), (4, 6, 8, 10)
    kernels, strides = ((1, 3, 3), (3, 3, 3), (3, 1, 3), 3), ((1, 2, 2), 2, (2, 1, 2))

    def unit(name, x, out, kernel, stride=1):
        x = w.conv(f"{name}.conv", x, out, kernel, stride)
        return w.f.leaky_relu(w.instance(f"{name}.instnorm", x))

    image = w.image(2, 8, 8, 16)
    x, grid = image, {}
    for level, width in enumerate(widths):
        ends = ("blocks.0", "blocks.1", "blocks.2")
        if level == 3:  # two stacks, the last convolution apart
            ends = ("0.blocks.0", "0.blocks.1", "1.blocks.0")
        for i, end in enumerate(ends):
            stride = strides[level - 1] if level and not i else 1
            name = f"conv_blocks_context.{level}.{end}"
            x = unit(name, x, width, kernels[level], stride)
        grid[level, 0] = x

    def node(up, name, coarse, row, earlier):
        x = w.up(up, coarse, widths[row], strides[row], strides[row], bias=False)
        x = w.torch.cat([*earlier, x] if nested else [x, *earlier], 1)
        for end in ("0.blocks.0", "0.blocks.1", "1.blocks.0"):
            x = unit(f"{name}.{end}", x, widths[row], kernels[row + 1])
        return x

    heads = []
    if nested:
        for column in (1, 2, 3):
            for row in range(4 - column):
                place = f"{3 - row - column}.{column - 1}"
                earlier = [grid[row, j] for j in range(column)]
                below = grid[row + 1, column - 1]
                x = node(f"up{place}", f"loc{place}", below, row, earlier)
                grid[row, column] = x
            head = f"seg_outputs.{3 - column}"
            heads.append(w.conv(head, grid[0, column], 3, 1, bias=False))
    else:
        for u in range(3):
            name = f"conv_blocks_localization.{u}"
            x = node(f"tu.{u}", name, x, 2 - u, [grid[2 - u, 0]])
            heads.insert(0, w.conv(f"seg_outputs.{u}", x, 3, 1, bias=False))
    assert_same(w, image, heads, "nnunet_unetpp" if nested else "nnunet_v1")


@pytest.mark.parametrize("kind", ["residual", "plain", "pooled"])
def test_nnunet_v2(kind):
    w, widths, counts = Weights(3), (4, 6, 8, 8), (1, 2, 1, 3)
    kernels, strides = ((1, 3, 3), 3, 3, (3, 3, 1)), ((1, 2, 2), 2, 1)

    def unit(name, x, out, kernel=3, stride=1, act=True, bias=True):
        x = w.conv(f"{name}.conv", x, out, kernel, stride, bias)
        x = w.instance(f"{name}.norm", x)
        for end in ("weight", "bias")[: 1 + bias]:
            w.state[f"{name}.all_modules.0.{end}"] = w.state[f"{name}.conv.{end}"]
        for end in ("weight", "bias"):
            w.state[f"{name}.all_modules.1.{end}"] = w.state[f"{name}.norm.{end}"]
        return w.f.leaky_relu(x) if act else x

    image = w.image(2, 4, 8, 16)
    x, skips = image, []
    if kind == "residual":
        x = unit("encoder.stem.convs.0", x, widths[0], kernels[0])
    for level, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
        stride = w.axes(strides[level - 1] if level else 1)
        strided, name = max(stride) > 1, f"encoder.stages.{level}"
        if kind == "pooled":
            x = w.pool("max", x, stride) if strided else x
            name, stride = f"{name}.{int(strided)}", 1
        elif kind == "plain":
            name = f"{name}.0"
        for i in range(counts[level]):
            step = 1 if i else stride
            if kind != "residual":
                x = unit(f"{name}.convs.{i}", x, width, kernel, step)
                continue
            place = f"{name}.blocks.{i}"
            y = unit(f"{place}.conv1", x, width, kernel, step)
            y = unit(f"{place}.conv2", y, width, kernel, act=False)
            pooled = strided and not i
            x = w.pool("avg", x, stride) if pooled else x
            if x.shape[1] != width:
                skip = f"{place}.skip.{int(pooled)}"
                x = unit(skip, x, width, 1, act=False, bias=False)
            x = w.f.leaky_relu(x + y)
        skips.append(x)
    for key in list(w.state):
        w.state[f"decoder.{key}"] = w.state[key]
    heads = []
    for s in range(3):
        level = 2 - s
        stride = w.axes(strides[level])
        x = w.up(f"decoder.transpconvs.{s}", x, widths[level], stride, stride)
        x = w.torch.cat([x, skips[level]], 1)
        for i in range(s + 1):
            x = unit(f"decoder.stages.{s}.convs.{i}", x, widths[level], kernels[level])
        heads.insert(0, w.conv(f"decoder.seg_layers.{s}", x, 3, 1))
    assert_same(w, image, heads, "nnunet_v2")


# ---- what does not fit


def test_refusals_name_the_tensors():
    state = stored(golden("dna__plain_2d"))
    key = "decoder.transpconvs.0.bias"
    with pytest.raises(InputError, match=f"lacks {key}"):
        tw.read({k: v for k, v in state.items() if k != key})
    state = stored(golden("wolny__unet3d_gcr"))
    with pytest.raises(InputError, match="as the net has groupnorm"):
        tw.read(state, "pytorch3dunet", layer_order="cbr")
    with pytest.raises(InputError, match="upsample ="):
        tw.read(state, "pytorch3dunet", upsample="cubic")
    state = stored(golden("monai__dynunet_2d"))
    slope = np.ones(1, np.float32)
    with pytest.raises(InputError, match=r"input_block\.lrelu\.weight"):
        tw.read({**state, "input_block.lrelu.weight": slope})
    state = stored(golden("monai__unet_2d_res2_instance"))
    with pytest.raises(InputError, match="must be 3 numbers"):
        tw.read(state, strides=(2, 2))
