"""Losses against float64 NumPy formulas, some as torch's documentation has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import losses
from unet_jax.types import InputError

SIZES = [(5, 6), (3, 4, 5)]
TASKS = ["classes", "labels"]
TERMS = {
    "classes": ["cross_entropy", "dice", "tversky", "focal"],
    "labels": ["binary_cross_entropy", "dice", "tversky", "focal"],
}
TERM_CASES = [(task, term) for task in TASKS for term in TERMS[task]]


def data(rng, size=(5, 6), task="classes", batch=3, classes=3):
    """Logits, labels and weights in [0.25, 2] with a fifth of them zero."""
    logits = rng.normal(size=(batch, *size, classes)).astype(np.float32) * 2
    shape = (batch, *size) if task == "classes" else (batch, *size, classes)
    top = classes if task == "classes" else 2
    label = rng.integers(0, top, shape).astype(np.int32)
    weight = rng.uniform(0.25, 2, shape).astype(np.float32)
    weight[rng.random(shape) < 0.2] = 0
    return logits, label, weight


def on_device(*arrays):
    return tuple(jnp.asarray(array) for array in arrays)


def probabilities(logits, task):
    logits = logits.astype(np.float64)
    if task == "labels":
        return 1 / (1 + np.exp(-logits))
    odds = np.exp(logits)
    return odds / odds.sum(-1, keepdims=True)


def one_hot(label, classes, task):
    return np.eye(classes)[label] if task == "classes" else label.astype(np.float64)


def true_probability(logits, label, task):
    """The probability given to what is true, like ``label``."""
    p = probabilities(logits, task)
    if task == "labels":
        return np.where(label == 1, p, 1 - p)
    return np.take_along_axis(p, label[..., None], -1)[..., 0]


def rows(values):
    return values.reshape(values.shape[0], -1).sum(1)


def pixel_reference(loss, weight, factor):
    weight = weight.astype(np.float64)
    return rows(weight * factor * loss) / np.maximum(rows(weight > 0), 1)


def region_sums(logits, label, weight, task, over, squared=False):
    """TP, sum of p (or p^2), sum of y: f64 [B, K]."""
    p, y = probabilities(logits, task), one_hot(label, logits.shape[-1], task)
    mask = (weight > 0).astype(np.float64)
    mask = mask[..., None] if task == "classes" else mask
    axes = tuple(range(1, p.ndim - 1))
    sums = [(p * y * mask), ((p**2 if squared else p) * mask), (y * mask)]
    sums = [s.sum(axes) for s in sums]
    if over == "batch":
        sums = [np.broadcast_to(s.sum(0), s.shape) for s in sums]
    return sums


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("class_weights", [(), (0.5, 3.0, 1.5)])
@pytest.mark.parametrize("task", TASKS)
def test_cross_entropies_equal_the_float64_formula(rng, size, class_weights, task):
    logits, label, weight = data(rng, size, task)
    function = {
        "classes": losses.cross_entropy,
        "labels": losses.binary_cross_entropy,
    }[task]
    factor = 1.0
    if class_weights and task == "classes":
        factor = np.asarray(class_weights)[label]
    elif class_weights:
        factor = np.where(label == 1, np.asarray(class_weights), 1.0)
    expected = pixel_reference(
        -np.log(true_probability(logits, label, task)), weight, factor
    )
    actual = function(*on_device(logits, label, weight), class_weights=class_weights)
    assert actual.shape == (3,)
    assert actual.dtype == jnp.float32
    close(actual, expected)


@pytest.mark.parametrize("size", SIZES)
def test_normalise_weights_is_torchs_class_weighted_mean(rng, size):
    """torch.nn.CrossEntropyLoss(weight=w, ignore_index=255): sum(w_y l) / sum(w_y)."""
    logits, label, _ = data(rng, size)
    label = label.astype(np.uint8)
    label[rng.random(label.shape) < 0.2] = 255
    w = np.asarray([0.2, 1.0, 5.0])
    kept = label != 255
    pixel = -np.log(
        true_probability(logits, np.where(kept, label, 0).astype(np.int32), "classes")
    )
    each = w[label[kept]]
    expected = (each * pixel[kept]).sum() / each.sum()
    actual = losses.cross_entropy(
        *on_device(logits, label, kept.astype(np.float32)),
        class_weights=tuple(w),
        normalise="weights",
    )
    close(actual, np.full(3, expected))


def test_weight_scales_the_pixel_loss_and_is_not_divided_out(rng):
    """The paper's border weights: twice the weight is twice the gradient."""
    logits, label, weight = on_device(*data(rng))
    once = losses.cross_entropy(logits, label, weight)
    close(losses.cross_entropy(logits, label, 2 * weight), 2 * np.asarray(once))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("over", ["image", "batch"])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_dice_equals_the_float64_formula(rng, size, over, squared, task):
    logits, label, weight = data(rng, size, task)
    both, p, y = region_sums(logits, label, weight, task, over, squared)
    dice = (2 * both + 0.5) / (p + y + 0.5)
    options = {"task": task, "smooth": 0.5, "over": over, "squared": squared}
    arrays = on_device(logits, label, weight)
    close(losses.soft_dice(*arrays, **options), 1 - dice.mean(1))
    inner = dice[:, 1:] if task == "classes" else dice
    close(losses.soft_dice(*arrays, **options, background=False), 1 - inner.mean(1))


@pytest.mark.parametrize("over", ["image", "batch"])
@pytest.mark.parametrize("task", TASKS)
def test_tversky_equals_the_float64_formula(rng, over, task):
    logits, label, weight = data(rng, (3, 4, 5), task)
    both, p, y = region_sums(logits, label, weight, task, over)
    index = (both + 2) / (both + 0.3 * (p - both) + 0.7 * (y - both) + 2)
    actual = losses.tversky(
        *on_device(logits, label, weight), task=task, smooth=2.0, over=over
    )
    close(actual, 1 - index.mean(1))


@pytest.mark.parametrize("over", ["image", "batch"])
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_micro_adds_up_the_classes_before_it_divides(rng, task, over, background):
    logits, label, weight = data(rng, task=task)
    first = 1 if task == "classes" and not background else 0
    both, p, y = (
        s[:, first:].sum(1) for s in region_sums(logits, label, weight, task, over)
    )
    options = {"task": task, "over": over, "background": background, "smooth": 0.5}
    arrays = on_device(logits, label, weight)
    actual = losses.soft_dice(*arrays, **options, micro=True)
    close(actual, 1 - (2 * both + 0.5) / (p + y + 0.5))
    actual = losses.tversky(*arrays, **options, micro=True)
    index = (both + 0.5) / (both + 0.3 * (p - both) + 0.7 * (y - both) + 0.5)
    close(actual, 1 - index)


@pytest.mark.parametrize("task", TASKS)
def test_tversky_of_halves_is_dice_of_twice_the_smooth(rng, task):
    arrays = on_device(*data(rng, task=task))
    half = losses.tversky(*arrays, task=task, alpha=0.5, beta=0.5, smooth=1.5)
    close(half, losses.soft_dice(*arrays, task=task, smooth=3.0))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("task", TASKS)
def test_focal_equals_the_float64_formula(rng, gamma, task):
    logits, label, weight = data(rng, task=task)
    alpha = np.asarray([0.25, 0.5, 0.9])
    share = alpha[label] if task == "classes" else np.where(label, alpha, 1 - alpha)
    p = true_probability(logits, label, task)
    expected = pixel_reference(-((1 - p) ** gamma) * np.log(p), weight, share)
    actual = losses.focal(
        *on_device(logits, label, weight), task=task, gamma=gamma, alpha=tuple(alpha)
    )
    close(actual, expected)


@pytest.mark.parametrize("class_weights", [(), (0.5, 3.0, 1.5)])
@pytest.mark.parametrize("normalise", ["pixels", "weights"])
def test_focal_of_gamma_zero_is_cross_entropy(rng, class_weights, normalise):
    options = {"class_weights": class_weights, "normalise": normalise}
    arrays = on_device(*data(rng))
    plain = losses.cross_entropy(*arrays, **options)
    close(losses.focal(*arrays, task="classes", gamma=0.0, **options), plain)
    arrays = on_device(*data(rng, task="labels"))
    plain = losses.binary_cross_entropy(*arrays, **options)
    close(losses.focal(*arrays, task="labels", gamma=0.0, **options), plain)


@pytest.mark.parametrize(
    ("task", "term", "over"),
    [(*case, "image") for case in TERM_CASES]
    + [("classes", "dice", "batch"), ("labels", "tversky", "batch")],
)
def test_what_lies_under_weight_zero_has_no_effect(rng, task, term, over):
    """Labels 255, -1 and wild logits there change neither value nor gradient."""
    loss = losses.build(task=task, over=over, smooth=0.0, **{term: 1.0})
    logits, label, weight = data(rng, task=task)
    void = weight == 0
    assert void.any()
    spoilt = np.where(void, rng.choice([255, -1, 7], label.shape), label)
    other = np.where(void[..., None] if task == "classes" else void, 9.0, logits)

    def both(run, logits, label):
        return run(*on_device(logits.astype(np.float32), label.astype(np.int32)))

    def mean(x, y):
        return jnp.mean(loss(x, y, jnp.asarray(weight)))

    for run in (jax.value_and_grad(mean), jax.jit(jax.value_and_grad(mean))):
        value, gradient = both(run, logits, label)
        spoilt_value, spoilt_gradient = both(run, other, spoilt)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0
        close(spoilt_value, value)
        live = ~(void[..., None] if task == "classes" else void)
        live = np.broadcast_to(live, logits.shape)
        close(spoilt_gradient[live], gradient[live])
        assert (np.asarray(spoilt_gradient)[~live] == 0).all()


@pytest.mark.parametrize(("task", "term"), TERM_CASES)
def test_a_label_out_of_range_with_weight_is_nan_not_a_wrong_number(rng, task, term):
    logits, label, weight = data(rng, task=task)
    label[1, 2, 3] = 255
    weight[1, 2, 3] = 1
    value = losses.build(task=task, **{term: 1.0})(*on_device(logits, label, weight))
    assert np.isnan(value[1])
    assert np.isfinite(value[0])


@pytest.mark.parametrize(("task", "term"), TERM_CASES)
def test_a_perfect_and_confident_prediction_costs_nothing(rng, task, term):
    _, label, weight = data(rng, task=task)
    logits = (2 * one_hot(label, 3, task) - 1).astype(np.float32) * 100
    loss = losses.build(task=task, **{term: 1.0})
    value, gradient = jax.jit(
        lambda *x: (loss(*x), jax.grad(lambda z: jnp.sum(loss(z, *x[1:])))(x[0]))
    )(*on_device(logits, label, weight))
    np.testing.assert_allclose(value, 0, atol=1e-6)
    assert np.isfinite(gradient).all()
    wrong = loss(*on_device(-logits, label, weight))
    assert (np.asarray(wrong) > 0.3).all()
    assert np.isfinite(wrong).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("task", TASKS)
def test_focal_gradient_is_finite_for_extreme_logits(gamma, task):
    logits = jnp.asarray([[[200.0, -200.0]], [[-200.0, 200.0]], [[0.0, 0.0]]])
    shape = (3, 1) if task == "classes" else (3, 1, 2)
    label, weight = jnp.zeros(shape, jnp.int32), jnp.ones(shape)

    def total(x):
        return jnp.sum(losses.focal(x, label, weight, task=task, gamma=gamma))

    value, gradient = jax.value_and_grad(total)(logits)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(("task", "term"), TERM_CASES)
def test_gradient_equals_finite_differences(rng, task, term):
    """The losses are float32, so the step is wide and the check coarse."""
    loss = jax.jit(losses.build(task=task, **{term: 1.0}))
    logits, label, weight = on_device(*data(rng, (2, 3), task))
    direction = rng.normal(size=logits.shape).astype(np.float32)
    direction = jnp.asarray(direction / np.linalg.norm(direction))
    _, slope = jax.jvp(
        lambda x: jnp.sum(loss(x, label, weight)), (logits,), (direction,)
    )
    step = 0.02
    ahead, behind = (
        float(jnp.sum(loss(logits + sign * step * direction, label, weight)))
        for sign in (1, -1)
    )
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), atol=2e-4)


@pytest.mark.parametrize(("task", "term"), TERM_CASES)
def test_the_order_of_pixels_and_examples_does_not_matter(rng, task, term):
    loss = losses.build(task=task, **{term: 1.0})
    arrays = data(rng, task=task)
    pixels, examples = rng.permutation(30), rng.permutation(3)

    def shuffle(x):
        flat = x.reshape(3, 30, *x.shape[3:])[:, pixels]
        return flat.reshape(x.shape)[examples]

    before = loss(*on_device(*arrays))
    after = loss(*on_device(*[shuffle(x) for x in arrays]))
    close(after, np.asarray(before)[examples])


@pytest.mark.parametrize(
    "options", [{"over": "batch", "normalise": "weights"}, {"over": "image"}]
)
@pytest.mark.parametrize(("task", "term"), TERM_CASES)
def test_a_row_without_weight_is_zero_and_changes_no_other(rng, task, term, options):
    """So sum(rows) / (rows with weight) is the batch's loss however it is padded."""
    loss = losses.build(task=task, smooth=0.0, **{term: 1.0}, **options)
    logits, label, weight = data(rng, task=task)
    alone = np.asarray(loss(*on_device(logits, label, weight)))

    def longer(x, value):
        return np.concatenate([x, np.full_like(x[:1], value)])

    padded = np.asarray(
        loss(*on_device(longer(logits, 3), longer(label, 255), longer(weight, 0)))
    )
    close(padded[:3], alone)
    assert padded[3] == 0


@pytest.mark.parametrize(("task", "term"), TERM_CASES)
def test_float64_logits_are_worked_on_in_float64(rng, task, term):
    logits, label, weight = data(rng, task=task)
    options = {"task": task, term: 1.0, "class_weights": (1.0, 2.0, 0.1)}
    near = losses.build(**options)(*on_device(logits, label, weight))
    with jax.enable_x64(True):
        wide = on_device(logits.astype(np.float64), label, weight)
        value = losses.build(**options)(*wide)
        assert value.dtype == jnp.float64
        assert (np.asarray(value) != np.asarray(near)).any()
        close(value, np.asarray(near))


def test_bfloat16_logits_and_small_labels_give_float32(rng):
    logits, label, weight = data(rng)
    loss = losses.build(task="classes", cross_entropy=1.0, dice=0.5)
    low = jnp.asarray(logits).astype(jnp.bfloat16)
    value = loss(low, jnp.asarray(label.astype(np.uint8)), jnp.asarray(weight))
    assert value.dtype == jnp.float32
    close(value, loss(low.astype(jnp.float32), *on_device(label, weight)))


@pytest.mark.parametrize(("task", "term"), TERM_CASES)
def test_jit_and_vmap_equal_eager(rng, task, term):
    loss = losses.build(task=task, **{term: 1.0})
    arrays = on_device(*data(rng, task=task))
    eager = np.asarray(loss(*arrays))
    close(jax.jit(loss)(*arrays), eager)
    stacked = jax.vmap(loss)(*[x[:, None] for x in arrays])
    close(stacked[:, 0], eager)


def test_build_is_the_weighted_sum(rng):
    arrays = on_device(*data(rng))
    weights = (1.0, 2.0, 3.0)
    built = losses.build(
        task="classes",
        cross_entropy=0.5,
        dice=0.25,
        tversky=2.0,
        focal=1.5,
        class_weights=weights,
        smooth=2.0,
        over="batch",
        background=False,
        gamma=1.0,
        alpha=0.1,
        beta=0.9,
    )
    region = {"task": "classes", "smooth": 2.0, "over": "batch", "background": False}
    parts = [
        0.5 * losses.cross_entropy(*arrays, class_weights=weights),
        0.25 * losses.soft_dice(*arrays, **region),
        2.0 * losses.tversky(*arrays, alpha=0.1, beta=0.9, **region),
        1.5 * losses.focal(*arrays, task="classes", gamma=1.0, class_weights=weights),
    ]
    close(built(*arrays), np.sum([np.asarray(part) for part in parts], axis=0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "classes"}, "cross_entropy=1.0"),
        ({"task": "classes", "binary_cross_entropy": 1.0}, "use cross_entropy"),
        ({"task": "labels", "cross_entropy": 1.0}, "use binary_cross_entropy"),
        ({"task": "labels", "dice": -1.0}, "dice=-1.0"),
        ({"task": "labels", "dice": float("nan")}, "dice=nan"),
        ({"task": "classes", "dice": 1.0, "over": "all"}, "batch, image"),
        ({"task": "classes", "dice": 1.0, "normalise": "sum"}, "pixels, weights"),
        ({"task": "binary", "dice": 1.0}, "classes, labels"),
    ],
)
def test_build_refuses_what_makes_no_sense(options, words):
    with pytest.raises(InputError, match=words):
        losses.build(**options)


def test_weights_of_the_wrong_number_and_one_softmax_class_are_refused(rng):
    arrays = on_device(*data(rng))
    with pytest.raises(InputError, match="2 weights"):
        losses.cross_entropy(*arrays, class_weights=(1.0, 2.0))
    with pytest.raises(InputError, match="task='labels'"):
        losses.cross_entropy(arrays[0][..., :1], *arrays[1:])
