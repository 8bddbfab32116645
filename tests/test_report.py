"""The model's table against hand counts, and pictures by their pixels."""

import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from unet_jax import models, pictures, report
from unet_jax.log import RunLog
from unet_jax.types import InputError


def shape(*size):
    return jax.ShapeDtypeStruct(size, jnp.float32)


# --- Counting ------------------------------------------------------------------------


def test_flops_of_convolutions_and_products():
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    found = report.count_flops(conv, shape(3, 10, 12, 5), shape(3, 3, 5, 7))
    assert sum(found.values()) == 2 * (3 * 5 * 6 * 7) * (3 * 3 * 5)
    found = report.count_flops(
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b), shape(2, 3, 4), shape(2, 4, 5)
    )
    assert sum(found.values()) == 2 * 2 * 3 * 4 * 5


def test_flops_of_grouped_convolution():
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1,),
            "VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=4,
        )

    found = report.count_flops(conv, shape(1, 9, 8), shape(3, 2, 8))
    assert sum(found.values()) == 2 * (7 * 8) * (3 * 2)


def test_flops_inside_control_flow_and_transformations():
    product = 2 * 4 * 4 * 4

    @jax.jit
    def scanned(x):
        with jax.named_scope("outer"):
            body = jax.checkpoint(lambda c, _: (jnp.dot(c, c), None))
            return jax.lax.scan(body, x, None, length=7)[0]

    assert report.count_flops(scanned, shape(4, 4)) == {"outer": 7 * product}

    def branched(x):
        def dear(x):
            return jnp.dot(jnp.dot(x, x), x)

        return jax.lax.cond(x[0, 0] > 0, dear, lambda x: jnp.dot(x, x), x)

    found = report.count_flops(branched, shape(4, 4))
    assert sum(found.values()) == 2 * product

    def loss(x):
        with jax.named_scope("layer"):
            y = jnp.dot(x, x)
        return jnp.sum(y)

    # The gradient of a product is two products, in the scope of their own product.
    found = report.count_flops(jax.value_and_grad(loss), shape(4, 4))
    assert found == {"layer": 3 * product}
    assert report.count_flops(jnp.sin, shape(4, 4)) == {}


def test_parameters_by_depth():
    params = {
        "encoder": {
            "level0": {"conv0": {"kernel": shape(3, 3), "bias": shape(3)}},
            "level1": {"conv0": {"kernel": shape(2)}},
        },
        "head": {"kernel": shape(5), "bias": shape()},
    }
    assert report.count_parameters(params, depth=1) == {"encoder": 14, "head": 6}
    assert report.count_parameters(params) == {
        "encoder/level0": 12,
        "encoder/level1": 2,
        "head": 6,
    }
    assert "encoder/level0/conv0" in report.count_parameters(params, depth=None)


# --- The table -----------------------------------------------------------------------


def table_rows(table):
    """The first word of each line to the rest of it."""
    return {line.split()[0]: " ".join(line.split()[1:]) for line in table.splitlines()}


def test_the_table_of_the_paper():
    model = models.build("unet_2015", num_classes=2)
    rows = table_rows(report.model_table(model, (1, 572, 572, 1)))
    shares = "31,030,658 = encoder 18,842,048 + decoder 12,188,480 + head 130"
    assert rows["parameters:"] == shares
    assert rows["trained:"] == shares
    # The paper's figure 1, by level: the size after the second convolution.
    first = 2 * 64 * (570**2 * 9 + 568**2 * 9 * 64) / 1e9
    assert rows["encoder/level0"] == f"568 x 568 x 64 37,568 {first:.2f} G"
    assert rows["encoder/level4"].startswith("28 x 28 x 1024 14,157,824 ")
    assert rows["decoder/up3"].startswith("56 x 56 x 512 2,097,664 ")
    assert rows["decoder/level0"].startswith("388 x 388 x 64 110,720 ")
    head = 2 * 388**2 * 64 * 2 / 1e6
    assert rows["head"] == f"388 x 388 x 2 130 {head:.2f} M"
    assert not any("dropout" in name for name in rows)
    levels = [name for name in rows if "/" in name]
    assert levels[:2] == ["encoder/level0", "encoder/level1"]
    assert levels[-3:] == ["decoder/up0", "decoder/merge0", "decoder/level0"]


def test_the_table_shows_what_is_frozen():
    model = models.build("unet", num_classes=1, features=(4, 8), norm="none")
    table = report.model_table(model, (2, 16, 16, 3), freeze=("encoder/level1", "head"))
    rows = table_rows(table)
    encoder = 9 * 3 * 4 + 4 + 9 * 4 * 4 + 4
    deepest = 9 * 4 * 8 + 8 + 9 * 8 * 8 + 8
    decoder = 4 * 8 * 4 + 4 + 9 * 8 * 4 + 4 + 9 * 4 * 4 + 4
    total = encoder + deepest + decoder + 5
    assert rows["parameters:"].startswith(f"{total:,} = encoder {encoder + deepest:,}")
    assert rows["trained:"] == (
        f"{encoder + decoder:,} = encoder {encoder:,} + decoder {decoder:,}"
    )
    assert rows["encoder/level1"].startswith("(frozen) 8 x 8 x 8")
    assert rows["head"].startswith("(frozen)")
    assert rows["encoder/level0"].startswith("16 x 16 x 4")
    part = report.model_table(model, (1, 16, 16, 3), freeze=("encoder/level0/conv0",))
    assert table_rows(part)["encoder/level0"].startswith("(partly frozen)")
    with pytest.raises(InputError, match="backbone"):
        report.model_table(model, (1, 16, 16, 3), freeze=("backbone",))


@pytest.mark.parametrize("options", [{"norm": "group", "norm_groups": 2}, {}])
def test_the_table_in_3d_and_without_learnt_upsampling(options):
    model = models.build(
        "unet", num_classes=2, features=(4, 8), up="nearest", **options
    )
    one = report.model_table(model, (1, 4, 8, 8, 1))
    assert one == report.model_table(model, (5, 4, 8, 8, 1))
    rows = table_rows(one)
    assert rows["encoder/level1"].startswith("2 x 4 x 4 x 8")
    assert rows["decoder/up0"] == "4 x 8 x 8 x 8"
    assert rows["head"].startswith("4 x 8 x 8 x 2")


def test_rematerialised_blocks_keep_their_rows():
    plain = models.build("unet", num_classes=2, features=(4, 8))
    remat = plain.clone(remat=2)
    size = (1, 16, 16, 1)
    assert report.model_table(remat, size) == report.model_table(plain, size)


def test_the_flops_add_up_to_xlas_within_its_elementwise_work():
    model = models.build("unet", num_classes=2, features=(16, 32), norm="none")
    image = shape(1, 64, 64, 3)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)

    def forward(v, x):
        return model.apply(v, x)[0]

    ours = sum(report.count_flops(forward, variables, image).values())
    theirs = jax.jit(forward).lower(variables, image).cost_analysis()["flops"]
    # XLA does not count taps on the zero padding and does count the activations.
    assert ours == pytest.approx(theirs, rel=0.05)


# --- Pictures ------------------------------------------------------------------------


def read(path):
    return np.asarray(Image.open(path))


def panel(sheet, column, height, width, wide):
    """The ``height x width`` pixels of a panel of the first row."""
    top, left = 22, pictures.GAP + column * (wide + pictures.GAP)
    return sheet[top : top + height, left : left + width]


def test_picture_of_two_classes(tmp_path):
    image = np.zeros((64, 128, 1), np.uint16)
    image[:, 64:] = 50  # nearly black on the scale of u16, stretched in the picture
    label = np.zeros((64, 128), np.uint8)
    label[32:] = 1
    weight = np.ones((64, 128), np.float32)
    label[:, :32], weight[:, :32] = 255, 0
    row = {"image": image, "label": label, "weight": weight, "prediction": 1 - label}
    row["prediction"] = np.where(weight > 0, 1 - label, 1)
    path = tmp_path / "pictures" / "step_1.png"
    report.picture([row], path, label_names=("background", "cell"))
    sheet = read(path)
    shown, truth, guess = (panel(sheet, i, 128, 256, 256) for i in range(3))
    blue = np.array(pictures.PALETTE[0], np.uint8)
    assert (shown[:, :128] == 0).all() and (shown[:, 128:] == 255).all()
    assert (truth[64:, 64:] == blue).all() and (truth[:64, 64:] == 0).all()
    hatch = truth[:, :64]
    assert set(np.unique(hatch)) == {90, 150}
    assert (guess[:, :64] == blue).all() and (guess[:64, 64:] == blue).all()
    assert (guess[64:, 64:] == 0).all()


def test_overlapping_labels_mix_and_volumes_show_the_middle(tmp_path):
    image = np.zeros((5, 16, 16, 3), np.float32)
    image[2, :8] = (1, 0.5, 0)
    label = np.zeros((5, 16, 16, 2), np.uint8)
    label[2, :, :8, 0] = 1
    label[2, :8, :, 1] = 1
    row = {"image": image, "label": label, "prediction": np.zeros_like(label)}
    path = tmp_path / "volume.png"
    report.picture([row], path, label_names=("a", "b"))
    shown, truth, guess = (panel(read(path), i, 256, 256, 256) for i in range(3))
    first, second = np.array(pictures.PALETTE[:2], np.uint8)
    assert (truth[128:, :128] == first).all() and (truth[:128, 128:] == second).all()
    assert (truth[:128, :128] == (np.add(first, second, dtype=int) // 2)).all()
    assert (shown[:128] == (255, 128, 0)).all() and (shown[128:] == 0).all()
    assert (guess == 0).all()


@pytest.mark.parametrize(
    ("size", "drawn"),
    [((1, 1), (256, 256)), ((3, 600), (1, 256)), ((600, 300), (256, 128))],
)
def test_any_size_fits(tmp_path, size, drawn):
    image = np.full((*size, 2), np.nan, np.float32)
    image[0, 0] = 1
    label = np.ones(size, np.int32)
    row = {"image": image, "label": label, "prediction": label.astype(bool)}
    report.picture([row] * 6, tmp_path / "a.png", label_names=("x", "y"))
    sheet = read(tmp_path / "a.png")
    wide = max(drawn[1], 80)
    assert (panel(sheet, 1, *drawn, wide) == pictures.PALETTE[1]).all()
    rows = 4 * (drawn[0] + pictures.GAP)
    assert sheet.shape[0] == pictures.LINE + pictures.GAP + rows + pictures.LINE


def test_many_names_wrap_and_no_rows_are_no_error(tmp_path):
    names = tuple(f"organ number {i}" for i in range(20))
    report.picture([], tmp_path / "a.png", label_names=names)
    assert read(tmp_path / "a.png").shape[0] > 5 * pictures.LINE
    assert pictures.class_colours(names).shape == (20, 3)
    assert not pictures.class_colours(("a", "background"))[1].any()


# --- Curves --------------------------------------------------------------------------


def test_curves(tmp_path):
    run = RunLog(tmp_path, resume_step=0)
    for step in range(1, 40):
        rates = {"learning_rate": 1e-3, "grad_norm": 1.0, "images_per_second": 2.0}
        run.scalars("train", step, {"loss": math.exp(-step / 5), **rates})
    for step in (20, 40):
        nan = math.nan if step == 20 else 0.9
        values = {"loss": 0.5, "dice": 0.8, "dice/background": 0.9, "dice/cell": nan}
        run.scalars("evaluation", step, values)
    run.close()
    path = report.curves(tmp_path)
    assert path == tmp_path / "curves.png"
    assert read(path).shape[:2] == (380, 1300)


def test_curves_of_one_row_of_nans_and_of_nothing(tmp_path):
    with pytest.raises(InputError, match="nothing to draw"):
        report.curves(tmp_path)
    (tmp_path / "evaluation.csv").write_text("step,loss,dice\n")
    with pytest.raises(InputError, match="nothing to draw"):
        report.curves(tmp_path)
    (tmp_path / "evaluation.csv").write_text("step,loss,dice,dice/a\n5,nan,,inf\n")
    assert report.curves(tmp_path).exists()


def test_a_logarithmic_axis_only_where_it_pays():
    assert report._is_steep([np.array([5.0, np.nan, 0.1])])
    assert not report._is_steep([np.array([5.0, 0.0])])
    assert not report._is_steep([np.array([1.0]), np.array([0.5])])
    assert not report._is_steep([np.array([np.nan])])
    assert not report._is_steep([])


def test_the_import_is_light():
    code = (
        "import sys, unet_jax.report, unet_jax.log, unet_jax.pictures;"
        "heavy = {'matplotlib', 'PIL', 'tensorboardX', 'tensorflow_datasets'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    root = Path(report.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
