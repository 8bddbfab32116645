"""The nets: level sizes, parameter counts, any size, gradients everywhere."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import models
from unet_jax.types import InputError

# name -> parameters for one channel in and two classes out
PARAMETERS = {
    "unet": 31_036_546,
    "unet_2015": 31_030_658,
    "unet_bilinear": 17_261_890,
    "unet_shallow": 467_266,
    "unet_32": 7_759_554,
    "unet_wide": 9_282_282,
    "unetpp": 36_164_552,
    "unetpp_2018": 9_041_832,
    "attention_unet": 32_415_493,
    "attention_unet_full": 34_877_486,
    "resunet": 8_215_554,
    "r2unet": 39_091_330,
    "r2attention_unet": 39_442_862,
    "unet_3d": 6_821_122,
    "unet_transformer": 20_373_058,
    "unet_resnet18": 14_322_082,
    "unet_resnet34": 24_430_242,
    "unet_resnet50": 32_514_978,
    "unetpp_resnet34": 26_072_482,
}


def _shapes(model, shape):
    return jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), jnp.zeros(shape))
    )


def _count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_every_named_net_has_a_pinned_parameter_count(name):
    model = models.build(name, num_classes=2)
    _, variables = _shapes(model, (1, 572, 572, 1))
    assert _count(variables["params"]) == PARAMETERS[name]


def test_the_2015_net_is_the_papers_level_by_level():
    model = models.build("unet_2015", num_classes=2)
    (logits, aux), variables = _shapes(model, (1, 572, 572, 1))
    chex.assert_shape(logits, (1, 388, 388, 2))
    down = [(568, 64), (280, 128), (136, 256), (64, 512), (28, 1024)]
    up = [(388, 64), (196, 128), (100, 256), (52, 512)]
    for maps, sizes in ((aux["encoder"], down), (aux["decoder"], up)):
        for value, (size, features) in zip(maps, sizes, strict=True):
            chex.assert_shape(value, (1, size, size, features))
    shares = {k: _count(v) for k, v in variables["params"].items()}
    assert shares == {"encoder": 18_842_048, "decoder": 12_188_480, "head": 130}
    assert models.margin(model, 2) == (92, 92)


def test_he_normal_has_the_papers_deviation():
    model = models.build("unet_2015", num_classes=2, features=(32, 64))
    variables = model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 1)))
    kernel = variables["params"]["encoder"]["level1"]["conv0"]["kernel"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 32)), rtol=0.02)
    up = variables["params"]["decoder"]["up0"]["conv"]["kernel"]
    np.testing.assert_allclose(up.std(), np.sqrt(2 / 64), rtol=0.03)


@pytest.mark.parametrize("up", ["transpose", "bilinear", "nearest"])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 5), (5, 6, 7), (1, 1, 3)])
def test_same_padding_takes_any_size(up, size):
    model = models.UNet(num_classes=3, features=(2, 4, 4), up=up)
    (logits, aux), _ = _shapes(model, (2, *size, 2))
    chex.assert_shape(logits, (2, *size, 3))
    chex.assert_shape(aux["encoder"][0], (2, *size, 2))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_valid_sizes_agree_with_the_shapes_of_the_net(depth):
    model = models.UNet(num_classes=1, features=(1,) * (depth + 1), padding="valid")
    axis, _ = models.axes(model, 2)
    works = [n for n in range(1, 300) if axis.out(n)]
    for n in works[:3]:
        (logits, _), _ = _shapes(model, (1, n, n, 1))
        chex.assert_shape(logits, (1, *models.output_size(model, (n, n)), 1))
        assert n - logits.shape[1] == 2 * axis.margin


def test_a_size_that_does_not_work_names_the_nearest_that_do():
    model = models.build("unet_2015", num_classes=2)
    with pytest.raises(InputError, match="556 or 572"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 570, 572, 1)))
    with pytest.raises(InputError, match="use 188, the smallest"):
        models.output_size(model, (10, 10))


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("size", [(1, 1), (37, 100), (388, 389)])
def test_padded_output_covers_the_image_and_begins_at_its_first_pixel(padding, size):
    model = models.UNet(num_classes=1, features=(1, 1, 1, 1), padding=padding)
    pads = models.pads(model, size)
    padded = tuple(n + a + b for n, (a, b) in zip(size, pads, strict=True))
    out = models.output_size(model, padded)
    edge, _ = models.margin(model, 2)
    for n, o, (before, after) in zip(size, out, pads, strict=True):
        assert before == edge
        assert n <= o < n + 8 + 8 * (n < 8)
        assert n + before + after - o == 2 * edge


CONFIGS = [
    {"norm": "batch"},
    {"norm": "instance", "act": "leaky_relu"},
    {"norm": "group", "norm_groups": 2, "up": "bilinear"},
    {"norm": "none", "up": "bilinear_aligned"},
    {"norm": "none", "up": "nearest", "padding": "valid", "act": "elu"},
    {"dtype": "bfloat16", "dropout": 0.5, "act": "gelu"},
]


@pytest.mark.parametrize("fields", CONFIGS)
@pytest.mark.parametrize("rank", [2, 3])
def test_every_parameter_gets_a_gradient(rng, fields, rank):
    model = models.UNet(num_classes=2, features=(4, 4), **fields)
    size = 20 if fields.get("padding") == "valid" else 6
    image = jnp.asarray(rng.standard_normal((2, *(size,) * rank, 1)), jnp.float32)
    variables = model.init(jax.random.key(0), image)

    def loss(params):
        (logits, _), _ = model.apply(
            {**variables, "params": params},
            image,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(1)},
        )
        assert logits.dtype == jnp.float32
        position = jnp.arange(logits.size, dtype=jnp.float32).reshape(logits.shape)
        return jnp.sum(logits * jnp.sin(position))

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    chex.assert_tree_all_finite(gradient)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert leaf.dtype == jnp.float32
        assert jnp.any(leaf != 0), jax.tree_util.keystr(path)


def test_jit_equals_eager(rng):
    model = models.UNet(num_classes=2, features=(4, 8))
    image = jnp.asarray(rng.standard_normal((1, 9, 12, 3)), jnp.float32)
    variables = model.init(jax.random.key(0), image)
    eager, _ = model.apply(variables, image)
    jitted, _ = jax.jit(model.apply)(variables, image)
    chex.assert_trees_all_close(eager, jitted, atol=1e-5)


def test_a_net_survives_json_and_says_what_it_does_not_know():
    import json

    model = models.build("unet", num_classes=2, features=[4, 8], up="nearest")
    again = models.build("unet", **json.loads(json.dumps(models.fields(model))))
    assert again == model and hash(again) == hash(model)
    with pytest.raises(InputError, match="unet_2015"):
        models.build("unett", num_classes=2)
    with pytest.raises(TypeError):
        models.build("unet", num_classes=2, feature=(1, 2))
    for fields in ({"act": "rellu"}, {"up": "trilinear"}, {"padding": "full"}):
        wrong = models.UNet(num_classes=1, features=(1, 1), **fields)
        with pytest.raises(InputError, match="use one of"):
            wrong.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"features": ()}, "two or more"),
        ({"features": (4,)}, "two or more"),
        ({"features": (16, "a")}, "whole numbers"),
        ({"features": (12, 20), "norm": "group"}, "use 4"),
        ({"dropout": 1.5}, "dropout"),
        ({"dtype": "bf16"}, "bfloat16"),
        ({"padding": "full"}, "same, valid"),
    ],
)
def test_fields_that_no_net_can_have_are_refused_when_it_is_built(fields, says):
    with pytest.raises(InputError, match=says):
        models.build("unet", num_classes=2, **fields)
