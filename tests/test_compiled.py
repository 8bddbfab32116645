"""What a compiled step costs, against what can be counted by hand."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from unet_jax import compiled, sharding
from unet_jax.compiled import Collective, Costs


def shape(*size, on=None):
    return jax.ShapeDtypeStruct(size, jnp.float32, sharding=on)


def costs_of(fn, *args, **options):
    return compiled.costs(jax.jit(fn, **options).lower(*args).compile())


def layouts():
    """Whole on each of two devices; split along the first axis; along the second."""
    mesh = sharding.make_mesh(2)
    second = NamedSharding(mesh, PartitionSpec(None, "data"))
    return sharding.replicated(mesh), sharding.split(mesh), second


# --- One device ----------------------------------------------------------------------


def test_memory_of_a_donated_sum():
    def add(x, y):
        return x + y

    size = 4 * 64 * 32
    found = costs_of(add, shape(64, 32), shape(64, 32), donate_argnums=0)
    assert (found.arguments, found.outputs, found.aliased) == (2 * size, size, size)
    assert found.temporary == 0 and found.peak == 2 * size
    assert found.collectives == {}
    kept = costs_of(add, shape(64, 32), shape(64, 32))
    assert kept.aliased == 0 and kept.peak == 3 * size


def test_operations_of_a_product_and_of_a_loop():
    product = 2 * 64 * 32 * 128
    assert costs_of(jnp.dot, shape(64, 128), shape(128, 32)).flops == product

    def loop(x, y):
        body = lambda c, _: (jnp.dot(c, y, precision="highest"), None)  # noqa: E731
        return jax.lax.scan(body, x, None, length=7)[0]

    # Once and not seven times, as the module says; the counter's sum comes on top.
    found = costs_of(loop, shape(64, 64), shape(64, 64)).flops
    assert found == pytest.approx(2 * 64**3, rel=1e-3)


# --- Two devices ---------------------------------------------------------------------


def test_a_device_counts_its_own_part():
    whole, rows, _ = layouts()
    found = costs_of(jnp.dot, shape(64, 128, on=rows), shape(128, 32, on=whole))
    assert found.flops == 2 * 32 * 128 * 32
    assert found.arguments == 4 * (32 * 128 + 128 * 32)
    assert found.outputs == 4 * 32 * 32
    assert found.collectives == {}


def test_a_sum_over_devices_is_one_reduction_however_many_arrays_it_has():
    whole, rows, _ = layouts()

    def sums(x):
        return jnp.sum(x, axis=0), jnp.sum(x * x)

    found = costs_of(sums, shape(64, 128, on=rows), out_shardings=whole)
    assert found.collectives == {"all-reduce": Collective(1, 4 * 129, "f32[128]")}


def test_a_convolution_sends_the_row_next_door():
    whole, _, height = layouts()

    def conv(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=layout
        )

    image, kernel = shape(2, 16, 12, 3, on=height), shape(3, 3, 3, 5, on=whole)
    found = costs_of(conv, image, kernel, out_shardings=height)
    halo = 4 * 2 * 1 * 12 * 3
    expected = Collective(2, 2 * halo, "f32[2,1,12,3]")
    assert found.collectives == {"collective-permute": expected}


def test_a_result_that_is_to_be_whole_is_gathered():
    whole, rows, _ = layouts()
    found = costs_of(lambda x: -x, shape(8, 6, on=rows), out_shardings=whole)
    assert found.collectives == {"all-gather": Collective(1, 4 * 8 * 6, "f32[8,6]")}
    assert found.arguments == 4 * 4 * 6 and found.outputs == 4 * 8 * 6


def test_turning_the_split_sends_to_all():
    _, rows, columns = layouts()
    found = costs_of(lambda x: -x, shape(8, 6, on=rows), out_shardings=columns)
    assert found.collectives is not None
    # Each device gives half of its 4 x 6 away and keeps the other.
    assert list(found.collectives) == ["all-to-all"]
    assert found.collectives["all-to-all"].bytes == 4 * 4 * 6


# --- The text of programs of other backends ------------------------------------------

# As XLA prints them for GPUs and TPUs: in two halves, with tiled layouts, with the
# index of every fifth element of a long tuple, and with operands named like operations.
PROGRAM = """
%body (p: (f32[4], u32[])) -> (f32[4], u32[]) {
  %p = (f32[4]{0}, u32[]) parameter(0)
  %get = f32[4]{0} get-tuple-element(%p), index=0
  %all-to-all = f32[4]{0} all-to-all(%get), dimensions={0}
  ROOT %t = (f32[4]{0}, u32[]) tuple(%all-to-all, %get)
}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %all-reduce.7 = (f32[3,3,8,8]{3,2,1,0:T(8,128)}, bf16[64]{0:T(256)(2,1)}, f32[8]{0}, \
s8[5]{0}, f32[]{:T(128)}, /*index=5*/pred[7]{0}) all-reduce(%a, %b, %c, %d, %e, %f), \
channel_id=1, to_apply=%add, metadata={op_name="jit(f)/all-gather(x)"}
  %all-reduce-start.1 = f32[100]{0} all-reduce-start(%g), to_apply=%add
  %all-reduce-done.1 = f32[100]{0} all-reduce-done(%all-reduce-start.1)
  %all-reduce-start.2 = (f32[<=2]{0}, f32[3]{0}) all-reduce-start(%g, %h), to_apply=%add
  %all-reduce-done.2 = (f32[2]{0}, f32[3]{0}) all-reduce-done(%all-reduce-start.2)
  %ags = (f32[4,16]{1,0}, f32[8,16]{1,0}) all-gather-start(%x), dimensions={0}
  %agd = f32[8,16]{1,0} all-gather-done(%ags)
  %ags.2 = ((f32[2]{0}, f32[3]{0}), (f32[4]{0}, f32[6]{0})) all-gather-start(%i, %j)
  %agd.2 = (f32[4]{0}, f32[6]{0}) all-gather-done(%ags.2)
  %cps = (f32[8,1,32,8]{3,2,1,0:T(8,128)S(1)}, f32[8,1,32,8]{3,2,1,0:T(8,128)S(1)}, \
u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%all-gather), \
source_target_pairs={{0,1},{1,0}}
  %cpd = f32[8,1,32,8]{3,2,1,0} collective-permute-done(%cps)
  %rss = ((f32[16]{0}), f32[8]{0}, s32[]) reduce-scatter-start(%k), to_apply=%add
  %rsd = f32[8]{0} reduce-scatter-done(%rss)
  %loop = (f32[4]{0}, u32[]) while(%all-to-all), condition=%c, body=%body
  ROOT %fusion = f32[8,16]{1,0} fusion(%agd, %all-reduce(x)), calls=%all-reduce.body
}
"""


def test_the_text_of_a_program():
    found = compiled.collectives(PROGRAM)
    tuple_bytes = 4 * 3 * 3 * 8 * 8 + 2 * 64 + 4 * 8 + 5 + 4 + 7
    assert found == {
        "all-gather": Collective(2, 4 * 8 * 16 + 4 * (4 + 6), "f32[8,16]"),
        "all-reduce": Collective(
            3, tuple_bytes + 4 * 100 + 4 * (2 + 3), "f32[3,3,8,8]"
        ),
        "reduce-scatter": Collective(1, 4 * 8, "f32[8]"),
        "collective-permute": Collective(1, 4 * 8 * 32 * 8, "f32[8,1,32,8]"),
        "all-to-all": Collective(1, 4 * 4, "f32[4]"),
    }


@pytest.mark.parametrize(
    ("array", "size"),
    [
        ("f32[]", 4),
        ("c64[3]", 24),
        ("pred[3]", 3),
        ("s4[3]", 2),
        ("f8e4m3fn[3,5]", 15),
        ("bf16[<=6]", 12),
        ("f64[0,9]", 0),
    ],
)
def test_the_bytes_of_an_array(array, size):
    line = f"  %x = {array}{{0}} all-reduce(%y), to_apply=%add\n"
    found = compiled.collectives(line)["all-reduce"]
    assert found == Collective(1, size, array.replace("<=", ""))


def test_a_program_that_says_nothing():
    assert compiled.collectives("") == {}


# --- For people ----------------------------------------------------------------------


def test_the_lines():
    mb, gb = 2**20, 2**30
    found = {
        "collective-permute": Collective(58, 3 * mb, "f32[8,1,32,8]"),
        "all-reduce": Collective(37, 130 * mb, "f32[3,3,64,64]"),
    }
    costs = Costs(3 * mb, 2 * mb, mb, 5 * gb, 0, 1.14e12, found)
    assert costs.peak == 4 * mb + 5 * gb
    assert compiled.text(costs, devices=8).splitlines() == [
        "memory of the compiled step, a device: 5.0 GB = arguments 3.0 MB"
        " + outputs 2.0 MB (1.0 MB in the arguments' place) + temporaries 5.0 GB",
        "operations of the compiled step, a device: 1.14 TFLOP, on all 8 9.12 TFLOP"
        " (a loop's body counted once)",
        "collective-permute: 58, 3.0 MB in all, largest f32[8,1,32,8]",
        "all-reduce: 37, 130.0 MB in all, largest f32[3,3,64,64]",
    ]
    alone = Costs(1023, 1024, 0, 0, 0, 2e6, {})
    assert compiled.text(alone, devices=1).splitlines() == [
        "memory of the compiled step, a device: 2.0 KB = arguments 1023 bytes"
        " + outputs 1.0 KB + temporaries 0 bytes",
        "operations of the compiled step, a device: 2.00 MFLOP"
        " (a loop's body counted once)",
        "no communication between devices",
    ]


def refuse():
    raise NotImplementedError


@pytest.mark.parametrize("answer", [refuse, lambda: None])
def test_a_backend_that_does_not_tell(answer):
    silent = SimpleNamespace(
        memory_analysis=answer, cost_analysis=answer, as_text=answer
    )
    costs = compiled.costs(silent)
    assert costs == Costs(None, None, None, None, None, None, None)
    assert costs.peak is None
    lines = compiled.text(costs, devices=2).splitlines()
    assert len(lines) == 3
    assert all(line.endswith("this backend does not tell") for line in lines)


@pytest.mark.parametrize("flops", [{}, {"flops": float("nan")}, {"flops": -1.0}])
def test_a_backend_that_tells_some(flops):
    memory = SimpleNamespace(argument_size_in_bytes=3, output_size_in_bytes=4)
    costs = compiled.costs(
        SimpleNamespace(
            memory_analysis=lambda: memory,
            cost_analysis=lambda: flops,
            as_text=lambda: "",
        )
    )
    assert costs == Costs(3, 4, None, None, None, None, {})
    assert costs.peak is None
    memory_line, flops_line, last = compiled.text(costs, devices=1).splitlines()
    assert "does not tell" in memory_line and "does not tell" in flops_line
    assert last == "no communication between devices"
