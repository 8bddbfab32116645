"""Whole nets: every named one and every part, in every rank, padding and size."""

import json
import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import losses, models, optim, resample, training
from unet_jax.report import count_flops
from unet_jax.types import InputError

# XLA need not optimise what runs once: it compiles in half the time.
_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _small(name, **fields):
    """A named net of few features."""
    features = {"features": (4, 8, 8)}
    if "resnet" in name:
        features = {"features": (0, 4, 4, 8, 8, 8), "decoder_features": (4,) * 5}
    elif name == "unet_bilinear":
        features["decoder_features"] = (4, 4)
    return models.build(name, num_classes=3, **{**features, **fields})


def _tiny(name, **fields):
    """A named net as small as it shows all of its parts, and a size it works at."""
    deeper = any(word in name for word in ("attention", "unetpp"))
    features = {"features": (4, 4, 4) if deeper else (4, 4)}
    size = (8, 9)
    if "resnet" in name:
        wide = 8 if "50" in name else 4  # a quarter of it in the middle of a block
        features = {"features": (0, 4, *(wide,) * 4), "decoder_features": (4,) * 5}
        size = (17, 16)
    elif name == "unet_bilinear":
        features["decoder_features"] = (4,)
    model = models.build(name, num_classes=2, **{**features, **fields})
    return model, _working(model, size) if model.padding == "valid" else size


def _image(rng, size, *, batch=2, channels=1, dtype=np.float32):
    return jnp.asarray(rng.standard_normal((batch, *size, channels)), dtype)


def _working(model, size):
    """The sizes from ``size`` on at which the net works."""
    along = models.axes(model, len(size))
    return tuple(a.nearest_sizes(n)[1] for a, n in zip(along, size, strict=True))


def _shapes(model, size, channels=1):
    image = jax.ShapeDtypeStruct((2, *size, channels), jnp.float32)
    return jax.eval_shape(model.init_with_output, jax.random.key(0), image)


def _filled(model, size, rng, dtype=np.float32):
    """Random variables whose maps neither grow nor die; faster than compiling `init`.

    Kernels have the deviation of `he_normal`, and no parameter is zero, so that what
    depends on one shows.
    """

    def value(path, leaf):
        if path[-1].key == "kernel":
            fan_in = math.prod(leaf.shape[:-1])
            x = rng.standard_normal(leaf.shape) * math.sqrt(2 / fan_in)
        elif path[-1].key in ("bias", "scale", "var"):
            # Biases above 0, as few units as these must not all be dead.
            x = rng.uniform(0.5, 1.5, leaf.shape)
            x += 3.0 * ("squeeze" in path[-2].key)
        else:
            x = 0.3 * rng.standard_normal(leaf.shape)
        return jnp.asarray(x, dtype)

    model = model.clone(dtype="float32")
    _, variables = _shapes(model, size)
    return jax.tree_util.tree_map_with_path(value, variables)


def _waves(logits):
    """A number that depends on every logit in another way."""
    position = jnp.arange(logits.size, dtype=logits.dtype).reshape(logits.shape)
    return jnp.sum(logits * jnp.sin(position))


def _paths(tree):
    return {
        "/".join(str(part.key) for part in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _gradient(model, variables, image, *, train):
    def loss(params):
        (logits, _), updated = model.apply(
            {**variables, "params": params},
            image,
            train=train,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(1)},
        )
        return _waves(logits), (logits, updated)

    return _jit(jax.grad(loss, has_aux=True))(variables["params"])


# --- Sizes ---------------------------------------------------------------------------

# Odd, even, and an axis of one pixel, which no pooling halves.
SIZES = {2: ((6, 7), (5, 1)), 3: ((1, 5, 4),)}


LEARNT = ("transpose", "nearest_conv", "pixel_shuffle")
# Parts that few nets have: with the plain U-Net only.
AS_PYTORCH = ("transpose_wide", "transpose_wide_unit", "transpose_wide_short")
AS_PYTORCH += ("bilinear_dense", "dense_bilinear_aligned", "pixel_shuffle_blurred")


def _table(name, rank):
    """(net, size): each padding with every way up, where it makes a difference."""
    for up in resample.UPS:
        if name != "unet" and up in AS_PYTORCH:
            continue
        model = _small(name, up=up)
        for size in SIZES[rank] if up == "transpose" else SIZES[rank][:1]:
            valid = model.padding == "valid"
            yield model, _working(model, size) if valid else size
        if "resnet" in name:  # for same padding
            continue
        if up in LEARNT:  # the others see nothing beyond the border
            yield model.clone(padding="reflect"), SIZES[rank][0]
        if up.startswith("transpose_wide"):  # pads by itself
            continue
        valid = model.clone(padding="valid")
        if up != "transpose" and "gated" not in model.merge:  # one level less, faster
            few = valid.decoder_features and valid.decoder_features[:1]
            valid = valid.clone(features=valid.features[:2], decoder_features=few)
        yield valid, _working(valid, range(1, rank + 1))


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_every_net_of_any_padding_and_way_up_has_the_size_it_promises(name, rank):
    for model, size in _table(name, rank):
        (logits, aux), _ = _shapes(model, size)
        assert logits.dtype == jnp.float32
        assert logits.shape == (2, *models.output_size(model, size), 3)
        lost = [n - m for n, m in zip(size, logits.shape[1:-1], strict=True)]
        assert lost == [2 * n for n in models.margin(model, rank)]
        assert (min(lost) > 0) is (model.padding == "valid")
        assert len(aux["encoder"]) == len(model.features)
        assert len(aux["decoder"]) == len(model.features) - 1


# --- Gradients -----------------------------------------------------------------------


def _gradients_everywhere(model, size, rng, *, train, without=()):
    """Asserts that every parameter matters, but those whose path has a word."""
    variables, image = _filled(model, size, rng), _image(rng, size)
    gradient, (logits, _) = _gradient(model, variables, image, train=train)
    chex.assert_tree_all_finite((gradient, logits))
    assert float(jnp.std(logits)) > 1e-3
    for path, leaf in _paths(gradient).items():
        assert leaf.dtype == jnp.float32
        if not any(word in path for word in without):
            assert jnp.any(leaf != 0), path


# A bias in front of a batch norm moves the mean and nothing else: its gradient is zero
# up to rounding. So nets are built without those; of the gate that always has them
# they are left out.
GATE = ("theta/bias", "phi/bias", "psi/bias")


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_every_parameter_of_every_net_gets_a_gradient(rng, name):
    model, size = _tiny(name, conv_bias=None)
    if "resnet" in name:
        # By the batch's own statistics a map of one pixel is nothing; and of a
        # bottleneck's two units at least one must live.
        model = model.clone(act="leaky_relu", act_slope=0.2)
        _gradients_everywhere(model, size, rng, train=False)
    else:
        without = GATE if model.merge == "gated_full" else ()
        _gradients_everywhere(model, size, rng, train=True, without=without)


@pytest.mark.parametrize("name", ["attention_unet_full", "r2unet", "unet_3d"])
def test_with_running_statistics_biases_matter_too(rng, name):
    model, size = _tiny(name)
    assert model.conv_bias and model.norm == "batch"
    _gradients_everywhere(model, size, rng, train=False)


def test_a_resnet_learns_everywhere_by_the_statistics_of_the_batch(rng):
    model, _ = _tiny("unet_resnet18")
    _gradients_everywhere(model, (33, 33), rng, train=True)


OPTIONS = [
    {"down": "average", "up": "bilinear"},
    {"down": "strided", "up": "pixel_shuffle", "padding": "reflect"},
    {"merge": "sum", "up": "nearest"},
    {"merge": "none", "up": "nearest_conv"},
    {"merge": "concat_up_first", "excite": "se", "remat": 1},
    {"merge": "gated", "down": "strided", "features": (4, 6, 8)},
    {"excite": "scse", "up_features": "input"},
    {"order": "can", "norm": "instance"},
    {"order": "nca", "act": "prelu"},
    {"order": "acn", "act": "silu", "decoder_features": (6,)},
    {"act": "prelu", "block": "residual", "excite": "scse"},
    {"act": "prelu", "block": "recurrent", "decoder_block": "plain"},
    {"block": "preactivation", "excite": "se", "norm": "group", "norm_groups": 2},
    {"block": "widening", "decoder_block": "narrowing", "act": "gelu"},
    {"decoder": "unetpp", "features": (4, 5, 6), "merge": "sum", "act": "elu"},
    {
        "decoder": "unetpp",
        "features": (4, 5, 6),
        "deep_supervision": True,
        "padding": "valid",
        "act": "leaky_relu",
        "act_slope": 0.2,
    },
    {"bottleneck": "transformer", "padding": "valid", "head_kernel": 3},
    {"bottleneck": "transformer", "decoder": "unetpp", "dtype": "bfloat16"},
    {"dropout": 0.3, "dropout_levels": 1, "kernels": (5, (1, 3)), "strides": (3,)},
]


@pytest.mark.parametrize(
    "fields", OPTIONS, ids=lambda f: "-".join(str(v) for v in f.values())
)
def test_every_parameter_of_every_option_gets_a_gradient(rng, fields):
    model = models.UNet(**{"num_classes": 2, "features": (4, 6), **fields})
    size = _working(model, (7, 8)) if model.padding == "valid" else (7, 8)
    _gradients_everywhere(model, size, rng, train=True)


@pytest.mark.parametrize("supervised", [False, True])
def test_a_grid_over_a_resnet_learns_everywhere(rng, supervised):
    name = "unetpp_resnet34"
    model, size = _tiny(name, encoder="resnet18", deep_supervision=supervised)
    variables = _filled(model, size, rng)
    heads = {name for name in variables["params"] if name.startswith("head")}
    assert heads == ({f"head{j}" for j in range(1, 6)} if supervised else {"head"})
    nodes = {name for name in variables["params"]["decoder"] if "node0" in name}
    assert nodes == {f"node0_{j}" for j in (range(1, 6) if supervised else [5])}
    if supervised:  # the other has a gradient above
        _gradients_everywhere(model, size, rng, train=False)


# --- Two ways to the same numbers ----------------------------------------------------


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_jit_equals_eager(rng, name):
    model, size = _tiny(name)
    variables, image = _filled(model, size, rng), _image(rng, size)

    def maps(variables, image):
        logits, aux = model.apply(variables, image)
        return {"logits": logits, **aux}

    eager, jitted = maps(variables, image), _jit(maps)(variables, image)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        scale = float(jnp.max(jnp.abs(a), initial=1.0))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)


def _checkpoints(jaxpr):
    """How many parts of a program are computed again."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name in ("checkpoint", "remat2", "remat")
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                found += _checkpoints(inner) if hasattr(inner, "eqns") else 0
    return found


@pytest.mark.parametrize(
    ("fields", "remat", "blocks"),
    [
        ({"features": (4, 6)}, 1, 2),
        ({"features": (4, 6), "block": "recurrent", "act": "prelu"}, 2, 3),
        ({"features": (3, 4, 5), "decoder": "unetpp", "deep_supervision": True}, 1, 3),
        ({"features": (3, 4, 5), "decoder": "unetpp", "block": "widening"}, 3, 6),
    ],
)
def test_computing_again_changes_nothing(rng, fields, remat, blocks):
    kept = models.UNet(num_classes=2, dropout=0.3, **fields)
    again = kept.clone(remat=remat)
    variables, image = _filled(kept, (6, 7), rng), _image(rng, (6, 7))
    _, shapes = _shapes(again, (6, 7))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
    ours = _gradient(again, variables, image, train=True)
    theirs = _gradient(kept, variables, image, train=True)
    chex.assert_trees_all_close(ours, theirs, atol=1e-5, rtol=1e-5)
    updated = ours[1][1]["batch_stats"]
    assert jax.tree.structure(updated) == jax.tree.structure(variables["batch_stats"])
    moved = jax.tree.map(jnp.subtract, updated, variables["batch_stats"])
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(moved))
    for model, count in ((kept, 0), (again, blocks)):
        program = jax.make_jaxpr(lambda v, x, m=model: m.apply(v, x)[0])
        assert _checkpoints(program(variables, image).jaxpr) == count


# --- UNet++ --------------------------------------------------------------------------

PLUS = {"num_classes": 2, "decoder": "unetpp", "deep_supervision": True}


@pytest.mark.parametrize(
    ("padding", "merge", "up", "rank", "depth"),
    [
        ("same", "concat", "transpose", 2, 3),
        ("valid", "concat", "bilinear", 2, 2),
        ("reflect", "concat_up_first", "transpose", 2, 2),
        ("valid", "gated_full", "transpose", 2, 2),
        ("valid", "gated", "bilinear", 2, 2),
        ("same", "gated", "transpose", 3, 2),
        ("valid", "sum", "transpose", 3, 2),
        ("same", "gated_full", "bilinear", 3, 2),
    ],
)
def test_a_net_that_is_cut_off_answers_as_its_head(
    rng, padding, merge, up, rank, depth
):
    options = {"padding": padding, "merge": merge, "up": up}
    if rank == 3 and padding == "valid":  # small volumes
        options["kernels"] = ((1, 3, 3),) * (depth + 1)
        options["strides"] = ((1, 2, 2),) * depth
    model = models.UNet(
        features=(2, 3, 4, 5)[: depth + 1], dtype="float64", **PLUS, **options
    )
    size = (6, 7, 5)[:rank]
    size = _working(model, (2,) * rank) if padding == "valid" else size
    with jax.enable_x64(True):
        variables = _filled(model, size, rng, np.float64)
        image = _image(rng, size, batch=1, dtype=np.float64)
        logits, aux = _jit(model.apply)(variables, image)
        heads = aux["heads"]
        assert len(heads) == depth and logits.dtype == jnp.float64
        for level, head in enumerate(heads, start=1):
            assert np.ptp(np.asarray(head)) > 1e-2
            cut = _jit(model.clone(level=level).apply)(variables, image)
            with jax.numpy_dtype_promotion("standard"):  # it sees a float32 image
                small, needed = models.prune(
                    model, variables, level, channels=1, rank=rank
                )
            assert small == model.clone(level=level)
            pruned = _jit(small.apply)(needed, image)
            for answer, others in (cut, pruned):
                chex.assert_trees_all_close(answer, head, rtol=1e-12, atol=1e-12)
                chex.assert_trees_all_close(others["heads"], (answer,))
            expected = models.output_size(small, size)
            assert head.shape[1:-1] == expected
        smallest = heads[-1].shape[1:-1]
        centres = []
        for head in heads:
            cut = [
                (n - m) // 2 for n, m in zip(head.shape[1:-1], smallest, strict=True)
            ]
            index = tuple(slice(c, c + m) for c, m in zip(cut, smallest, strict=True))
            centres.append(np.asarray(head)[(slice(None), *index)])
        np.testing.assert_allclose(logits, np.mean(centres, 0), rtol=1e-12, atol=1e-12)


def _inside(path, level):
    """Whether a module is in the triangle i + j <= level."""
    part, _, rest = path.partition("/")
    if part.startswith("head"):
        return part == f"head{level}"
    name = rest.partition("/")[0]
    if part == "encoder":
        return int(name.removeprefix("level")) <= level
    row, column = (int(n) for n in name.lstrip("abcdefghijklmnopqrstuvwxyz").split("_"))
    return row + column <= level


@pytest.mark.parametrize("merge", ["concat", "sum", "gated", "gated_full"])
def test_a_net_that_is_cut_off_runs_and_owns_its_triangle_alone(merge):
    model = models.UNet(features=(2, 3, 4, 5), merge=merge, **PLUS)
    image = jax.ShapeDtypeStruct((1, 16, 20, 1), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)

    def counts(model, variables):
        def forward(variables, image):
            return model.apply(variables, image)[0]

        flops = count_flops(forward, variables, image)
        return {path.removeprefix("UNet/"): n for path, n in flops.items()}

    whole = counts(model, variables)
    for level in range(1, 4):
        small, needed = models.prune(model, variables, level, channels=1, rank=2)
        expected = {path: n for path, n in whole.items() if _inside(path, level)}
        assert counts(small, needed) == expected
        assert counts(small, variables) == expected  # also given all of them
        assert 0 < sum(expected.values()) < sum(whole.values())
        for kind, tree in variables.items():
            owned = _paths(needed[kind])
            kept = {k: v for k, v in _paths(tree).items() if _inside(k, level)}
            assert set(owned) == set(kept)
            assert all(owned[path] is kept[path] for path in owned)


@pytest.mark.parametrize(("up", "learnt"), [("transpose", True), ("bilinear", False)])
def test_a_node_sees_all_of_its_row_and_the_one_below(up, learnt):
    features = (4, 5, 6, 7)
    _, variables = _shapes(models.UNet(features=features, up=up, **PLUS), (8, 8))
    decoder = variables["params"]["decoder"]
    nodes = [(i, j) for j in range(1, 4) for i in range(4 - j)]
    assert {n for n in decoder if "node" in n} == {f"node{i}_{j}" for i, j in nodes}
    for i, j in nodes:
        given = j * features[i] + (features[i] if learnt else features[i + 1])
        kernel = decoder[f"node{i}_{j}"]["conv0"]["kernel"]
        assert kernel.shape == (3, 3, given, features[i])
        if learnt:
            up_conv = decoder[f"up{i}_{j}"]["conv"]["kernel"]
            assert up_conv.shape == (2, 2, features[i + 1], features[i])


def test_the_heads_of_an_unpadded_grid_of_the_papers_size():
    model = models.UNet(features=(1,) * 5, padding="valid", **PLUS)
    (logits, aux), _ = _shapes(model, (572, 572))
    assert [head.shape[1] for head in aux["heads"]] == [556, 532, 484, 388]
    assert logits.shape == (2, 388, 388, 2)
    for level, size in enumerate([556, 532, 484, 388], start=1):
        small = model.clone(level=level)
        assert models.output_size(small, (572, 572)) == (size, size)


# --- Another kernel and stride on each axis ------------------------------------------

UNEVEN = {
    "features": (2, 3, 4),
    "kernels": ((1, 3, 3), 3, (3, 1, 5)),
    "strides": ((1, 2, 2), (2, 1, 3)),
}


@pytest.mark.parametrize("padding", ["same", "valid", "reflect"])
@pytest.mark.parametrize("up", ["transpose", "nearest_conv", "pixel_shuffle"])
@pytest.mark.parametrize("decoder", ["unet", "unetpp"])
def test_kernels_and_strides_of_each_axis_make_the_sizes(padding, up, decoder):
    model = models.UNet(
        num_classes=2, padding=padding, up=up, decoder=decoder, **UNEVEN
    )
    size = (5, 6, 13)
    if padding == "valid":
        size = _working(model, (3, 10, 20))
        assert len(set(models.margin(model, 3))) == 3
    (logits, aux), variables = _shapes(model, size)
    lost = [n - m for n, m in zip(size, logits.shape[1:-1], strict=True)]
    assert lost == [2 * n for n in models.margin(model, 3)]
    if padding != "valid":
        sizes = [x.shape[1:-1] for x in aux["encoder"]]
        assert sizes == [(5, 6, 13), (5, 3, 6), (2, 3, 2)]
    kernels = [(1, 3, 3), (3, 3, 3), (3, 1, 5)]
    encoder = variables["params"]["encoder"]
    for level, kernel in enumerate(kernels):
        for conv, given in (("conv0", (1, 2, 3)), ("conv1", (2, 3, 4))):
            shape = (*kernel, given[level], UNEVEN["features"][level])
            assert encoder[f"level{level}"][conv]["kernel"].shape == shape
    ups = variables["params"]["decoder"]
    for level, stride in enumerate(UNEVEN["strides"]):
        name = f"up{level}" if decoder == "unet" else f"up{level}_1"
        coarse, fine = UNEVEN["features"][level + 1], UNEVEN["features"][level]
        conv = ups[name]["conv0" if up == "nearest_conv" else "conv"]["kernel"]
        expected = {
            "transpose": (*stride, coarse, fine),
            "nearest_conv": (*kernels[level], coarse, fine),
            "pixel_shuffle": (*kernels[level], coarse, math.prod(stride) * fine),
        }
        assert conv.shape == expected[up]


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_such_a_net_learns_everywhere(rng, padding):
    model = models.UNet(num_classes=2, padding=padding, merge="gated", **UNEVEN)
    size = _working(model, (3, 8, 8)) if padding == "valid" else (4, 6, 13)
    _gradients_everywhere(model, size, rng, train=True)


def test_axes_of_kernel_and_stride_one_do_not_mix(rng):
    model = models.UNet(
        num_classes=1,
        features=(2, 3),
        kernels=((1, 3, 3),) * 2,
        strides=((1, 2, 2),),
    )
    variables, image = _filled(model, (3, 6, 5), rng), _image(rng, (3, 6, 5))
    apply = _jit(lambda image: model.apply(variables, image)[0])
    volume = apply(image)
    for i in range(3):
        alone = apply(image[:, i : i + 1])
        np.testing.assert_allclose(volume[:, i : i + 1], alone, atol=1e-5)


# --- Training on every head ----------------------------------------------------------

STATS = {"kind": "range", "shift": (0.0,), "scale": (1 / 255,)}
LOSS = losses.build(task="classes", cross_entropy=1.0, dice=1.0)


def _batch(rng, size, rows=4):
    image = rng.integers(0, 256, (rows, *size, 1)).astype(np.uint8)
    label = (image[..., 0] > 128).astype(np.uint8)
    weight = rng.uniform(0.5, 1.5, label.shape).astype(np.float32)
    weight[-1] = 0.0  # an example that counts nowhere
    index = np.arange(rows, dtype=np.int32)
    return {"image": image, "label": label, "weight": weight, "index": index}


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_the_loss_is_the_mean_over_the_heads(rng, padding):
    model = models.UNet(features=(2, 3, 4), padding=padding, norm="none", **PLUS)
    size = _working(model, (2, 2)) if padding == "valid" else (6, 7)
    tx, _ = optim.build(total_steps=9, name="sgd", learning_rate=0.1)
    params = _filled(model, size, rng)["params"]
    state = training.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats={},
        opt_state=tx.init(params),
        ema=None,
        lr_scale=jnp.ones((), jnp.float32),
        key=jax.random.key(0),
    )
    batch = _batch(rng, size)

    def by_hand(params):
        image = jnp.asarray(batch["image"], jnp.float32) / 255
        heads = model.apply({"params": params}, image, train=True)[1]["heads"]
        smallest = heads[-1].shape[1:3]
        total = 0.0
        for head in heads:
            y, x = (
                (n - m) // 2 for n, m in zip(head.shape[1:3], smallest, strict=True)
            )
            head = head[:, y : y + smallest[0], x : x + smallest[1]]
            y, x = ((n - m) // 2 for n, m in zip(size, smallest, strict=True))
            where = (slice(None), slice(y, y + smallest[0]), slice(x, x + smallest[1]))
            label = jnp.asarray(batch["label"][where], jnp.int32)
            total += jnp.sum(LOSS(head, label, batch["weight"][where]))
        return total / len(heads)

    loss, gradient = _jit(jax.value_and_grad(by_hand))(state.params)
    whole = training.make_train_step(model, tx, LOSS, stats=STATS)
    parts = training.make_train_step(model, tx, LOSS, stats=STATS, accumulate=2)
    a, stats = _jit(whole)(state, batch)
    b, also = _jit(parts)(state, batch)
    assert float(stats["count"]) == float(also["count"]) == 3.0
    np.testing.assert_allclose(stats["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(also["loss"], loss, rtol=1e-5)
    # Plain descent: what the parameters lost is the gradient over the three examples.
    moved = jax.tree.map(lambda old, new: (old - new) / 0.1, state.params, a.params)
    mean = jax.tree.map(lambda g: g / 3, gradient)
    chex.assert_trees_all_close(moved, mean, atol=1e-4)
    chex.assert_trees_all_close(a.params, b.params, atol=1e-6)


# --- Stored and refused --------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_every_net_survives_json(name):
    uneven = {"kernels": (), "strides": ()}
    if "resnet" not in name:
        levels = len(models.build(name, num_classes=2).features)
        uneven = {"kernels": ((1, 3, 5),) * levels, "strides": (2, (1, 2, 2)) * 2}
        uneven["strides"] = uneven["strides"][: levels - 1]
    for fields in ({}, uneven, {"remat": 2, "act": "prelu", "act_slope": 0.1}):
        model = models.build(name, num_classes=2, **fields)
        stored = json.loads(json.dumps(models.fields(model)))
        again = models.build(name, **stored)
        assert again == model and hash(again) == hash(model)
        assert models.UNet(**models.fields(model)) == model


RESNET = {"features": (0, 4, 4, 8, 8, 8), "decoder_features": (4,) * 5}
RESNET["encoder"] = "resnet34"
GRID = {"features": (4, 8, 8), "decoder": "unetpp"}
THREE = {"features": (4, 8, 8)}

REFUSED = [
    ({**RESNET, "features": (0, 4, 4)}, "(0,64,64,128,256,512)"),
    ({**RESNET, "features": (4,) * 6}, "use 0 for the full size"),
    ({**RESNET, "features": (0, 4, 4, 8, 8, "a")}, "stem and four stages"),
    ({**RESNET, "decoder_features": None}, "give 5 numbers"),
    ({**RESNET, "padding": "valid"}, "model.padding = 'same'"),
    ({**RESNET, "padding": "reflect"}, "encoder = 'plain'"),
    ({**RESNET, "dropout": 0.5}, "use 0"),
    ({**RESNET, "kernels": (3,) * 6}, "model.kernels = ()"),
    ({**RESNET, "strides": (2,) * 5}, "model.strides = ()"),
    ({"features": (4, 0), "decoder_features": (4,)}, "whole numbers above 0"),
    ({"num_classes": 0}, "whole number above 0"),
    ({"features": 8}, "for each level"),
    ({**THREE, "kernels": 3}, "for each level"),
    ({**THREE, "level": "1"}, "a whole number, or None"),
    ({**THREE, "order": 3}, "a name"),
    ({**THREE, "padding": None}, "a name"),
    ({**THREE, "up": 2}, "the name of a part"),
    ({**THREE, "dropout_levels": -1}, "from 0 on"),
    ({**THREE, "units": (2, 2)}, "3 entries"),
    ({**THREE, "units": (2, 2, 2), "block": "residual"}, "any number of units"),
    ({**THREE, "decoder_units": (2,)}, "2 entries"),
    ({**THREE, "up_features": (4,)}, "2 numbers above 0"),
    ({**THREE, "fit": "stretch"}, "edge, resize, zeros"),
    ({**THREE, "head_kernel": 0}, "odd number"),
    ({**THREE, "head_kernel": 0, "decoder": "late_up"}, "begin with 2"),
    ({**THREE, "deep_supervision": True, "heads": 3}, "1 to 2"),
    ({**GRID, "deep_supervision": True, "heads": 1}, "all of whose levels"),
    ({"up": "transpose_wide", "padding": "valid"}, "pads by itself"),
    ({**THREE, "decoder_features": (4,)}, "must be 2 numbers above 0"),
    ({**THREE, "decoder_features": (4, 0)}, "must be 2 numbers above 0"),
    ({**THREE, "kernels": (3, 3)}, "must have 3 entries"),
    ({**THREE, "kernels": (3, 4, 3)}, "odd number"),
    ({**THREE, "kernels": (3, (3, 2), 3)}, "odd number"),
    ({**THREE, "kernels": (3, -1, 3)}, "odd number"),
    ({**THREE, "strides": (2,)}, "must have 2 entries"),
    ({**THREE, "strides": (2, 0)}, "number above 0"),
    ({**GRID, "deep_supervision": True, "level": 0}, "1 to 2"),
    ({**GRID, "deep_supervision": True, "level": 3}, "1 to 2"),
    ({**GRID, "level": 1}, "deep_supervision = True"),
    ({**GRID, "merge": "none"}, "decoder = 'unet'"),
    ({**THREE, "deep_supervision": True, "padding": "valid"}, "use 'same'"),
    ({**THREE, "level": 2}, "decoder = 'unetpp'"),
    ({"order": "cn"}, "cna"),
    ({"order": "cnn"}, "c, n and a"),
    ({"order": "nca", "block": "residual"}, "model.block = 'residual'"),
    ({"order": "nca", "decoder_block": "recurrent"}, "model.decoder_block ="),
    ({"order": "can", "block": "preactivation"}, "for plain blocks"),
    ({"act_slope": 0.1}, "leaky_relu and prelu"),
    ({**THREE, "remat": 4}, "0 to 3"),
    ({**THREE, "remat": -1}, "0 to 3"),
    ({"head_kernel": 2}, "odd number"),
    ({"head_kernel": 0}, "odd number"),
    ({"norm": "group", "norm_groups": 3}, "does not divide"),
    ({"norm": "group", "norm_groups": 0}, "norm_groups"),
    ({"dropout": 1.0}, "[0, 1)"),
]


@pytest.mark.parametrize(("fields", "says"), REFUSED, ids=lambda x: str(x)[:60])
def test_what_no_net_can_have_is_one_sentence(fields, says):
    with pytest.raises(InputError) as refused:
        models.build("unet", **{"num_classes": 2, **fields})
    sentence = str(refused.value)
    assert says in sentence and sentence.startswith("model.")
    assert sentence.endswith(".") and "\n" not in sentence


TABLES = {
    "block": ("plain", "residual", "preactivation", "recurrent", "widening"),
    "decoder_block": ("narrowing",),
    "merge": ("concat", "concat_up_first", "sum", "gated", "gated_full", "none"),
    "up": tuple(resample.UPS),
    "down": ("max", "average", "strided"),
    "excite": ("none", "se", "scse"),
    "encoder": ("plain", "resnet18", "resnet34", "resnet50"),
    "decoder": ("unet", "unetpp"),
    "bottleneck": ("none", "transformer"),
    "padding": ("same", "valid", "reflect"),
    "act": ("relu", "leaky_relu", "prelu", "elu", "gelu", "silu"),
    "norm": ("batch", "instance", "group", "none"),
    "kernel_init": ("he_normal", "torch"),
    "up_features": ("level", "input"),
    "dtype": ("float32", "bfloat16"),
}


@pytest.mark.parametrize("field", sorted(TABLES))
def test_an_unknown_name_is_answered_with_those_there_are(field):
    with pytest.raises(InputError) as refused:
        models.build("unet", num_classes=2, **{field: "wrong"})
    sentence = str(refused.value)
    assert sentence.startswith(f"model.{field} = 'wrong' is not known: use one of ")
    known = sentence.removesuffix(".").partition("use one of ")[2].split(", ")
    assert set(TABLES[field]) <= set(known)


def test_an_entry_for_another_number_of_axes_is_refused_with_the_image():
    for fields in ({"kernels": ((1, 3, 3), 3)}, {"strides": ((1, 2, 2),)}):
        model = models.build("unet", num_classes=2, features=(4, 8), **fields)
        with pytest.raises(InputError, match="one number, or one an axis"):
            _shapes(model, (8, 8))
