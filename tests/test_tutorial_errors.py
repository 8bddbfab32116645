"""What tutorials of the U-Net get wrong, and the right value of each (docs/torch.md).

What is said of PyTorch is tried in PyTorch, where it is installed.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import geometry, layers, losses, models, resample, torch_weights
from unet_jax.data.border import border_weight


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def _shapes(model, image):
    """Shapes of a net's variables and of its logits; nothing is computed."""
    image = jax.ShapeDtypeStruct(image, jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return variables, jax.eval_shape(model.apply, variables, image)[0].shape


# --- Sizes ---------------------------------------------------------------------------


def test_a_padded_net_gives_572_for_572_and_the_papers_388():
    for name, size in (("unet", 572), ("unet_2015", 388)):
        model = models.build(name, num_classes=2)
        assert models.output_size(model, (572, 572)) == (size, size)
        assert _shapes(model, (1, 572, 572, 1))[1] == (1, size, size, 2)


def test_the_papers_net_has_31030658_parameters():
    def count(channels, classes, **fields):
        model = models.build("unet_2015", num_classes=classes, **fields)
        variables, _ = _shapes(model, (1, 188, 188, channels))
        return sum(x.size for x in jax.tree.leaves(variables["params"]))

    assert count(1, 2) == 31_030_658
    assert count(3, 1) == 31_031_745
    assert count(3, 2) == 31_031_810
    assert count(1, 2, norm="batch", conv_bias=True) == 31_042_434
    # A channel more is 9 * 64, a class more 64 + 1: no net of the paper has 31,031,554.
    for channels in range(1, 5):
        rest = 31_031_554 - count(channels, 1)
        assert rest < 0 or rest % 65


@pytest.mark.parametrize(
    ("kernel", "padding", "end", "size"), [(2, 0, 0, 16), (3, 1, 1, 16), (3, 1, 0, 15)]
)
def test_a_transposed_convolution_loses_the_padding_at_both_sides(
    torch, kernel, padding, end, size
):
    layer = torch.nn.ConvTranspose2d(
        3, 4, kernel, stride=2, padding=padding, output_padding=end
    )
    assert layer(torch.zeros(1, 3, 8, 8)).shape == (1, 4, size, size)
    options = {"kernel": kernel, "stride": 2, "padding": padding}
    assert geometry.conv_transpose_size(8, **options, output_padding=end) == size
    wrong = (8 - 1) * 2 - padding + kernel + end
    assert (wrong != size) == (padding > 0)
    up = resample.UpConv(features=4)
    if padding:
        up = resample.WideUpConv(4, (2, 2), (3, 3), short=not end)
    x = jnp.zeros((1, 8, 8, 3))
    variables = jax.eval_shape(up.init, jax.random.key(0), x)
    assert jax.eval_shape(up.apply, variables, x).shape == (1, size, size, 4)


def test_the_centre_of_the_papers_skips_begins_at_4_16_40_88():
    found = []
    for skip, up in ((64, 56), (136, 104), (280, 200), (568, 392)):
        cut = layers.crop(np.arange(skip), (up,), axis=0)
        assert cut[0] == skip - 1 - cut[-1]  # as much at both sides
        found.append((int(cut[0]), int(cut[-1]) + 1))
    assert found == [(4, 60), (16, 120), (40, 240), (88, 480)]


# --- Loss ----------------------------------------------------------------------------


def _bce(logits, label):
    loss_fn = losses.build(task="labels", binary_cross_entropy=1.0)
    label = jnp.full((1, 4, 4, 1), label)
    logits = jnp.full(label.shape, logits, jnp.float32)
    return float(loss_fn(logits, label, jnp.ones(label.shape))[0])


def test_the_weight_map_has_the_2_of_a_gaussian():
    """Two straight objects, nine pixels of background: d1 = d2 = 5 in the middle."""
    instances = np.zeros((4, 13), np.int32)
    instances[:, :2], instances[:, 11:] = 1, 2
    weight = border_weight(instances, w0=10.0, sigma=5.0)
    assert weight[0, 6] == pytest.approx(10 * np.exp(-100 / 50), rel=1e-6)  # 1.35
    assert 10 * np.exp(-100 / 25) == pytest.approx(0.18, abs=0.005)


def test_cross_entropy_of_probabilities_never_falls_below_031():
    # A perfect net behind a sigmoid says 1 and 0; the loss takes them for logits.
    np.testing.assert_allclose(_bce(1.0, 1), math.log1p(math.exp(-1)), rtol=1e-6)
    np.testing.assert_allclose(_bce(0.0, 0), math.log(2), rtol=1e-6)
    assert _bce(1.0, 1) > 0.3132 and _bce(0.0, 0) > 0.693
    assert _bce(30.0, 1) < 1e-9 and _bce(-30.0, 0) < 1e-9
    # Nor does it teach: a pixel that is wrong by 8 gets 1/6000 of the gradient.
    right = jax.grad(lambda x: -jax.nn.log_sigmoid(x))(-8.0)
    twice = jax.grad(lambda x: -jax.nn.log_sigmoid(jax.nn.sigmoid(x)))(-8.0)
    assert 5900 < right / twice < 6100


def test_pytorchs_loss_of_probabilities_is_the_same(torch):
    loss = torch.nn.BCEWithLogitsLoss()
    for probability in (0.0, 1.0):
        x = torch.full((1, 1, 4, 4), probability)
        np.testing.assert_allclose(
            loss(x, x).item(), _bce(probability, int(probability)), rtol=1e-6
        )


# --- Layers --------------------------------------------------------------------------


def test_a_skip_is_joined_along_the_channels(torch):
    skip, up = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    assert torch.cat([skip, up]).shape == (4, 3, 4, 4)  # of the batch: no error here
    assert torch.cat([skip, up], dim=1).shape == (2, 6, 4, 4)
    with pytest.raises(RuntimeError, match="must match"):
        torch.cat([skip, torch.zeros(2, 5, 4, 4)])
    model = models.build("unet", num_classes=1, features=(3, 6))
    variables, logits = _shapes(model, (2, 4, 4, 1))
    kernel = variables["params"]["decoder"]["level0"]["conv0"]["kernel"]
    assert kernel.shape == (3, 3, 3 + 3, 3) and logits == (2, 4, 4, 1)


def test_the_second_norm_of_a_narrowing_block_has_the_outer_width(torch):
    model = models.build(
        "unet_bilinear", num_classes=1, features=(4, 8, 8), decoder_features=(4, 4)
    )
    block = _shapes(model, (1, 8, 8, 3))[0]["params"]["decoder"]["level1"]
    assert block["conv0"]["kernel"].shape == (3, 3, 16, 8)
    assert block["norm0"]["scale"].shape == (8,)  # in the middle
    assert block["conv1"]["kernel"].shape == (3, 3, 8, 4)
    assert block["norm1"]["scale"].shape == (4,)  # and not 8
    nn = torch.nn
    wrong = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(8))
    with pytest.raises(RuntimeError, match="running_mean"):
        wrong(torch.zeros(1, 8, 4, 4))


def test_a_loop_over_conv2d_leaves_the_up_convolutions_as_they_were(torch):
    nn = torch.nn
    net = nn.ModuleList([nn.Conv2d(64, 64, 3), nn.ConvTranspose2d(128, 64, 2, 2)])
    old = [layer.weight.clone() for layer in net]
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    assert not torch.equal(net[0].weight, old[0])
    assert torch.equal(net[1].weight, old[1])
    # The paper's rule is sqrt(2 / N), N = 128 inputs of one output pixel.
    up = resample.UpConv(features=64)
    kernel = up.init(jax.random.key(0), jnp.zeros((1, 2, 2, 128)))["params"]["kernel"]
    np.testing.assert_allclose(kernel.std(), math.sqrt(2 / 128), rtol=0.03)
    spread = net[1].weight.std().item() / math.sqrt(2 / 128)
    np.testing.assert_allclose(spread, 1 / math.sqrt(12), rtol=0.03)


# --- What no error message says ------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "least"),
    [("flip", 0.5), ({"merge": "concat_up_first"}, 0.5), ({"up": "bilinear"}, 0.05)],
    ids=["flipped up-convolution", "concatenation", "align_corners"],
)
def test_what_is_read_wrongly_without_an_error_is_wrong_by_much(torch, wrong, least):
    from tests import torch_nets as nets

    bilinear = isinstance(wrong, dict) and "up" in wrong
    net = nets.filled(nets.Net(3, 2, (4, 6, 8), bilinear=bilinear)).float()
    image = np.random.default_rng(0).standard_normal((1, 3, 16, 24), np.float32)
    with torch.no_grad():
        expected = net(torch.from_numpy(image)).numpy()

    def difference(variables, **options):
        model, _ = torch_weights.load(net.state_dict(), **options)
        logits = jax.jit(model.apply)(variables, np.moveaxis(image, 1, -1))[0]
        off = abs(np.moveaxis(np.asarray(logits), -1, 1) - expected).max()
        return off / abs(expected).max()

    _, variables = torch_weights.load(net.state_dict())
    assert difference(variables) < 2e-5
    if wrong == "flip":
        ups = {k: v for k, v in variables["params"]["decoder"].items() if "up" in k}
        flipped = jax.tree.map(lambda x: x[::-1, ::-1] if x.ndim == 4 else x, ups)
        decoder = {**variables["params"]["decoder"], **flipped}
        params = {**variables["params"], "decoder": decoder}
        assert difference({**variables, "params": params}) > least
    else:
        assert difference(variables, **wrong) > least
