"""PyTorch checkpoints in and out again: recognised, checked, the same numbers.

``tests/golden`` has small nets of our own making; what other people's code computed is
in ``golden`` beside the data, where it is at hand.
"""

import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from unet_jax import losses, models, optim, torch_weights, training
from unet_jax.torch_weights import tensors
from unet_jax.torch_weights.family import Shapes
from unet_jax.types import InputError

HERE = Path(__file__).resolve().parent


def shared(*names):
    """A file or folder of ``golden`` beside the data, or a skip that says so."""
    data = Path(os.environ.get("UNET_JAX_DATA", HERE.parents[1] / "shared" / "data"))
    place = data.parent.joinpath("golden", *names)
    if not place.exists():
        pytest.skip(f"{place} is not there (set UNET_JAX_DATA)")
    return place


def _close(model, variables, image, outputs, *, tolerance=2e-5):
    """Whether a net gives some outputs ``[B, K, ...]``; all heads of several."""
    logits, aux = jax.jit(model.apply)(variables, np.moveaxis(image, 1, -1))
    answers = [logits] if len(outputs) == 1 else aux["heads"]
    assert len(answers) == len(outputs)
    for ours, theirs in zip(answers, outputs, strict=True):
        ours = np.moveaxis(np.asarray(ours), -1, 1)
        np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=tolerance * abs(theirs).max()
        )


# --- Nets of our own making ----------------------------------------------------------

OWN = {
    "transposed": "milesial",
    "bilinear": "milesial",
    "bare_head": "milesial",
    "nested": "nested",
    "attention": "leejunhyun",
    "tutorial_nested": "tutorial_unetpp",
    "valid": "blog_valid",
}


def _own(name):
    found = load_file(HERE / "golden" / f"{name}.safetensors")
    weights = {
        key.removeprefix("weights."): value
        for key, value in found.items()
        if key.startswith("weights.")
    }
    return weights, found


@pytest.mark.parametrize("name", OWN)
def test_a_state_dict_gives_the_numbers_that_pytorch_gave(name):
    weights, found = _own(name)
    imported = torch_weights.read(weights)
    assert imported.family == OWN[name] and not imported.dropped
    outputs = [found[key] for key in sorted(found) if key.startswith("output")]
    _close(imported.model, imported.variables, found["image"], outputs)
    named, _ = torch_weights.load(weights, OWN[name])
    assert named == imported.model
    rebuilt = json.loads(json.dumps(models.fields(imported.model)))
    assert models.build("unet", **rebuilt) == imported.model


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", OWN)
def test_saved_again_it_has_the_same_bits(tmp_path, name, dtype):
    weights, _ = _own(name)
    weights = {k: v.astype(jnp.dtype(dtype)) for k, v in weights.items()}
    save_file(weights, tmp_path / "in.safetensors")
    found = torch_weights.read(tmp_path / "in.safetensors")
    assert found.dtype == dtype
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(found.variables))
    out = tmp_path / "out.safetensors"
    torch_weights.save(
        out, found.model, found.variables, found.family, dtype=dtype, **found.layout
    )
    again = load_file(out)
    for key, value in weights.items():
        assert again[key].dtype == value.dtype and again[key].shape == value.shape
        assert again[key].tobytes() == value.tobytes(), key
    counts = set(again) - set(weights)
    assert all(key.endswith(".num_batches_tracked") for key in counts)
    assert all(again[key].shape == () and again[key] == 0 for key in counts)
    norms = {key for key in weights if key.endswith("running_var")}
    assert len(counts) == len(norms)


def test_two_training_steps_are_pytorchs():
    weights, found = _own("training")
    imported = torch_weights.read(weights)
    state = _two_steps(
        imported,
        [(found[f"image{i}"], found[f"label{i}"]) for i in range(2)],
        [float(found[f"loss{i}"]) for i in range(2)],
    )
    for i in range(2):
        for key, value in state[i].items():
            if not key.endswith("num_batches_tracked"):
                np.testing.assert_allclose(value, found[f"after{i}.{key}"], atol=5e-6)


def _two_steps(imported, batches, values):
    """State dicts after each of two steps of SGD; the losses are checked."""
    model, variables = imported.model, imported.variables
    tx, _ = optim.build(
        name="sgd",
        learning_rate=0.05,
        momentum=0.9,
        weight_decay=1e-4,
        decay_all=True,
        total_steps=2,
    )
    loss_fn = losses.build(task="classes", cross_entropy=1.0)
    stats = {"shift": (0.0,), "scale": (1.0,)}
    step = jax.jit(training.make_train_step(model, tx, loss_fn, stats=stats))
    state = training.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(variables["params"]),
        ema=None,
        lr_scale=jnp.ones((), jnp.float32),
        key=jax.random.key(0),
    )
    found = []
    for (image, label), value in zip(batches, values, strict=True):
        batch = {
            "image": np.moveaxis(image, 1, -1),
            "label": label.astype(np.int32),
            "weight": np.ones(label.shape, np.float32),
            "index": np.arange(len(label), dtype=np.int32),
        }
        state, sums = step(state, batch)
        assert abs(float(sums["loss"] / sums["count"]) - value) < 1e-6
        owned = {"params": state.params, "batch_stats": state.batch_stats}
        owned = jax.tree.map(lambda x: np.asarray(x, np.float32), owned)
        found.append(
            torch_weights.state_dict(model, owned, imported.family, **imported.layout)
        )
    return found


# --- Nets of other people ------------------------------------------------------------

PEERS = {
    "milesial__2018_bilinear": ("milesial", {}),
    "milesial__2019_convt": ("milesial", {}),
    "milesial__bilinear": ("milesial", {}),
    "milesial__convt": ("milesial", {}),
    "milesial__v2_convt": ("milesial", {}),
    "blog__valid_skip_first": ("blog_valid", {}),
    "buda__unet": ("mateuszbuda", {}),
    "jvanvugt__same_upconv_bn": ("jvanvugt", {"padding": "same"}),
    "jvanvugt__valid_upconv": ("jvanvugt", {}),
    "leejunhyun__attu_net": ("leejunhyun", {}),
    "leejunhyun__r2u_net": ("leejunhyun", {}),
    "nested__nestedunet_ds": ("nested", {}),
    "nested__unet": ("nested", {}),
    "smp__unet_resnet34": ("smp", {}),
    "smp__unetpp_resnet34": ("smp", {}),
    "usuyama__unet": ("usuyama", {}),
}


@pytest.mark.parametrize("name", PEERS)
def test_the_numbers_that_the_peers_gave(name):
    folder = shared(name)
    family, options = PEERS[name]
    found = torch_weights.read(folder / "weights.safetensors", **options)
    assert found.family == family
    model, variables = torch_weights.load(
        folder / "weights.safetensors", family, **options
    )
    assert model == found.model
    jax.tree.map(np.testing.assert_array_equal, variables, found.variables)
    given = np.load(folder / "io.npz")
    keys = (
        ["logits"]
        if "logits" in given
        else sorted(
            key for key in given if key.startswith("output") and "f64" not in key
        )
    )
    _close(model, variables, given["input"], [given[key] for key in keys])
    old = load_file(folder / "weights.safetensors")
    new = torch_weights.state_dict(model, variables, family, **found.layout)
    assert set(new) == set(old)
    for key, value in old.items():
        if not key.endswith("num_batches_tracked"):
            assert new[key].tobytes() == value.tobytes(), key


FULL = {
    "blog_valid": "blog_valid",
    "buda": "mateuszbuda",
    "jvanvugt_default": "jvanvugt",
    "jvanvugt_pad_bn": "jvanvugt",
    "jvanvugt_upsample": "jvanvugt",
    "leejunhyun_AttU_Net": "leejunhyun",
    "leejunhyun_R2AttU_Net": "leejunhyun",
    "leejunhyun_R2U_Net": "leejunhyun",
    "leejunhyun_U_Net": "leejunhyun",
    "milesial_0f45521_bilinear": "milesial",
    "milesial_9fd386f_bilinear": "milesial",
    "milesial_9fd386f_convt": "milesial",
    "milesial_HEAD_bilinear": "milesial",
    "milesial_HEAD_convt": "milesial",
    "milesial_v1_v2_bilinear": "milesial",
    "milesial_v1_v2_convt": "milesial",
    "nested_NestedUNet": "nested",
    "nested_NestedUNet_ds": "nested",
    "nested_UNet": "nested",
    "smp_unet_resnet34": "smp",
    "smp_unetpp_resnet34": "smp",
    "usuyama": "usuyama",
}


@pytest.mark.parametrize("name", FULL)
def test_every_tensor_of_a_net_of_usual_width_has_its_place(name):
    keys = json.loads(shared("full_width_keys", f"{name}.json").read_text())
    shapes = Shapes({key: tuple(shape) for key, shape in keys.items()})
    family = torch_weights.FAMILIES[FULL[name]]
    alike = [f for f in torch_weights.FAMILIES.values() if f.recognises(shapes)]
    assert family in alike
    net = family.read(
        Shapes({k: s for k, s in shapes.items() if not k.endswith("tracked")})
    )
    model = models.build("unet", **net.fields)
    names = family.names(model, net.rank, **net.layout)
    plan = tensors.plan(model, names, channels=net.channels, rank=net.rank)
    found = {key: entry.shape for key, entry in plan.items()}
    found |= dict.fromkeys(tensors.counters(plan), ())
    expected = {k: s for k, s in shapes.items() if k in found or "tracked" not in k}
    assert {k: s for k, s in found.items() if k in expected} == expected
    count = sum(math.prod(e.shape) for e in plan.values() if e.path[0] == "params")
    known = json.loads(shared("param_counts.json").read_text())
    assert name not in known or known[name]["params"] == count


def test_two_training_steps_of_milesials_net():
    folder = shared("milesial__train_convt")
    imported = torch_weights.read(folder / "weights.safetensors")
    given = np.load(folder / "io.npz")
    batches = [(given[f"input_{i}"], given[f"target_{i}"]) for i in (1, 2)]
    first, value = batches[0], float(given["loss_1"])
    expected = load_file(folder / "grads_step1.safetensors")

    def mean(params):
        variables = {**wide, "params": params}
        image = jnp.asarray(np.moveaxis(first[0], 1, -1), jnp.float64)
        (logits, _), _ = model.apply(
            variables, image, train=True, mutable=["batch_stats"]
        )
        loss_fn = losses.build(task="classes", cross_entropy=1.0)
        label = jnp.asarray(first[1], jnp.int32)
        return jnp.mean(loss_fn(logits, label, jnp.ones(label.shape, jnp.float64)))

    # In float64: one pixel of the first up block is within float32's rounding of 0, and
    # whether its ReLU lets it through is a hundredth of that block's gradients.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        model = imported.model.clone(dtype="float64")
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), imported.variables)
        found, grads = jax.jit(jax.value_and_grad(mean))(wide["params"])
        grads = jax.tree.map(lambda x: np.asarray(x, np.float32), grads)
    assert abs(float(found) - value) < 1e-6
    slopes = torch_weights.state_dict(
        imported.model, {**imported.variables, "params": grads}, "milesial"
    )
    for key, grad in expected.items():
        atol = 2e-5 * abs(grad).max()
        np.testing.assert_allclose(slopes[key], grad, rtol=0, atol=atol, err_msg=key)
    values = [float(given[f"loss_{i}"]) for i in (1, 2)]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        exact = imported._replace(model=model, variables=wide)
        state = _two_steps(exact, batches, values)
    for i, found in enumerate(state, start=1):
        after = load_file(folder / f"weights_after_step{i}.safetensors")
        for key, value in after.items():
            if not key.endswith("num_batches_tracked"):
                np.testing.assert_allclose(found[key], value, rtol=0, atol=5e-5)


# --- A table of one's own ------------------------------------------------------------


def test_a_net_in_no_family_is_read_by_a_table_of_names(tmp_path):
    model = models.build(
        "unet", num_classes=2, features=(4, 6), padding="reflect", excite="se"
    )
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    _, modules = tensors.structure(model, 3, 2)
    names = {"/".join(path): f"my.{'_'.join(path)}" for path in modules if path}
    squeezes = [path for path in names if path.endswith("squeeze")]
    names |= {path: torch_weights.Linear(names[path]) for path in squeezes}
    file = tmp_path / "mine.safetensors"
    torch_weights.save(file, model, variables, names=names)
    owned = load_file(file)
    assert owned["my.decoder_up0_conv.weight"].shape == (6, 4, 2, 2)
    linear = [owned[f"{names[path]}.weight"].ndim for path in squeezes]
    assert linear and set(linear) == {2}
    again, read = torch_weights.load(file, model=model, names=names)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, dict(variables), read)
    del names["head"]
    with pytest.raises(InputError, match="no name for head"):
        torch_weights.load(file, model=model, names=names)
    with pytest.raises(InputError, match="go together"):
        torch_weights.load(file, names=names)


# --- Refusals ------------------------------------------------------------------------


def _refusal(weights, *args, **options):
    with pytest.raises(InputError) as refused:
        torch_weights.load(weights, *args, **options)
    sentence = str(refused.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


def test_what_does_not_fit_is_refused_and_named():
    weights, _ = _own("transposed")
    key = "down2.maxpool_conv.1.double_conv.3.weight"
    missing = {k: v for k, v in weights.items() if k != "up1.conv.double_conv.4.bias"}
    assert "it lacks up1.conv.double_conv.4.bias" in _refusal(missing)
    unused = {**weights, "extra.weight": np.zeros(3), "more.bias": np.zeros(2)}
    sentence = _refusal(unused)
    assert "has no place for extra.weight, more.bias" in sentence
    shaped = {**weights, key: weights[key][:, :5]}
    assert f"of another shape are {key} (8, 5, 3, 3)" in _refusal(shaped)
    sentence = _refusal(weights, "nested")
    assert "is not of the family 'nested'" in sentence and "milesial" in sentence
    assert "use one of" in _refusal(weights, "unheard_of")
    sentence = _refusal({"a.weight": np.zeros((2, 2))})
    assert "of no family that is known" in sentence and "a.weight" in sentence
    assert "options ['colour']" in _refusal(weights, colour="red")
    assert "model.act = 'wrong'" in _refusal(weights, act="wrong")
    assert "up-convolutions, and the file has them" in _refusal(weights, up="nearest")


SMALL = {"num_classes": 2, "features": (4, 6)}


@pytest.mark.parametrize(
    ("family", "fields", "says"),
    [
        ("milesial", {"block": "residual"}, "decoder/level0/shortcut"),
        # The same names and shapes, and other numbers:
        ("mateuszbuda", {"merge": "concat"}, "merge = 'concat' and not 'concat_up"),
        ("mateuszbuda", {"merge": "concat_up_first", "act": "silu"}, "act = 'silu'"),
        ("milesial", {"padding": "reflect", "order": "can"}, "order = 'can'"),
    ],
)
def test_a_net_that_the_family_has_not_is_not_written(family, fields, says):
    model = models.build("unet", **SMALL, **fields)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(InputError) as refused:
        torch_weights.state_dict(model, variables, family)
    assert says in str(refused.value)


def test_variables_of_another_net_are_not_written():
    model = models.build("unet", **SMALL)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(InputError, match="not those of the net"):
        torch_weights.state_dict(model.clone(conv_bias=True), variables, "milesial")


def test_our_own_net_is_written_for_pytorch_and_read_again():
    for name, family in (("unet", "milesial"), ("unet_bilinear", "milesial")):
        few = {"features": (4, 6, 8), "decoder_features": None}
        if name == "unet_bilinear":
            few = {"features": (4, 6, 6), "decoder_features": (4, 4)}
        model = models.build(name, num_classes=2, **few)
        variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
        written = torch_weights.state_dict(model, variables, family)
        again, read = torch_weights.load(written)
        assert again.norm == "batch_unbiased"
        image = jax.random.normal(jax.random.key(1), (1, 12, 10, 3))
        np.testing.assert_array_equal(
            again.apply(read, image)[0], model.apply(variables, image)[0]
        )


def test_what_a_checkpoint_has_beside_the_net_is_dropped_and_named():
    file = shared("containers", "milesial_v4_mask_values.pth")
    found = torch_weights.read(file)
    assert "mask_values" in found.dropped
    given = np.load(shared("containers", "io.npz"))
    _close(found.model, found.variables, given["input"], [given["output"]])
