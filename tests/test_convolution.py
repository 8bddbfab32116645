"""The convolution against `jax.lax`'s under every transformation, and what it keeps."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import convolution, sharding
from unet_jax.convolution import convolve

# Batch, size, channels, features, kernel, padding.
CASES = {
    "image": (3, (7, 6), 3, 4, (3, 3), ((1, 1), (1, 1))),
    "image, valid": (1, (7, 6), 4, 2, (3, 3), "VALID"),
    "image, 3 x 1": (3, (9, 5), 3, 3, (3, 1), ((1, 1), (0, 0))),
    "image, 1 x 1": (3, (4, 5), 2, 3, (1, 1), ((0, 0), (0, 0))),
    "image, uneven": (1, (5, 7), 3, 2, (2, 3), ((0, 1), (2, 0))),
    "image, wide": (3, (4, 3), 3, 2, (3, 2), ((4, 3), (2, 3))),  # wider than the kernel
    "image, wide before": (2, (4, 3), 3, 2, (3, 3), ((5, 0), (0, 4))),
    "volume": (3, (5, 4, 3), 2, 4, (3, 3, 3), ((1, 1),) * 3),
    "volume, to fewer": (1, (5, 4, 3), 4, 2, (3, 3, 3), ((1, 1),) * 3),
    "volume, valid": (3, (4, 5, 3), 3, 2, (3, 3, 3), "VALID"),
    "volume, slices": (1, (3, 4, 5), 2, 3, (1, 3, 3), ((0, 0), (1, 1), (1, 1))),
    "volume, 1 x 1 x 1": (3, (3, 2, 4), 3, 2, (1, 1, 1), "VALID"),
    "volume, wide": (2, (3, 2, 4), 3, 2, (2, 3, 3), ((3, 2), (3, 5), (0, 3))),
    "volume, uneven": (3, (5, 4, 3), 3, 2, (5, 2, 3), ((3, 2), (0, 1), (1, 1))),
    "volume, uneven, to more": (
        1,
        (5, 4, 3),
        2,
        3,
        (5, 2, 3),
        ((1, 3), (1, 0), (2, 0)),
    ),
}
STRIDED = {
    "image": ((2, 1), (2, (7, 6), 3, 4, (3, 3), ((1, 1), (1, 1)))),
    "volume": ((2, 2, 2), (2, (5, 4, 6), 3, 2, (3, 3, 3), ((1, 1),) * 3)),
    "volume, to more": ((2, 1, 2), (1, (6, 4, 5), 2, 3, (3, 2, 3), "VALID")),
    "slices": ((1, 2, 2), (2, (4, 5, 6), 3, 2, (1, 3, 3), ((0, 0), (1, 1), (1, 1)))),
    "along the depth": ((3, 1, 1), (1, (7, 3, 4), 3, 2, (3, 3, 1), "VALID")),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def _blocks(monkeypatch):
    """The gradients of kernels in three blocks of rows: small maps are one."""
    monkeypatch.setattr(convolution, "BLOCK", 1)
    monkeypatch.setattr(convolution, "BLOCKS", 3)


def _functions(case, strides=None):
    """Our convolution and lax's, as functions of map and kernel."""
    rank, padding = len(case[1]), case[-1]
    space = "DHW"[3 - rank :]
    numbers = (f"N{space}C", f"{space}IO", f"N{space}C")

    def made(convolution):
        return lambda x, kernel: convolution(
            x, kernel, strides or (1,) * rank, padding, dimension_numbers=numbers
        )

    return made(convolve), made(jax.lax.conv_general_dilated)


def _map_and_kernel(rng, case, dtype=np.float64):
    batch, size, channels, features, kernel, _ = case
    x = rng.standard_normal((batch, *size, channels))
    kernel = rng.standard_normal((*kernel, channels, features))
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def _compiled(function, **options):
    """Under ``jit``, with all passes of XLA and none of LLVM: a third of the time."""
    options["compiler_options"] = {"xla_backend_optimization_level": 0}
    return jax.jit(function, **options)


def _loss(function):
    return lambda *given: jnp.sum(jnp.sin(function(*given)))


def _first(function, x, kernel):
    """Value and first derivatives in both directions, by name."""
    at, towards = (x, kernel), (jnp.cos(x), jnp.sin(3 * kernel))
    return {
        "value": function(*at),
        "gradient": jax.grad(_loss(function), (0, 1))(*at),
        "jvp": jax.jvp(function, at, towards),
        "jvp by the map": jax.jvp(lambda x: function(x, kernel), (x,), towards[:1]),
    }


def _more(function, x, kernel):
    """Second derivatives, and functions mapped over either argument, by name."""
    gradient = jax.grad(_loss(function), (0, 1))
    at, towards = (x, kernel), (jnp.cos(x), jnp.sin(3 * kernel))
    xs, kernels = jnp.stack([x, x + 1]), jnp.stack([kernel, kernel - 1])

    def of_gradient(x, kernel):
        return sum(jnp.sum(jnp.cos(part)) for part in gradient(x, kernel))

    def of_jvp(x, kernel):
        return jnp.sum(jnp.sin(jax.jvp(function, (x, kernel), towards)[1]))

    return {
        "hessian times vector": jax.jvp(gradient, at, towards)[1],
        "gradient of gradient": jax.grad(of_gradient, (0, 1))(*at),
        "gradient of jvp": jax.grad(of_jvp, (0, 1))(*at),
        "maps": jax.vmap(gradient, (0, None))(xs, kernel),
        "kernels": jax.vmap(gradient, (None, 0))(x, kernels),
        "both": jax.vmap(function)(xs, kernels),
    }


def _equal(ours, lax):
    assert ours.keys() == lax.keys()
    for what, expected in lax.items():
        chex.assert_trees_all_equal_dtypes(ours[what], expected)
        chex.assert_trees_all_close(
            ours[what], expected, rtol=1e-11, atol=1e-10, custom_message=what
        )


def _compare(what, functions, *given):
    _equal(*(_compiled(partial(what, function))(*given) for function in functions))


# --- Against lax ---------------------------------------------------------------------


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("name", CASES)
def test_it_is_that_of_lax_and_so_are_its_derivatives(rng, name):
    case = CASES[name]
    _compare(_first, _functions(case), *_map_and_kernel(rng, case))


@pytest.mark.parametrize("name", ["image", "image, uneven", "volume, uneven"])
def test_in_one_block_it_is_that_of_lax(rng, name):
    case = CASES[name]
    _compare(_first, _functions(case), *_map_and_kernel(rng, case))


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("name", ["image", "volume, uneven", "volume, uneven, to more"])
def test_it_is_that_of_lax_differentiated_twice_and_mapped(rng, name):
    case = CASES[name]
    _compare(_more, _functions(case), *_map_and_kernel(rng, case))


@pytest.mark.parametrize("name", STRIDED)
def test_strided_it_is_that_of_lax(rng, name):
    strides, case = STRIDED[name]
    _compare(_first, _functions(case, strides), *_map_and_kernel(rng, case))


def test_strided_it_is_that_of_lax_differentiated_twice_and_mapped(rng):
    strides, case = STRIDED["volume"]
    _compare(_more, _functions(case, strides), *_map_and_kernel(rng, case))


@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_any_number_of_blocks_gives_the_same_gradient(rng, monkeypatch, count):
    """Also more blocks than rows, and a last one that is shorter."""
    case = CASES["image"]
    given = _map_and_kernel(rng, case)
    ours, lax = _functions(case)
    monkeypatch.setattr(convolution, "BLOCK", 1)
    monkeypatch.setattr(convolution, "BLOCKS", count)
    gradient = jax.grad(_loss(ours), 1)
    # At most as many as rows: of three images, with one of zeros after each.
    text = str(jax.make_jaxpr(lambda *given: jax.jvp(ours, given, given))(*given))
    blocks = -(-24 // -(-24 // count))
    # The value, one of the map's tangent, and the blocks of the kernel's.
    assert text.count("conv_general_dilated[") == 2 + blocks
    chex.assert_trees_all_close(
        _compiled(gradient)(*given),
        _compiled(jax.grad(_loss(lax), 1))(*given),
        atol=1e-11,
    )


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 5)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_volumes_are_convolved_as_lax_does(rng, kernel, stride, padding):
    x = jnp.asarray(rng.standard_normal((2, 5, 6, 7, 3)))
    w = jnp.asarray(rng.standard_normal((*kernel, 3, 4)))
    widths = tuple((k // 2, k // 2) for k in kernel)
    given = {"same": widths, "valid": "VALID"}[padding]
    case = (*(2, x.shape[1:-1], 3, 4), kernel, given)

    def both(function):
        def loss(x, w):
            y = function(x, w)
            return jnp.sum(jnp.sin(y)), y

        return _compiled(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, w)

    ours, theirs = (both(function) for function in _functions(case, stride))
    chex.assert_trees_all_close(ours, theirs, atol=1e-11)


# --- Under transformations -----------------------------------------------------------


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("name", ["image, uneven", "volume"])
def test_linearised_and_transposed_it_is_its_derivative(rng, name):
    case = CASES[name]
    x, kernel = _map_and_kernel(rng, case)
    ours, lax = _functions(case)

    @_compiled
    def linearised(x, kernel):
        y, linear = jax.linearize(ours, x, kernel)
        back = jax.linear_transpose(linear, x, kernel)
        return y, linear(jnp.cos(x), jnp.sin(kernel)), back(jnp.cos(y))

    @_compiled
    def expected(x, kernel):
        y, slope = jax.jvp(lax, (x, kernel), (jnp.cos(x), jnp.sin(kernel)))
        return y, slope, jax.vjp(lax, x, kernel)[1](jnp.cos(y))

    chex.assert_trees_all_close(
        linearised(x, kernel), expected(x, kernel), rtol=1e-11, atol=1e-11
    )


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("name", ["image, 3 x 1", "volume, uneven"])
def test_checkpointed_and_scanned_it_is_that_of_lax(rng, name):
    batch, size, channels, _, kernel, _ = CASES[name]
    # As many features as channels, and padding that keeps the size.
    case = (
        batch,
        size,
        channels,
        channels,
        kernel,
        tuple((k // 2, (k - 1) // 2) for k in kernel),
    )
    x, _ = _map_and_kernel(rng, case)
    kernels = jnp.stack([_map_and_kernel(rng, case)[1] for _ in range(3)]) / 4
    ours, lax = _functions(case)

    def scanned(x, kernels):
        def layer(x, kernel):
            return jnp.sin(jax.checkpoint(ours)(x, kernel)), None

        return jax.lax.scan(layer, x, kernels)[0]

    def unrolled(x, kernels):
        for kernel in kernels:
            x = jnp.sin(lax(x, kernel))
        return x

    _compare(_first, (scanned, unrolled), x, kernels)


# --- Odd ones ------------------------------------------------------------------------


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("name", ["image", "volume, to fewer"])
def test_bfloat16_goes_in_and_comes_out(rng, name):
    case = CASES[name]
    x, kernel = _map_and_kernel(rng, case, jnp.bfloat16)
    ours, lax = _functions(case)
    shape = jax.eval_shape(ours, x, kernel).shape
    given = x, kernel, jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    exact = tuple(a.astype(jnp.float64) for a in given)

    def both(function, x, kernel, g):
        y, back = jax.vjp(function, x, kernel)
        return (y, *back(g))

    found = _compiled(partial(both, ours))(*given)
    in_float64 = _compiled(partial(both, lax))
    expected = in_float64(*exact)
    # What is added up, taken without signs, is the unit of what rounding may do.
    sizes = in_float64(*(jnp.abs(a) for a in exact))
    for one, value, unit in zip(found, expected, sizes, strict=True):
        assert one.dtype == jnp.bfloat16
        # A few roundings to eight bits, one of each part that is added up.
        assert jnp.all(jnp.abs(one.astype(jnp.float64) - value) <= unit * 2**-7)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize(
    "case",
    [
        (0, (7, 6), 3, 4, (3, 3), ((1, 1), (1, 1))),
        (0, (4, 3, 5), 3, 2, (3, 3, 3), ((1, 1),) * 3),
        (2, (7, 6), 0, 4, (3, 3), ((1, 1), (1, 1))),
        (2, (4, 3, 5), 0, 4, (3, 3, 3), ((1, 1),) * 3),
        (2, (7, 6), 3, 0, (3, 3), ((1, 1), (1, 1))),
        (2, (4, 3, 5), 3, 0, (3, 3, 3), ((1, 1),) * 3),
        (2, (2, 6), 3, 4, (3, 3), "VALID"),
        (2, (6, 1), 3, 4, (3, 4), ((1, 1), (1, 1))),
        (2, (2, 4, 4), 3, 2, (3, 3, 3), "VALID"),
        (2, (4, 4, 2), 3, 2, (3, 3, 3), "VALID"),
        (2, (4, 2, 4), 3, 2, (3, 5, 3), ((1, 1),) * 3),
    ],
)
def test_nothing_and_maps_smaller_than_the_kernel_go_through(rng, case, strides):
    x, kernel = _map_and_kernel(rng, case)
    functions = _functions(case, (strides,) * len(case[1]))
    ours, lax = (jax.vjp(function, x, kernel) for function in functions)
    chex.assert_trees_all_equal(ours[0], lax[0])
    assert not ours[0].size or not x.size
    chex.assert_trees_all_equal(ours[1](ours[0] + 1), lax[1](lax[0] + 1))


@pytest.mark.parametrize("name", ["image", "volume"])
def test_precision_is_handed_on(rng, name):
    case = CASES[name]
    given = _map_and_kernel(rng, case)
    space = "DHW"[3 - len(case[1]) :]
    options = {"dimension_numbers": (f"N{space}C", f"{space}IO", f"N{space}C")}

    def function(x, kernel):
        return convolve(
            x, kernel, (1,) * len(space), case[-1], **options, precision="highest"
        )

    text = str(jax.make_jaxpr(jax.grad(_loss(function), (0, 1)))(*given))
    highest = "precision=(Precision.HIGHEST, Precision.HIGHEST)"
    assert text.count("conv_general_dilated[") == text.count(highest) > 0


# --- What is kept, and what is compiled ----------------------------------------------


def _kept(function, *given):
    """The arrays that the way back needs of the way there."""
    return jax.tree.leaves(jax.vjp(function, *given)[1])


@pytest.mark.parametrize(
    ("name", "compiled"),
    [*((name, False) for name in CASES), ("image", True), ("volume", True)],
)
def test_nothing_is_kept_but_map_and_kernel(rng, name, compiled):
    """The padded map would be, and the map once more for each tap along the depth."""
    case = CASES[name]
    x, kernel = _map_and_kernel(rng, case)
    ours = _functions(case)[0]
    kept = _kept(jax.jit(ours) if compiled else ours, x, kernel)
    assert len(kept) == 2
    chex.assert_trees_all_equal(
        sorted(kept, key=jnp.ndim), sorted([x, kernel], key=jnp.ndim)
    )


@pytest.mark.parametrize("name", ["image", "image, wide", "volume, uneven"])
def test_on_an_accelerator_it_is_that_of_lax(rng, monkeypatch, name):
    monkeypatch.setattr(sharding, "on_cpu", lambda: False)
    case = CASES[name]
    _compare(_first, _functions(case), *_map_and_kernel(rng, case))


@pytest.mark.parametrize("name", ["image", "volume"])
def test_programs_for_accelerators_have_the_plain_convolutions(rng, monkeypatch, name):
    monkeypatch.setattr(sharding, "on_cpu", lambda: False)
    case = CASES[name]
    given = _map_and_kernel(rng, case, jnp.float32)
    axes = ", ".join(str(axis) for axis in range(len(case[1])))
    function = jax.jit(jax.value_and_grad(_loss(_functions(case)[0]), (0, 1)))
    for platform in ("tpu", "cuda"):
        text = jax.export.export(function, platforms=[platform])(*given).mlir_module()
        lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
        # The value and two gradients, of all axes.
        assert len(lines) == 3
        assert all(f", {axes}, " in line for line in lines)
        assert "stablehlo.concatenate" not in text


@pytest.mark.parametrize("name", ["image", "volume"])
def test_one_program_for_all_platforms_is_exported(rng, name):
    case = CASES[name]
    given = _map_and_kernel(rng, case, jnp.float32)
    function = jax.jit(jax.value_and_grad(_loss(_functions(case)[0]), (0, 1)))
    exported = jax.export.export(function, platforms=["cpu", "tpu", "cuda"])(*given)
    chex.assert_trees_all_close(
        exported.call(*given), function(*given), rtol=1e-5, atol=1e-5
    )


# --- On a mesh -----------------------------------------------------------------------


MESHED = {
    "image": (1, (2, (8, 6), 3, 4, (3, 3), ((1, 1), (1, 1)))),
    # What does not divide over the devices: rows, or those that are left of them.
    "image, valid": (1, (2, (8, 7), 3, 4, (4, 3), "VALID")),
    "image, strided": (2, (2, (8, 6), 3, 4, (3, 3), ((1, 1), (1, 1)))),
    "volume": (1, (2, (4, 5, 3), 2, 4, (3, 3, 3), ((1, 1),) * 3)),
    "volume, valid": (1, (2, (6, 5, 3), 4, 2, (2, 3, 3), "VALID")),
    "volume, strided": (2, (2, (6, 5, 4), 3, 2, (3, 3, 3), ((1, 1),) * 3)),
}


@pytest.mark.parametrize("name", MESHED)
@pytest.mark.parametrize(("data", "space"), [(2, 1), (1, 2)])
def test_over_two_devices_it_is_that_of_lax(rng, name, data, space):
    stride, case = MESHED[name]
    x, kernel = _map_and_kernel(rng, case)
    ours, lax = _functions(case, (stride,) * len(case[1]))
    mesh = sharding.make_mesh(data, space)
    whole, split = sharding.replicated(mesh), sharding.split(mesh, x.ndim)

    def both(function, x, kernel):
        y, back = jax.vjp(function, x, kernel)
        return jnp.sum(y * jnp.sin(y)), back(jnp.cos(y))

    run = _compiled(
        sharding.within(mesh, partial(both, ours)), in_shardings=(split, whole)
    )
    placed = jax.device_put(x, split), jax.device_put(kernel, whole)
    assert len(placed[0].sharding.device_set) == 2
    expected = _compiled(partial(both, lax))(x, kernel)
    chex.assert_trees_all_close(
        jax.device_get(run(*placed)), expected, rtol=1e-11, atol=1e-10
    )


# --- The product ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "what"),
    [((), _first), ((5,), _first), ((4, 3), _more), ((2, 3, 4), _first)],
)
def test_the_product_is_that_of_the_last_axis(rng, size, what):
    x = jnp.asarray(rng.standard_normal((2, *size, 3)))
    kernel = jnp.asarray(rng.standard_normal((3, 4)))
    _compare(what, (convolution.product, jnp.dot), x, kernel)


@pytest.mark.parametrize(
    ("batch", "channels", "features"),
    [
        (0, 3, 2),
        (2, 3, 0),
        (2, 0, 2),
    ],
)
def test_the_product_of_nothing_is_nothing(batch, channels, features):
    x, kernel = jnp.zeros((batch, 4, channels)), jnp.zeros((channels, features))
    y = convolution.product(x, kernel)
    chex.assert_trees_all_equal(y, jnp.zeros((batch, 4, features)))


def test_the_product_keeps_its_arguments_and_their_type(rng):
    x = jnp.asarray(rng.standard_normal((2, 4, 3, 5)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((5, 2)), jnp.bfloat16)
    assert convolution.product(x, kernel).dtype == jnp.bfloat16
    assert sum(leaf.size for leaf in _kept(convolution.product, x, kernel)) == 130


@pytest.mark.parametrize(("data", "space"), [(2, 1), (1, 2)])
def test_the_product_over_two_devices_is_the_same(rng, data, space):
    x = jnp.asarray(rng.standard_normal((2, 4, 3, 5)))
    kernel = jnp.asarray(rng.standard_normal((5, 2)))
    mesh = sharding.make_mesh(data, space)
    whole, split = sharding.replicated(mesh), sharding.split(mesh, 4)
    first = partial(_first, convolution.product)
    run = _compiled(sharding.within(mesh, first), in_shardings=(split, whole))
    placed = jax.device_put(x, split), jax.device_put(kernel, whole)
    expected = _compiled(partial(_first, jnp.dot))(x, kernel)
    _equal(jax.device_get(run(*placed)), expected)
