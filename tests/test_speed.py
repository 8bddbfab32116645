"""Speed beside PyTorch: the peers compute the same, and what becomes of figures."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from unet_jax import options
from unet_jax.types import InputError

torch = pytest.importorskip("torch")
from benchmarks.speed import (  # noqa: E402  (needs PyTorch)
    __main__ as command,
)
from benchmarks.speed import (  # noqa: E402
    beside,
    cases,
    growth,
    machine,
    ours,
    ours_training,
    rounds,
    tables,
    theirs,
    theirs_training,
)
from benchmarks.speed.end_to_end import Setup  # noqa: E402

KINDS = ("unet16_256", "unet2015_572", "unetpp32_256", "attention32_256", "unet3d16_64")


@pytest.fixture(scope="module", autouse=True)
def unoptimised():
    """Compiling is nearly all of it."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# --- Both sides compute the same -----------------------------------------------------


def _state(case):
    """A state with parameters and running statistics of some size; compiles nothing."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(ours.init_of(case))

    def drawn(path, x):
        noise, name = rng.normal(size=x.shape).astype(np.float32), path[-1].key
        if name == "kernel":
            return noise * np.float32((2 / np.prod(x.shape[:-1])) ** 0.5)
        shift = {"scale": 1.0, "var": 1.5}.get(name, 0.0)
        return np.float32(shift) + np.float32(0.2) * noise

    state = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype),
        dataclasses.replace(shapes, key=None, batch_stats=None, params=None),
    )
    return dataclasses.replace(
        state,
        params=jax.tree_util.tree_map_with_path(drawn, shapes.params),
        batch_stats=jax.tree_util.tree_map_with_path(drawn, shapes.batch_stats),
        lr_scale=np.ones((), np.float32),
        key=jax.random.key(0),
    )


def _theirs(what, case, state, setting="eager"):
    net = beside.peer(case, ours.model_of(case), state.variables)
    layout = theirs.SETTINGS[setting]
    return theirs.program(what, net, cases.arrays(case), case, layout, "cpu")


@pytest.mark.parametrize("name", KINDS)
def test_a_peer_has_our_logits(name):
    case = cases.tiny(cases.CASES[name])._replace(batch=2)
    state = _state(case)
    one = ours.forward(case, state.variables)
    mine = one.value(one.run())
    assert np.ptp(mine) > 0.1
    for setting in ("eager", "channels_last"):
        other = _theirs("forward", case, state, setting)
        found = other.value(other.run())
        assert found.shape == mine.shape
        np.testing.assert_allclose(found, mine, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [KINDS[0], *(pytest.param(n, marks=pytest.mark.slow) for n in KINDS[1:])],
)
def test_a_peer_has_our_losses(name):
    """The first to 1e-5; and those after it, as the optimizers are the same, too."""
    case = cases.tiny(cases.CASES[name])._replace(batch=2)
    if name == KINDS[0]:
        case = case._replace(features=(2, 4))  # compiled sooner
    state = _state(case)
    other = _theirs("train", case, state, "channels_last")
    mine = ours.train(case, jax.device_put(state))
    first, *later = np.array(
        [[float(one.value(one.run())) for one in (mine, other)] for _ in range(4)]
    )
    assert abs(first[0] - first[1]) < 1e-5
    for losses in later:
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
    assert later[-1][0] < first[0]


def test_tiles_of_both_sides_give_one_label(rng, monkeypatch):
    case = cases.tiny(cases.CASES["unet16_256"])._replace(batch=3)
    image = rng.integers(0, 256, (70, 50, 3), dtype=np.uint8)
    state = _state(case)
    predictor = ours.predictor(case, state.variables, tile=32, batch=3)
    found = predictor(image).probability
    assert found is not None
    # Half of the pixels are to be of each class.
    bias = state.params["head"]["bias"]
    bias[1] -= np.median(np.log(found[..., 1] / found[..., 0]))
    monkeypatch.setattr(ours, "state_of", lambda case: state)
    programs = beside.predictions(case, ["eager"], image, tile=32)
    mine, other = (programs[n].value(programs[n].run()) for n in ("ours", "eager"))
    assert mine.shape == other.shape == (70, 50)
    assert 0.4 < mine.mean() < 0.6
    assert np.mean(mine != other) < 1e-3  # but for ties


def test_a_measured_row_has_what_the_table_reads(monkeypatch):
    monkeypatch.setattr(ours, "state_of", _state)
    case = cases.tiny(cases.CASES["unet16_256"])
    row = beside.measure("forward", case, peers_of=["eager"], rounds=2, limit=9)
    assert {name: len(some) for name, some in row["seconds"].items()} == {
        "eager": 2,
        "ours": 2,
    }
    assert row["difference"] < 1e-4 and 0 <= row["others"] <= 1
    text = tables.table("forward", {"unet16_256, batch 1, float32": row})
    assert "| tiny U-Net 16, 32 x 32 | 1 | " in text and "jax 0" in text


# --- Training from end to end --------------------------------------------------------


@pytest.mark.parametrize("resident", [False, True])
def test_our_training_has_a_config_that_is_one(resident):
    config = ours_training.config_of(Setup(), resident=resident, steps_per_call=8)
    options.check(config, whole=False)


def test_without_turns_and_bends_a_crop_is_read_where_it_is(monkeypatch, rng):
    plain = theirs_training.SETTINGS._replace(rotate=0.0, elastic=0.0)
    monkeypatch.setattr(theirs_training, "SETTINGS", plain)
    at = theirs_training.places(rng, (20, 30), (8, 8))
    y, x = at[:, 0, 0]
    assert 0 <= y <= 12 and 0 <= x <= 22
    np.testing.assert_allclose(at[0], np.arange(y, y + 8)[:, None] + np.zeros(8))
    np.testing.assert_allclose(at[1], np.arange(x, x + 8) + np.zeros((8, 1)))


def test_a_turn_keeps_distances_and_the_middle(monkeypatch, rng):
    monkeypatch.setattr(
        theirs_training, "SETTINGS", theirs_training.SETTINGS._replace(elastic=0.0)
    )
    at = theirs_training.places(rng, (9, 9), (9, 9))
    np.testing.assert_allclose(at[:, 4, 4], [4, 4])
    for axis in (1, 2):
        steps = np.linalg.norm(np.diff(at, axis=axis), axis=0)
        np.testing.assert_allclose(steps, 1)


def test_an_augmented_example_is_a_crop(tmp_path, rng):
    image = rng.integers(0, 256, (3, 20, 20, 1), dtype=np.uint8)
    label = (image[..., 0] > 99).astype(np.uint8)
    np.savez(tmp_path / "some.npz", image=image, label=label)
    dataset = theirs_training.Augmented(tmp_path / "some.npz", (16, 16))
    torch.manual_seed(0)
    x, y = dataset[1]
    assert len(dataset) == 3
    assert x.shape == (1, 16, 16) and x.dtype == np.float32
    assert y.shape == (16, 16) and y.dtype == np.int64 and set(np.unique(y)) == {0, 1}


# --- Rounds --------------------------------------------------------------------------


def test_candidates_take_turns_in_changing_order():
    asked = []

    def one(name):
        asked.append(name)
        return float(len(asked))

    found = rounds.alternated(one, ["a", "b", "c"], rounds=20)
    turns = [tuple(asked[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) > 3
    assert [len(some) for some in found.values()] == [20, 20, 20]
    assert sum(sum(some) for some in found.values()) == 60 * 61 / 2


def test_a_limit_leaves_the_least_rounds():
    found = rounds.alternated(lambda name: 1.0, ["a"], rounds=9, limit=0.0)
    assert len(found["a"]) == rounds.LEAST


def test_a_ratio_is_that_of_medians_and_its_spread_that_of_rounds():
    found = rounds.ratio([1.0, 2.0, 9.0], [2.0, 4.0, 3.0])
    assert found.middle == pytest.approx(2 / 3)
    assert (found.low, found.high) == pytest.approx((0.5, 1.75))


# --- Tables --------------------------------------------------------------------------

CPU = {"hardware": "2 CPU cores", "versions": "jax 1", "others": 0.01}
GPU = CPU | {"hardware": "one NVIDIA H200 beside 2 CPU cores"}


def _row(mine, other, **more):
    seconds = {"ours": [mine] * 3, "eager": [other] * 3}
    row = {"case": "net", "batch": 1, "dtype": "float32", "seconds": seconds}
    return {**row, **CPU, **more}


def _rows():
    """A small record of every table."""
    parts = {"trace": [0.5], "xla": [1.5], "ours": [2.0], "compiled": [8.0]}
    at = {"axis": "images of a batch", "at": 4}
    rates = {"ours": [20.0] * 3, "ours, fast": [40.0] * 3, "eager": [10.0] * 3}
    return {
        "forward": _row(0.1, 0.2),
        "train": _row(0.3, 0.2, difference=1e-6),
        "predict": _row(1.0, 2.0),
        "end_to_end": {**_row(1, 1), "rates": rates},
        "memory": {**_row(1, 1), "bytes": {"ours": [1e8], "eager": [2e8]}},
        "compile": {**_row(1, 1), "seconds": parts, "what": "train"},
        "growth": {**_row(0.004, 0.008), **at},
    }


def test_a_run_of_one_row_replaces_that_row(tmp_path):
    path = tmp_path / "results-cpu.json"
    tables.keep(path, "train", {"a": _row(1, 2), "b": _row(3, 4)})
    tables.keep(path, "forward", {"a": _row(5, 6)})
    tables.keep(path, "train", {"b": _row(7, 8), "c": _row(9, 1)})
    found = tables.read(path)
    assert list(found) == ["forward", "train"]
    assert found["train"] == {"a": _row(1, 2), "b": _row(7, 8), "c": _row(9, 1)}
    assert found == json.loads(path.read_text())
    assert len(path.read_text().splitlines()) == 2 + 2 * 2 + 4  # a line a row


def test_rows_stand_in_their_order_whenever_they_were_measured():
    rows = {f"{name}, batch 1, float32": _row(1, 2) for name in reversed(KINDS)}
    rows = {key: row | {"case": key} for key, row in rows.items()}
    text = tables.table("train", rows)
    assert text.index(KINDS[0]) < text.index(KINDS[1]) < text.index(KINDS[2])
    points = {f"batch/{at}": _row(1, 2) | {"at": at, "axis": "b"} for at in (16, 2)}
    text = tables.table("growth", points)
    assert text.index("| b | 2 |") < text.index("| b | 16 |")


def test_a_file_of_another_kind_is_named(tmp_path):
    path = tmp_path / "results-cpu.json"
    for text in ("[]", "{", '{"train": 3}'):
        path.write_text(text)
        with pytest.raises(InputError, match=r"results-cpu\.json does not hold"):
            tables.read(path)


def test_tables_say_ratios():
    said = {name: tables.table(name, {"key": row}) for name, row in _rows().items()}
    assert "| net | 1 | 100 | 200 | 0.50 (0.50-0.50) |" in said["forward"]
    assert "losses of the first step: 1e-06 at most" in said["train"].replace("\n", " ")
    # Of rates, the smaller is the slower; ours is the best of ours.
    assert "| net | 20.0 | 40.0 | 10.0 | 0.25 (0.25-0.25) |" in said["end_to_end"]
    assert "| net | 1 | 100 | 200 | 0.50 | 0.50 |" in said["memory"]
    assert "| 0.500 | 1.50 | 2.00 | 8.00 | 0.25 (0.25-0.25) |" in said["compile"]
    assert "| images of a batch | 4 | 4.00 | 8.00 | 0.50 (0.50-0.50)" in said["growth"]


def test_an_h200_is_compared_with_its_roofline():
    half = 4 / (0.5 * cases.ROOFLINE["train", "unet64_512"])
    fields = {"batch": 4, "dtype": "bfloat16", **GPU}
    key = "unet64_512, batch 4, bfloat16"
    text = tables.table("train", {key: _row(half, 1.0, **fields)})
    assert "| of the roofline |" in text and "| 229 | 50% |" in text
    assert "roofline" not in tables.table("train", {key: _row(1.0, 1.0)})


def test_the_page_is_written_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(tables.PAGE.read_text())
    for name, row in _rows().items():
        tables.keep(tmp_path / "results-nvidia-h200.json", name, {"key": row | GPU})
        tables.keep(tmp_path / "results-cpu.json", name, {"key": row})
    tables.write(page, tmp_path)
    text = page.read_text()
    tables.write(page, tmp_path)
    assert page.read_text() == text  # again, the same
    for name in tables.TABLES:
        part = text.split(f"<!-- table of {name} -->")[1]
        part = part.split(f"<!-- end of {name} -->")[0]
        assert part.index("2 CPU cores; jax") < part.index("one NVIDIA H200")
        assert part.count("|---|") == 2
    page.write_text("# Empty\n")
    with pytest.raises(InputError, match="lacks the marks of the table of forward"):
        tables.write(page, tmp_path)


def test_the_page_has_the_tables_of_the_figures_that_are_there(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(tables.PAGE.read_text())
    tables.write(page)
    assert page.read_text() == tables.PAGE.read_text()


def test_growth_is_drawn(tmp_path):
    from PIL import Image

    rows = {}
    for axis, words in growth.AXES.items():
        for at in (1, 4):
            rows[f"{axis}/{at}"] = _row(at, 2 * at) | {"axis": words, "at": at}
    tables.keep(tmp_path / "results-cpu.json", "growth", rows)
    growth.draw(tmp_path / "some.png", tmp_path)
    with Image.open(tmp_path / "some.png") as picture:
        assert picture.width > 800 and picture.height > 600
    growth.draw(tmp_path / "none.png", tmp_path / "nowhere")
    assert not (tmp_path / "none.png").exists()


# --- The command ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--cases=unet17"], "--cases: 'unet17' is not known"),
        (["predict", "--cases=unet3d16_64"], "2-D nets with same padding"),
        (["growth", "--cases=depth"], "--cases: 'depth' is not known"),
        (["train", "--batch=1,x"], "--batch=1,x must be whole numbers"),
        (["train", "--batch=0"], "--batch=0 must be whole numbers"),
        (["train", "--dtype=float16"], "--dtype: 'float16' is not known"),
        (["train", "--peers=fast"], "--peers: 'fast' is not known"),
        (["train", "--rounds=-1"], "--rounds, --seconds"),
        (["train", "--small", "--write"], "--small is to try a command"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(machine, "busy", lambda: "")
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_without_pytorch_it_is_said_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert command.main(["forward"]) == 2
    assert "pip install torch" in capsys.readouterr().err


def test_without_a_compiler_it_is_said_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert command.main(["train", "--compile"]) == 2
    assert "torch.compile needs a C++ compiler" in capsys.readouterr().err


def test_the_usual_cases_are_cases_and_batches_rows_of_their_own():
    for usual in (cases.ON_CPU, cases.ON_GPU):
        for what, names in usual.items():
            on_cpu = usual is cases.ON_CPU
            found = cases.select(what, "", [1, 4], dtype="float32", on_cpu=on_cpu)
            assert len(found) == 2 * len(set(names)) == 2 * len(names)
    assert {name for _, name in cases.ROOFLINE} <= set(cases.CASES)
    found = cases.select("predict", "all", [2], dtype="float32", on_cpu=True)
    assert "unet2015_572, batch 2, float32" not in found and len(found) > 5
