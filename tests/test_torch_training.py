"""Losses and optimizers equal the lines of PyTorch that they are written beside.

In float64, so that a wrong definition cannot hide behind rounding. Each case has the
PyTorch line in a comment; the JAX line is the options below it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import losses, optim

torch = pytest.importorskip("torch")
F = torch.nn.functional

SHAPES = {
    "encoder/kernel": (3, 4),
    "encoder/bias": (4,),
    "head/kernel": (4, 2),
    "head/scale": (2,),
}
LR, STEPS = 0.01, 5

# (torch class, its arguments, arguments of unet_jax.optim.build), all with LR.
OPTIMIZERS = {
    # torch.optim.SGD(net.parameters(), lr)
    # optim.name = "sgd", optim.momentum = 0.0
    "sgd": ("SGD", {}, {"name": "sgd", "momentum": 0.0}),
    # torch.optim.SGD(net.parameters(), lr, momentum=0.9)
    # optim.name = "sgd", optim.momentum = 0.9
    "sgd momentum": ("SGD", {"momentum": 0.9}, {"name": "sgd", "momentum": 0.9}),
    # torch.optim.SGD(net.parameters(), lr, momentum=0.99, weight_decay=3e-5,
    #                 nesterov=True)
    # ... optim.nesterov = True, optim.weight_decay = 3e-5, optim.decay_all = True
    "sgd nesterov": (
        "SGD",
        {"momentum": 0.99, "weight_decay": 3e-5, "nesterov": True},
        {
            "name": "sgd",
            "momentum": 0.99,
            "weight_decay": 3e-5,
            "decay_all": True,
            "nesterov": True,
        },
    ),
    # torch.optim.RMSprop(net.parameters(), lr)
    # optim.name = "rmsprop"
    "rmsprop": ("RMSprop", {}, {"name": "rmsprop"}),
    # torch.optim.RMSprop(net.parameters(), lr, weight_decay=1e-2, momentum=0.999)
    # optim.name = "rmsprop", optim.momentum = 0.999, optim.weight_decay = 1e-2,
    # optim.decay_all = True
    "rmsprop momentum": (
        "RMSprop",
        {"momentum": 0.999, "weight_decay": 1e-2},
        {
            "name": "rmsprop",
            "momentum": 0.999,
            "weight_decay": 1e-2,
            "decay_all": True,
        },
    ),
    # torch.optim.RMSprop(net.parameters(), lr, alpha=0.9, eps=1e-3)
    # optim.name = "rmsprop", optim.alpha = 0.9, optim.eps = 1e-3
    "rmsprop alpha": (
        "RMSprop",
        {"alpha": 0.9, "eps": 1e-3},
        {"name": "rmsprop", "alpha": 0.9, "eps": 1e-3},
    ),
    # torch.optim.Adam(net.parameters(), lr)
    # optim.name = "adam"
    "adam": ("Adam", {}, {"name": "adam"}),
    # torch.optim.Adam(net.parameters(), lr, betas=(0.5, 0.9), eps=1e-3,
    #                  weight_decay=1e-2)
    # optim.name = "adam", optim.betas = (0.5, 0.9), optim.eps = 1e-3,
    # optim.weight_decay = 1e-2, optim.decay_all = True
    "adam decay": (
        "Adam",
        {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 1e-2},
        {
            "name": "adam",
            "betas": (0.5, 0.9),
            "eps": 1e-3,
            "weight_decay": 1e-2,
            "decay_all": True,
        },
    ),
    # torch.optim.AdamW(net.parameters(), lr), whose weight_decay is 1e-2
    # optim.name = "adamw", optim.weight_decay = 1e-2, optim.decay_all = True
    "adamw": ("AdamW", {}, {"name": "adamw", "weight_decay": 1e-2, "decay_all": True}),
}


def _equal(actual, expected, rtol=1e-12):
    expected = np.asarray(expected)
    scale = rtol * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=rtol, atol=scale)


def _nested(flat):
    tree = {}
    for name, value in flat.items():
        part, leaf = name.split("/")
        tree.setdefault(part, {})[leaf] = jnp.asarray(value)
    return tree


def _ours(params, grads, **options):
    """Parameters after a step for each of ``grads``, in float64, and the rates."""
    with jax.enable_x64(True):
        tx, rate = optim.build(total_steps=STEPS, learning_rate=LR, **options)
        params = _nested(params)
        state = tx.init(params)
        with jax.numpy_dtype_promotion("standard"):
            for g in grads:
                updates, state = tx.update(_nested(g), state, params)
                params = jax.tree.map(jnp.add, params, updates)
        leaves = jax.tree.leaves(params)
        assert all(leaf.dtype == jnp.float64 for leaf in leaves)
        flat = {f"{a}/{b}": np.asarray(params[a][b]) for a in params for b in params[a]}
        with jax.numpy_dtype_promotion("standard"):  # as the update sees the step
            rates = [float(rate(jnp.int32(step))) for step in range(len(grads))]
        return flat, rates


def _theirs(make, params, grads, rates, clip=0.0):
    """The same with ``make(leaves)``, each group's own rate times that of the step."""
    leaves = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in params.items()}
    optimizer = make(leaves)
    own = [group["lr"] / LR for group in optimizer.param_groups]
    for g, rate in zip(grads, rates, strict=True):
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(g[name]) if leaf.requires_grad else None
        if clip:
            torch.nn.utils.clip_grad_norm_(list(leaves.values()), clip)
        for group, factor in zip(optimizer.param_groups, own, strict=True):
            group["lr"] = factor * rate
        optimizer.step()
    return {k: v.detach().numpy() for k, v in leaves.items()}


def _numbers(rng, steps=STEPS):
    def draw():
        return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}

    return draw(), [draw() for _ in range(steps)]


# With `poly` the rate moves, and it matters whether the momentum gathers it.
@pytest.mark.parametrize("schedule", ["constant", "poly"])
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_an_optimizer_takes_the_steps_of_pytorchs(rng, case, schedule):
    kind, arguments, options = OPTIMIZERS[case]
    params, grads = _numbers(rng)
    ours, rates = _ours(params, grads, schedule=schedule, **options)
    theirs = _theirs(
        lambda leaves: getattr(torch.optim, kind)(leaves.values(), LR, **arguments),
        params,
        grads,
        rates,
    )
    for name, value in theirs.items():
        _equal(ours[name], value)


@pytest.mark.parametrize("kind", ["SGD", "RMSprop", "Adam", "AdamW"])
def test_without_decay_all_the_kernels_alone_are_a_group_with_decay(rng, kind):
    """The two groups that PyTorch code makes by hand to spare biases and norms."""
    params, grads = _numbers(rng)
    options = {"name": kind.lower(), "weight_decay": 0.1, "momentum": 0.9}
    ours, rates = _ours(params, grads, **options)

    def make(leaves):
        few = {"momentum": 0.9} if kind in ("SGD", "RMSprop") else {}
        groups = [
            {"params": [v for v in leaves.values() if v.ndim > 1], "weight_decay": 0.1},
            {"params": [v for v in leaves.values() if v.ndim == 1], "weight_decay": 0},
        ]
        return getattr(torch.optim, kind)(groups, LR, **few)

    for name, value in _theirs(make, params, grads, rates).items():
        _equal(ours[name], value)


@pytest.mark.parametrize("kind", ["SGD", "RMSprop", "Adam", "AdamW"])
def test_lr_scale_and_freeze_are_parameter_groups_and_requires_grad(rng, kind):
    # net.head.scale.requires_grad_(False)
    # torch.optim.X([{"params": net.encoder.parameters(), "lr": 0.1 * lr},
    #                {"params": net.head.parameters()}], lr, weight_decay=0.1)
    # optim.freeze = ("head/scale",), optim.lr_scale = (("encoder", 0.1),)
    params, grads = _numbers(rng)
    options = {"name": kind.lower(), "weight_decay": 0.1, "decay_all": True}
    options |= {"momentum": 0.9, "schedule": "poly"}
    ours, rates = _ours(
        params, grads, freeze=("head/scale",), lr_scale=(("encoder", 0.1),), **options
    )

    def make(leaves):
        few = {"momentum": 0.9} if kind in ("SGD", "RMSprop") else {}
        leaves["head/scale"].requires_grad_(False)
        encoder = [v for k, v in leaves.items() if k.startswith("encoder")]
        head = [v for k, v in leaves.items() if k.startswith("head")]
        groups = [{"params": encoder, "lr": 0.1 * LR}, {"params": head}]
        return getattr(torch.optim, kind)(groups, LR, weight_decay=0.1, **few)

    theirs = _theirs(make, params, grads, rates)
    for name, value in theirs.items():
        _equal(ours[name], value)
    np.testing.assert_array_equal(ours["head/scale"], params["head/scale"])


@pytest.mark.parametrize("clip", [1.0, 100.0])
def test_clip_is_clip_grad_norm_but_for_its_millionth(rng, clip):
    # torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    # optim.clip = 1.0
    params, grads = _numbers(rng)
    ours, rates = _ours(params, grads, name="sgd", momentum=0.9, clip=clip)
    theirs = _theirs(
        lambda leaves: torch.optim.SGD(leaves.values(), LR, momentum=0.9),
        params,
        grads,
        rates,
        clip=clip,
    )
    for name, value in theirs.items():
        _equal(ours[name], value, rtol=1e-6 if clip == 1.0 else 1e-12)


def _images(rng, task, classes=3):
    """Logits [B, H, W, K] and labels as PyTorch code has them, of torch's layout."""
    logits = rng.normal(size=(2, classes, 5, 6)) * 2
    shape = (2, 5, 6) if task == "classes" else (2, classes, 5, 6)
    top = classes if task == "classes" else 2
    return logits, rng.integers(0, top, shape)


def _channels_last(array):
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


def _assert_loss_is_pytorchs(theirs, logits, label, *, ignore=None, **options):
    """Value and gradient with respect to the logits, as the training step means them.

    The step divides the sum of the rows by their number.
    """
    x = torch.tensor(logits, requires_grad=True)
    value = theirs(x, torch.tensor(label))
    value.backward()
    with jax.enable_x64(True):
        loss = losses.build(**options)
        y = jnp.asarray(_channels_last(label))
        weight = jnp.asarray(_channels_last(label) != ignore, jnp.float64)

        def mean(z):
            return jnp.mean(loss(z, y, weight))

        found, gradient = jax.jit(jax.value_and_grad(mean))(
            jnp.asarray(_channels_last(logits))
        )
        assert found.dtype == jnp.float64
        _equal(found, value.item())
        _equal(gradient, _channels_last(x.grad.numpy()))


def test_cross_entropy(rng):
    # F.cross_entropy(logits, label)
    # losses.build(task="classes", cross_entropy=1.0)
    logits, label = _images(rng, "classes")
    _assert_loss_is_pytorchs(
        F.cross_entropy, logits, label, task="classes", cross_entropy=1.0
    )


def test_class_weighted_cross_entropy_with_an_ignored_label(rng):
    # F.cross_entropy(logits, label, weight=torch.tensor([0.2, 1.0, 5.0]),
    #                 ignore_index=255)
    # losses.build(task="classes", cross_entropy=1.0, class_weights=(0.2, 1.0, 5.0),
    #              normalise="weights"), with a weight of 0 where the label is 255
    logits, label = _images(rng, "classes")
    label[rng.random(label.shape) < 0.2] = 255
    weights = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
    _assert_loss_is_pytorchs(
        lambda x, y: F.cross_entropy(x, y, weight=weights, ignore_index=255),
        logits,
        label,
        ignore=255,
        task="classes",
        cross_entropy=1.0,
        class_weights=(0.2, 1.0, 5.0),
        normalise="weights",
    )


def test_binary_cross_entropy(rng):
    # F.binary_cross_entropy_with_logits(logits, label.float())
    # losses.build(task="labels", binary_cross_entropy=1.0)
    logits, label = _images(rng, "labels")
    _assert_loss_is_pytorchs(
        lambda x, y: F.binary_cross_entropy_with_logits(x, y.double()),
        logits,
        label,
        task="labels",
        binary_cross_entropy=1.0,
    )


def test_binary_cross_entropy_with_pos_weight(rng):
    # F.binary_cross_entropy_with_logits(logits, label.float(),
    #     pos_weight=torch.tensor([0.5, 2.0, 3.0])[:, None, None])
    # losses.build(task="labels", binary_cross_entropy=1.0,
    #              class_weights=(0.5, 2.0, 3.0))
    logits, label = _images(rng, "labels")
    pos = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)[:, None, None]
    _assert_loss_is_pytorchs(
        lambda x, y: F.binary_cross_entropy_with_logits(x, y.double(), pos_weight=pos),
        logits,
        label,
        task="labels",
        binary_cross_entropy=1.0,
        class_weights=(0.5, 2.0, 3.0),
    )


def _pooled_dice_loss(probability, target, epsilon=1e-6):
    """One Dice over all that is given, batch and classes included.

    What the `dice_loss` of milesial's Pytorch-UNet computes: it flattens the classes
    into the batch and sums over that too (``reduce_batch_first=True``). Until 2022 it
    took the mean over the classes, of this for each.
    """
    inter = 2 * (probability * target).sum()
    sets_sum = probability.sum() + target.sum()
    sets_sum = torch.where(sets_sum == 0, inter, sets_sum)
    return 1 - (inter + epsilon) / (sets_sum + epsilon)


def test_binary_cross_entropy_and_dice_pooled_over_the_batch(rng):
    # criterion = nn.BCEWithLogitsLoss()
    # loss = criterion(logits.squeeze(1), mask.float())
    # loss += dice_loss(torch.sigmoid(logits.squeeze(1)), mask.float())
    # losses.build(task="labels", binary_cross_entropy=1.0, dice=1.0, over="batch",
    #              smooth=1e-6)
    logits, label = _images(rng, "labels", classes=1)

    def theirs(x, y):
        x, y = x.squeeze(1), y.squeeze(1).double()
        both = F.binary_cross_entropy_with_logits(x, y)
        return both + _pooled_dice_loss(torch.sigmoid(x), y)

    _assert_loss_is_pytorchs(
        theirs,
        logits,
        label,
        task="labels",
        binary_cross_entropy=1.0,
        dice=1.0,
        over="batch",
        smooth=1e-6,
    )


@pytest.mark.parametrize("micro", [True, False])
def test_cross_entropy_and_dice_pooled_over_batch_and_classes(rng, micro):
    # criterion = nn.CrossEntropyLoss()
    # loss = criterion(logits, mask)
    # loss += dice_loss(F.softmax(logits, dim=1), one_hot(mask), multiclass=True)
    # losses.build(task="classes", cross_entropy=1.0, dice=1.0, over="batch",
    #              micro=True, smooth=1e-6); without micro for the code until 2022
    logits, label = _images(rng, "classes")

    def theirs(x, y):
        p = F.softmax(x, dim=1)
        target = F.one_hot(y, x.shape[1]).permute(0, 3, 1, 2).double()
        if micro:
            return F.cross_entropy(x, y) + _pooled_dice_loss(p, target)
        each = [_pooled_dice_loss(p[:, k], target[:, k]) for k in range(x.shape[1])]
        return F.cross_entropy(x, y) + sum(each) / len(each)

    _assert_loss_is_pytorchs(
        theirs,
        logits,
        label,
        task="classes",
        cross_entropy=1.0,
        dice=1.0,
        over="batch",
        micro=micro,
        smooth=1e-6,
    )


@pytest.mark.parametrize("over", ["image", "batch"])
@pytest.mark.parametrize("background", [True, False])
def test_dice_of_each_class(rng, over, background):
    # p, y = F.softmax(logits, dim=1), one_hot(label)      # [B, K, H, W]
    # dims = (2, 3)                                        # per image
    # dims = (0, 2, 3)                                     # pooled over the batch
    # inter, sums = (p * y).sum(dims), (p + y).sum(dims)
    # loss = 1 - ((2 * inter + 1) / (sums + 1)).mean()     # [:, 1:]: no background
    # losses.build(task="classes", dice=1.0)
    # losses.build(task="classes", dice=1.0, over="batch") # background=False
    logits, label = _images(rng, "classes")
    dims = (2, 3) if over == "image" else (0, 2, 3)

    def theirs(x, y):
        p = F.softmax(x, dim=1)
        y = F.one_hot(y, x.shape[1]).permute(0, 3, 1, 2)
        dice = (2 * (p * y).sum(dims) + 1) / ((p + y).sum(dims) + 1)
        return 1 - dice[..., 0 if background else 1 :].mean()

    _assert_loss_is_pytorchs(
        theirs,
        logits,
        label,
        task="classes",
        dice=1.0,
        over=over,
        background=background,
    )


def test_focal(rng):
    # torchvision.ops.sigmoid_focal_loss(logits, label.float(), alpha=0.25, gamma=2,
    #                                    reduction="mean")
    # losses.build(task="labels", focal=1.0, gamma=2.0, focal_alpha=(0.25,) * classes)
    logits, label = _images(rng, "labels")

    def theirs(x, y, alpha=0.25, gamma=2.0):
        y = y.double()
        p = torch.sigmoid(x)
        loss = F.binary_cross_entropy_with_logits(x, y, reduction="none")
        p_t = p * y + (1 - p) * (1 - y)
        alpha_t = alpha * y + (1 - alpha) * (1 - y)
        return (alpha_t * loss * (1 - p_t) ** gamma).mean()

    _assert_loss_is_pytorchs(
        theirs,
        logits,
        label,
        task="labels",
        focal=1.0,
        gamma=2.0,
        focal_alpha=(0.25,) * 3,
    )
