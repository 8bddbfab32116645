"""The same numbers as PyTorch: whole nets, gradients and training steps in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import losses, optim, torch_weights, training
from unet_jax.types import InputError

torch = pytest.importorskip("torch")
from tests import torch_nets as nets  # noqa: E402  (needs PyTorch)

WIDTHS = (4, 6, 8, 10)
# Compiling takes most of the time of these tests: 20 s optimised, for what runs in one.
QUICK = {"xla_backend_optimization_level": 0}
PLAIN = {
    "transposed": ({}, (21, 26)),
    "bias before norm, bare head": ({"bias": True, "bare": True}, (16, 24)),
    "bilinear, bias-free, half in the middle": ({"bilinear": True}, (21, 26)),
    "no norm": ({"norm": False, "bias": True}, (16, 16)),
}


@pytest.fixture(autouse=True)
def float64():
    """Everything here is in float64; norms mix types on purpose."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def _image(shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape)


def _compare(net, image, family=None, *, heads=False, rtol=1e-11, **options):
    """Loads a net's state dict and compares outputs; returns the net and variables."""
    model, variables = torch_weights.load(
        net.state_dict(), family, dtype="float64", **options
    )
    with torch.no_grad():
        expected = net(torch.from_numpy(image))
    logits, aux = jax.jit(model.apply)(variables, np.moveaxis(image, 1, -1))
    answers = aux["heads"] if heads else [logits]
    expected = expected if isinstance(expected, list) else [expected]
    assert len(answers) == len(expected)
    for ours, theirs in zip(answers, expected, strict=True):
        theirs = theirs.numpy()
        ours = np.moveaxis(np.asarray(ours), -1, 1)
        assert ours.dtype == theirs.dtype == np.float64
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * abs(theirs).max())
    return model, variables


def _again(net, model, variables, family, **layout):
    """Saved and loaded by PyTorch, strictly: every tensor has the same bits."""
    saved = torch_weights.state_dict(model, variables, family, **layout)
    saved = {k: torch.from_numpy(np.array(v)) for k, v in saved.items()}
    old = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(saved, strict=True)
    for key, value in net.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, old[key]), key


# --- Whole nets ----------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_a_padded_unet(name):
    options, size = PLAIN[name]
    net = nets.filled(nets.Net(3, 2, WIDTHS, **options))
    model, variables = _compare(net, _image((2, 3, *size)))
    imported = torch_weights.read(net.state_dict())
    _again(net, model, variables, "milesial", **imported.layout)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_shallow_unet(depth):
    net = nets.filled(nets.Net(1, 1, (5, 7, 9)[: depth + 1], bare=True))
    model, _ = _compare(net, _image((1, 1, 12, 10)), "milesial")
    assert model.features == (5, 7, 9)[: depth + 1]


def test_a_valid_unet():
    net = nets.Net(1, 2, WIDTHS[:3], valid=True, norm=False, bias=True)
    image = _image((1, 1, 44, 60))
    model, _ = _compare(nets.filled(net), image, padding="valid")
    assert model.padding == "valid"


def test_the_2015_net_and_its_copies_that_cut_one_pixel_off_centre():
    net = nets.filled(nets.Blog(1, 2, 2, slices=True))
    image = _image((1, 572, 572))  # unbatched, as that code takes it
    with torch.no_grad():
        expected = net(torch.from_numpy(image)).numpy()
    assert expected.shape == (2, 388, 388)
    answers = {}
    for crop in ("centre", "centre-1"):
        model, variables = torch_weights.load(
            net.state_dict(), "blog_valid", crop=crop, dtype="float64"
        )
        logits = jax.jit(model.apply)(variables, image[..., None])[0]
        answers[crop] = np.moveaxis(np.asarray(logits[0]), -1, 0)
    peak = abs(expected).max()
    np.testing.assert_allclose(answers["centre-1"], expected, atol=1e-11 * peak)
    assert abs(answers["centre"] - expected).max() > 1e-3 * peak
    centred = nets.filled(nets.Blog(1, 2, 2))
    _compare(centred, _image((1, 1, 188, 188)))


@pytest.mark.parametrize("heads", [True, False])
def test_a_nested_unet(heads):
    net = nets.filled(nets.Nested(3, 2, WIDTHS, heads=heads))
    model, variables = _compare(net, _image((2, 3, 16, 24)), heads=heads)
    assert model.nested and model.deep_supervision is heads
    _again(net, model, variables, "nested")


def test_a_nested_unet_of_the_tutorials():
    net = nets.filled(nets.TutorialNested(1, 3, WIDTHS))
    model, variables = _compare(net, _image((2, 1, 16, 24)), heads=True)
    _again(net, model, variables, "tutorial_unetpp")
    with torch.no_grad():
        expected = net(torch.from_numpy(_image((2, 1, 16, 24))))[0].numpy()
    wrong, variables = torch_weights.load(
        net.state_dict(), merge="concat", dtype="float64"
    )
    other = wrong.apply(variables, np.moveaxis(_image((2, 1, 16, 24)), 1, -1))[1]
    assert abs(np.moveaxis(other["heads"][0], -1, 1) - expected).max() > 0.01


def test_attention_gates():
    net = nets.filled(nets.Attention(3, 2, WIDTHS))
    model, variables = _compare(net, _image((2, 3, 16, 24)))
    _again(net, model, variables, "leejunhyun")


@pytest.mark.parametrize("norm", [True, False])
def test_norms_after_activations_and_bilinear_up_sampling(norm):
    net = nets.filled(nets.Paths(3, 2, WIDTHS, norm=norm))
    model, variables = _compare(net, _image((2, 3, 16, 24)), padding="same")
    assert (model.up, model.order) == ("bilinear_dense", "can")
    _again(net, model, variables, "jvanvugt")


RESNETS = {
    "resnet18": {"counts": (2, 2, 2, 2)},
    "resnet18, excited": {"counts": (2, 2, 2, 2), "excited": True},
    "resnet50": {"counts": (3, 4, 6, 3), "bottleneck": True},
}


@pytest.mark.parametrize("name", RESNETS)
def test_a_unet_on_a_resnet_at_an_odd_size(name):
    widths = (4, 8, 8, 12, 16)
    net = nets.ResUNet(3, 2, widths, out=(8, 6, 6, 4, 4), **RESNETS[name])
    model, variables = _compare(nets.filled(net), _image((1, 3, 45, 70)))
    assert model.encoder == name.split(",")[0]
    _again(net, model, variables, "smp")


# --- Training ------------------------------------------------------------------------


def _dice(logits, label, over):
    """1 - (2 i + 1) / (s + 1), of sigmoids, pooled over ``over``."""
    p = torch.sigmoid(logits)
    inter, total = (p * label).sum(over), p.sum(over) + label.sum(over)
    return (1 - (2 * inter + 1) / (total + 1)).mean()


LOSSES = {
    "cross entropy": (
        {"task": "classes", "cross_entropy": 1.0},
        torch.nn.functional.cross_entropy,
    ),
    "BCE + Dice over the batch": (
        {"task": "labels", "binary_cross_entropy": 1.0, "dice": 1.0, "over": "batch"},
        lambda x, y: (
            torch.nn.functional.binary_cross_entropy_with_logits(x, y)
            + _dice(x, y, (0, 2, 3))
        ),
    ),
}
OPTIMIZERS = {
    "SGD with momentum": (
        {"name": "sgd", "momentum": 0.9, "weight_decay": 1e-4, "decay_all": True},
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=1e-4),
    ),
    "Adam": ({"name": "adam"}, torch.optim.Adam),
    "RMSprop": (
        {"name": "rmsprop", "momentum": 0.9},
        lambda p, lr: torch.optim.RMSprop(p, lr, momentum=0.9),
    ),
}
BATCH, SIZE, STEPS, RATE = 3, (16, 12), 3, 1e-2


def _batches(task):
    generator = np.random.default_rng(3)
    for _ in range(STEPS):
        image = generator.standard_normal((BATCH, *SIZE, 3)).astype(np.float32)
        label = generator.integers(0, 2, (BATCH, *SIZE))
        label = label[..., None] if task == "labels" else label
        yield {
            "image": image,
            "label": label.astype(np.int32),
            "weight": np.ones(label.shape, np.float32),
            "index": np.arange(BATCH, dtype=np.int32),
        }


def _trained(net, loss, optimizer, task):
    """PyTorch's side: gradients, losses and the state dict after each step."""
    net = net.train()
    steps = []
    for batch in _batches(task):
        image = torch.from_numpy(np.moveaxis(batch["image"], -1, 1)).double()
        label = torch.from_numpy(batch["label"]).long()
        if task == "labels":
            label = label.movedim(-1, 1).double()
        optimizer.zero_grad()
        value = loss(net(image), label)
        value.backward()
        grads = {k: p.grad.numpy().copy() for k, p in net.named_parameters()}
        optimizer.step()
        state = {k: v.numpy().copy() for k, v in net.state_dict().items()}
        steps.append((value.item(), grads, state))
    return steps


# Shallow nets, because compiling takes the time.
RUNS = [(loss, optimizer, (4, 6)) for loss in LOSSES for optimizer in OPTIMIZERS]
RUNS[0] = ("cross entropy", "SGD with momentum", (4, 6, 8))


@pytest.mark.parametrize(("loss", "optimizer", "widths"), RUNS)
def test_training_steps(loss, optimizer, widths):
    ours, theirs = LOSSES[loss]
    task = ours["task"]
    classes = 2 if task == "classes" else 1
    bilinear = optimizer == "RMSprop"
    net = nets.filled(nets.Net(3, classes, widths, bilinear=bilinear))
    imported = torch_weights.read(net.state_dict(), dtype="float64")
    model, variables = imported.model, imported.variables
    assert model.norm == "batch_unbiased"
    options, make = OPTIMIZERS[optimizer]
    steps = _trained(net, theirs, make(net.parameters(), lr=RATE), task)
    tx, _ = optim.build(learning_rate=RATE, total_steps=STEPS, **options)
    stats = {"shift": (0.0,), "scale": (1.0,)}
    step = jax.jit(
        training.make_train_step(model, tx, losses.build(**ours), stats=stats),
        compiler_options=QUICK,
    )
    state = training.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(variables["params"]),
        ema=None,
        lr_scale=jnp.ones((), jnp.float32),
        key=jax.random.key(0),
    )
    gradient = jax.jit(_gradient(model, losses.build(**ours)), compiler_options=QUICK)

    def tensors_of(params, batch_stats):
        owned = {"params": params, "batch_stats": batch_stats}
        return torch_weights.state_dict(model, owned, "milesial", **imported.layout)

    for batch, (value, grads, after) in zip(_batches(task), steps, strict=True):
        slopes = gradient(state.params, state.batch_stats, batch)
        found = tensors_of(slopes, state.batch_stats)
        for key, grad in grads.items():
            atol = 1e-10 * max(abs(grad).max(), 1e-3)
            np.testing.assert_allclose(found[key], grad, rtol=0, atol=atol, err_msg=key)
        state, sums = step(state, batch)
        assert abs(float(sums["loss"] / sums["count"]) - value) < 1e-6
        tensors = tensors_of(state.params, state.batch_stats)
        for key, tensor in after.items():
            if key.endswith("num_batches_tracked"):
                continue
            np.testing.assert_allclose(
                tensors[key], tensor, rtol=1e-8, atol=1e-9, err_msg=key
            )


def _gradient(model, loss_fn):
    """``(params, batch_stats, batch) ->`` the gradient of the batch's mean loss."""

    def mean(params, batch_stats, batch):
        variables = {"params": params, "batch_stats": batch_stats}
        (logits, _), _ = model.apply(
            variables, batch["image"], train=True, mutable=["batch_stats"]
        )
        return jnp.mean(loss_fn(logits, batch["label"], batch["weight"]))

    return jax.grad(mean)


def test_the_running_variance_is_pytorchs_unbiased_one():
    net = nets.filled(nets.Net(3, 2, (4, 6)))
    model, variables = torch_weights.load(net.state_dict(), dtype="float64")
    image = _image((2, 3, 4, 6))
    net.train()(torch.from_numpy(image))
    expected = {k: v.numpy() for k, v in net.state_dict().items()}
    other = model.clone(norm="batch")
    found = {}
    for kind in (model, other):
        _, new = kind.apply(
            variables, np.moveaxis(image, 1, -1), train=True, mutable=["batch_stats"]
        )
        tensors = torch_weights.state_dict(model, {**variables, **new}, "milesial")
        found[kind.norm] = max(
            abs(tensors[k] - v).max()
            for k, v in expected.items()
            if k.endswith("running_var")
        )
    assert found["batch_unbiased"] < 1e-12 < 1e-3 < found["batch"]


def test_a_state_dict_of_another_net_is_refused():
    net = nets.Net(3, 2, WIDTHS)
    state = net.state_dict()
    del state["down1.maxpool_conv.1.double_conv.3.weight"]
    with pytest.raises(InputError, match=r"down1.*double_conv\.3\.weight"):
        torch_weights.load(state)
