"""Members side by side: what each would be alone, whichever way they are trained."""

import contextlib
import csv
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import train
from configs import default
from unet_jax import compiled, lock, members, metrics, sharding
from unet_jax.books import Books
from unet_jax.checkpoint import Checkpoints, load_for_inference
from unet_jax.data import batches
from unet_jax.data.batches import side_by_side, train_reader
from unet_jax.evaluation import Evaluation
from unet_jax.log import read_table
from unet_jax.members import conclusion, roster, team, ways
from unet_jax.run import Run
from unet_jax.training import TrainState
from unet_jax.types import InputError

TINY = {
    "data.cells.size": (32, 32),
    "data.cells.examples": 6,
    "data.normalisation": "standard",  # which differs from fold to fold
    "model.features": (4, 8),
    "train.steps": 4,
    "train.crop": (16, 16),
    "train.batch_size": 2,
    "train.eval_batch_size": 4,
    "train.log_every": 2,
    "train.eval_every": 2,
    "train.save_every": 2,
    "optim.warmup_steps": 0,
    "mesh.data": 1,
}


def _config(**changes):
    config = default.get_config()
    with config.unlocked():
        for key, value in {**TINY, **changes}.items():
            config.update_from_flattened_dict({key: value})
    return train.chosen(config)


def _saved(workdir):
    """The latest checkpoint as stored: its step, and its arrays by path."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        restore = ocp.args.StandardRestore()
        items = checkpoints._manager.restore(
            step, args=ocp.args.Composite(variables=restore, training=restore)
        )
    leaves = {}
    for name in ("variables", "training"):
        for path, x in jax.tree_util.tree_leaves_with_path(items[name]):
            if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
                x = jax.random.key_data(x)
            leaves[name + jax.tree_util.keystr(path)] = np.asarray(x)
    return step, leaves


def _apart(a, b, part):
    """How far apart two checkpoints are: relative L2 of all of a part together."""
    (step_a, a), (step_b, b) = _saved(a), _saved(b)
    assert step_a == step_b and a.keys() == b.keys()
    keys = [key for key in a if key.startswith(part)]
    assert keys
    one, other = (
        np.concatenate([x[key].ravel().astype(np.float64) for key in keys])
        for x in (a, b)
    )
    return np.linalg.norm(one - other) / np.linalg.norm(other)


# --- Who they are --------------------------------------------------------------------


def test_folds_are_the_runs_that_train_py_would_be_given():
    config = _config(**{"members.folds": 3, "data.train": "all", "seed": 5})
    found = members.configs(config)
    assert [m.name for m in found] == ["fold_1", "fold_2", "fold_3"]
    for i, member in enumerate(found, start=1):
        expected = _config(
            **{
                "data.train": f"all[not fold {i}/3]",
                "data.evaluation": f"all[fold {i}/3]",
                "seed": 5,
            }
        )
        assert member.config == expected
        assert not members.asked(member.config)
    assert members.asked(config)


def test_seeds_differ_in_nothing_else():
    found = members.configs(_config(**{"members.seeds": 2, "seed": 7}))
    assert [m.name for m in found] == ["seed_7", "seed_8"]
    assert [m.config for m in found] == [_config(seed=7), _config(seed=8)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"members.folds": 3, "members.seeds": 2}, "give one"),
        ({"members.folds": 1}, r"members\.folds = 1 "),
        ({"members.seeds": -2}, r"members\.seeds = -2 "),
        ({"members.folds": 3, "data.train": "all[:50%]"}, r"data\.train.*brackets"),
        ({"members.folds": 9}, r"fold 2/9.*empty"),
        ({"members.seeds": 2, "mesh.space": 2}, r"mesh\.space = 2: leave it out"),
        ({"members.seeds": 2, "mesh.fsdp": True}, r"mesh\.fsdp"),
        ({"members.seeds": 2, "mesh.pmap": True}, r"mesh\.pmap"),
        ({"members.seeds": 2, "train.batch_size": 0}, r"train\.batch_size = 0"),
        ({"members.seeds": 2, "model.remat": -1}, r"model\.remat = -1"),
        ({"members.seeds": 2, "train.steps_per_call": 2}, r"steps_per_call = 2"),
        ({"members.folds": 2, "train.patience": 3}, r"patience = 3.*one by one"),
        ({"members.seeds": 2, "mesh.data": 3}, r"mesh\.data = 3.*2 devices"),
    ],
)
def test_what_members_cannot_do_is_one_sentence(tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        train.train_and_evaluate(_config(**changes), tmp_path)


def test_members_of_other_classes_are_refused():
    def run(*label_names):
        dataset = SimpleNamespace(label_names=label_names, channels=1)
        return SimpleNamespace(config={"data": {"source": "folder"}}, dataset=dataset)

    with pytest.raises(InputError, match=r"fold_2 has \('a',\).*folder\.label_names"):
        team.check_alike(("fold_1", "fold_2"), [run("a", "b"), run("a")])


@pytest.mark.parametrize(
    ("vmap", "count", "there", "expected"),
    [
        (None, 5, 1, (False, 1)),
        (None, 5, 8, (True, 5)),
        (None, 6, 4, (True, 3)),
        (None, 5, 4, (False, 1)),
        (True, 5, 4, (True, 1)),
        (False, 6, 4, (False, 1)),
    ],
)
def test_members_spread_over_the_devices_that_divide_them(vmap, count, there, expected):
    devices = jax.devices()[:1] * there
    assert team.devices_for(vmap, count, devices) == expected


# --- A step --------------------------------------------------------------------------


class Numbered:
    """Images of one value each, told by their names."""

    label_names = ("background", "cell")

    def __init__(self, first):
        self.first = first

    def __len__(self):
        return 3

    def __getitem__(self, i, /):
        image = np.full((4, 4, 1), self.first + i, np.uint8)
        weight = np.ones((4, 4), np.float32)
        return {"image": image, "label": image[..., 0] * 0, "weight": weight}

    def name(self, i, /):
        return str(i)

    def size(self, i, /):
        return (4, 4)


def test_one_pipeline_reads_what_each_would_read():
    options = {"batch_size": 2, "crop": (3, 3)}
    readers = [
        train_reader(Numbered(first), seed=seed, **options)
        for seed, first in enumerate((0, 100))
    ]
    stream = side_by_side(readers, start=5)
    for step in range(5, 9):
        batch = next(stream)
        assert batch["image"].shape == (2, 2, 3, 3, 1)
        for i, reader in enumerate(readers):
            for key, value in reader(step).items():
                np.testing.assert_array_equal(batch[key][i], value)


@pytest.mark.parametrize(("way", "devices"), [("Together", 2), ("InTurn", 1)])
def test_states_of_all_members_come_back_one_by_one(way, devices):
    """Four members, two to a device; of each its own statistics, batch and key."""

    def one(shift, scale, state, batch):
        noise = jax.random.uniform(jax.random.fold_in(state.key, state.step))
        params = state.params * scale + batch["x"].sum() * state.lr_scale + shift
        new = state.replace(step=state.step + 1, params=params + noise)
        return new, {"loss": batch["x"].sum()}

    def states():
        for i in range(4):
            zero = jnp.zeros((), jnp.int32)
            ones = jnp.full(3, float(i), jnp.float32)
            lr = jnp.ones((), jnp.float32)
            yield TrainState(zero, ones, {}, (), None, lr, jax.random.key(i))

    stats = {k: np.arange(4, dtype=np.float32)[:, None] + 1 for k in ("shift", "scale")}
    mesh = sharding.make_mesh(devices)
    found = getattr(ways, way)(one, stats, mesh)
    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    alone = jax.jit(one)
    expected = [
        alone(stats["shift"][i], stats["scale"][i], state, {"x": x[i]})[0]
        for i, state in enumerate(states())
    ]
    expected = [
        alone(
            stats["shift"][i],
            stats["scale"][i],
            state.replace(lr_scale=jnp.float32(0.5 * i)),
            {"x": x[i]},
        )[0]
        for i, state in enumerate(expected)
    ]
    given, batch = found.gather(states()), found.place({"x": x})
    found.compile(given, batch)
    given, stats = found.step(given, batch)
    assert [float(s["loss"]) for s in stats] == [1.0, 5.0, 9.0, 13.0]
    given = found.rescaled(given, [0.0, 0.5, 1.0, 1.5])
    given, _ = found.step(given, batch)
    for i, state in enumerate(expected):
        taken = found.take(given, i)
        assert taken.params.sharding.is_equivalent_to(sharding.replicated(mesh), 1)
        assert int(taken.step) == 2 and float(taken.lr_scale) == 0.5 * i
        np.testing.assert_allclose(taken.params, state.params, rtol=1e-6)
        assert taken.key == state.key


# --- Whole runs ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each fold by itself: its workdir, and what its evaluations counted."""
    taken, found = Run.evaluate, []
    for member in members.configs(_config(**{"members.folds": 2})):
        counts = {}

        def evaluate(self, state, *, keep=0, counts=counts):
            evaluation = taken(self, state, keep=keep)
            counts[int(state.step)] = evaluation.confusion
            return evaluation

        workdir = tmp_path_factory.mktemp("alone") / member.name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "evaluate", evaluate)
            train.train_and_evaluate(member.config, workdir)
        found.append((workdir, counts))
    return found


class Trained(NamedTuple):
    """Both folds at once: where, by which config, what came out, by which program."""

    workdir: Path
    config: dict
    results: dict
    program: Any


def _trained(workdir, way, devices):
    taken, programs = way.compile, []

    def compile(self, states, batches):
        programs.append(taken(self, states, batches))
        return programs[-1]

    config = _config(**{"members.folds": 2, "mesh.data": devices})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(way, "compile", compile)
        results = train.train_and_evaluate(config, workdir)
    (program,) = programs
    return Trained(workdir, config, results, program)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    return _trained(tmp_path_factory.mktemp("together") / "run", ways.Together, 2)


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory):
    return _trained(tmp_path_factory.mktemp("in_turn") / "run", ways.InTurn, 1)


@pytest.fixture(params=["together", "in_turn"])
def folds(request):
    return request.getfixturevalue(request.param)


def test_members_learn_what_they_would_alone(folds, alone):
    for member, (own, _) in zip(members.configs(folds.config), alone, strict=True):
        workdir = folds.workdir / member.name
        assert _apart(workdir, own, "variables") < 2e-4
        assert _apart(workdir, own, "training['opt_state']") < 2e-4
        assert {p.name for p in workdir.iterdir()} == {p.name for p in own.iterdir()}
        stored = json.loads((workdir / "config.json").read_text())
        assert stored == json.loads(json.dumps(member.config))
        for name in ("train.csv", "evaluation.csv"):
            here, there = (read_table(path / name) for path in (workdir, own))
            assert here.keys() == there.keys()
            for key in ("step", "loss"):
                np.testing.assert_allclose(here[key], there[key], rtol=1e-4)
    shifts = {_meta(folds, i).normalisation["shift"] for i in (1, 2)}
    assert len(shifts) == 2


def _meta(folds, i):
    return load_for_inference(folds.workdir / f"fold_{i}")[2]


def test_the_step_of_all_has_nothing_to_communicate(folds):
    assert compiled.collectives(folds.program.as_text()) == {}


def test_out_of_fold_every_example_counts_once(folds, alone):
    workdir, results = folds.workdir, folds.results
    pooled = []
    for own, counts in alone:
        pooled.append(counts[load_for_inference(own)[3]])
    expected = metrics.summarise(
        np.concatenate(pooled), task="classes", label_names=("background", "cell")
    )
    assert results["dice"] == pytest.approx(expected["dice"], abs=1e-3)
    assert results["image_dice"] == pytest.approx(expected["image_dice"], abs=1e-3)
    with (workdir / "out_of_fold.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [f"cells-train-{i:04d}" for i in range(6)]
    assert [row["fold"] for row in rows] == ["fold_1"] * 3 + ["fold_2"] * 3
    mean = np.mean([float(row["dice"]) for row in rows])
    assert mean == pytest.approx(results["image_dice"], abs=1e-8)
    stored = json.loads((workdir / "out_of_fold.json").read_text())
    low, high = stored["intervals"]["dice"]
    assert low <= stored["results"]["dice"] == results["dice"] <= high
    assert json.loads((workdir / "members.json").read_text()) == {
        "kind": "folds",
        "members": ["fold_1", "fold_2"],
        "out_of_fold": stored["results"],
    }


def test_out_of_fold_leaves_out_what_nothing_counts_of(tmp_path, monkeypatch):
    """Figures and intervals are those of the other examples alone."""
    monkeypatch.setattr(conclusion, "best_of", lambda workdir: (3, None))
    restored = SimpleNamespace(restore=lambda step, shapes: None)
    monkeypatch.setattr(
        conclusion, "Checkpoints", lambda *_, **__: contextlib.nullcontext(restored)
    )
    tables, losses = np.arange(12).reshape(3, 2, 2), np.arange(3.0)
    tables[1], losses[1] = 0, np.nan  # of this one nothing counts

    def concluded(*folds):
        runs = [
            SimpleNamespace(
                evaluate=lambda state, rows=rows: Evaluation(
                    {"dice": 0.5, "image_dice": 0.5},
                    np.arange(len(rows)),
                    tables[rows],
                    losses[rows],
                    [],
                ),
                meta=SimpleNamespace(task="classes", label_names=Numbered.label_names),
                dataset=SimpleNamespace(evaluation=Numbered(0)),
                shapes=None,
            )
            for rows in folds
        ]
        group = SimpleNamespace(kind="folds", names=("fold_1", "fold_2"), runs=runs)
        lines = []
        results = members.out_of_fold(group, tmp_path, say=lines.append)
        stored = json.loads((tmp_path / "out_of_fold.json").read_text())
        assert stored["results"] == results
        return stored, stored.pop("left_out"), "\n".join(lines)

    found, left_out, said = concluded([0, 1, 2], [1, 2])
    assert (found["examples"], left_out) == (3, 2)
    assert "nothing of them counts: 2 examples" in said
    assert concluded([0, 2], [2])[:2] == (found, 0)
    found, left_out, _ = concluded([0, 1], [1])
    assert (found["examples"], left_out) == (1, 2)
    assert found["intervals"]["dice"] == [None, None]


def test_what_is_finished_is_only_counted_again(folds, capsys):
    again = train.train_and_evaluate(folds.config, folds.workdir)
    assert again == pytest.approx(folds.results, abs=1e-6)
    text = capsys.readouterr().out
    assert "the members are finished at step 4" in text
    assert "compiling the training step" not in text and "out of fold: 6" in text
    # To train.py, a member is a run as any other.
    member = members.configs(folds.config)[0]
    train.train_and_evaluate(member.config, folds.workdir / "fold_1")
    text = capsys.readouterr().out
    assert "the run is finished at step 4" in text and "changed" not in text


def test_a_workdir_of_something_else_is_refused(in_turn, alone):
    workdir = in_turn.workdir
    with pytest.raises(
        InputError, match=r"holds 2 folds: say --config.members.folds=2"
    ):
        train.train_and_evaluate(_config(), workdir)
    for other in ({"members.folds": 3}, {"members.seeds": 2}):
        with pytest.raises(InputError, match="holds folds fold_1 to fold_2"):
            train.train_and_evaluate(_config(**other), workdir)
    for path in (alone[0][0], alone[0][0].parent):
        with pytest.raises(InputError, match="fold_1 holds a run of its own"):
            train.train_and_evaluate(_config(**{"members.folds": 2}), path)


def test_stopped_and_killed_it_ends_with_the_same_bits(in_turn, tmp_path, capsys):
    config, parts, names = in_turn.config, tmp_path / "parts", ("fold_1", "fold_2")

    def compile(self, states, batches):  # it is the same program each time
        self._step = in_turn.program
        return in_turn.program

    taken, saved = Books.add, Books.save

    def add(self, step, stats, **more):
        if step == 1 and self.workdir.name == "fold_1":
            os.kill(os.getpid(), signal.SIGTERM)
        return taken(self, step, stats, **more)

    def save(self, step, state):
        if step == 4 and self.workdir.name == "fold_2":
            raise KeyboardInterrupt
        saved(self, step, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ways.InTurn, "compile", compile)
        with patch.context() as inner:
            inner.setattr(Books, "add", add)
            with pytest.raises(SystemExit) as end:
                train.train_and_evaluate(config, parts)
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert "SIGTERM: saved step 1 of all members; the same command goes on" in text
        # Killed when one member has been saved and the other has not.
        with patch.context() as inner:
            inner.setattr(Books, "save", save)
            with pytest.raises(KeyboardInterrupt):
                train.train_and_evaluate(config, parts)
        assert "going on from step 1" in capsys.readouterr().out
        steps = [roster.steps_of(parts / name) for name in names]
        assert steps == [{2, 4}, {1, 2}]
        results = train.train_and_evaluate(config, parts)
    text = capsys.readouterr().out
    assert "fold_1: step 4 is made again" in text and "going on from step 2" in text
    for name in names:
        assert f"{name}: bottleneck: " in text and f"{name}: finished at step 4" in text
    assert results == in_turn.results
    _assert_same(parts, in_turn.workdir)


def _assert_same(workdir, other):
    """Two workdirs of folds hold the same bits, and the same has been decided."""
    for name in ("fold_1", "fold_2"):
        (step, leaves), (last, expected) = (
            _saved(path / name) for path in (workdir, other)
        )
        assert step == last == 4 and leaves.keys() == expected.keys()
        for path, x in leaves.items():
            assert np.array_equal(x, expected[path]), path
        found, wanted = (
            load_for_inference(path / name, which="latest")[2]
            for path in (workdir, other)
        )
        assert (found.progress, found.results) == (wanted.progress, wanted.results)
        tables = [
            read_table(path / name / "evaluation.csv") for path in (workdir, other)
        ]
        assert tables[0]["step"].tolist() == [2, 4]
        np.testing.assert_equal(*tables)


def test_a_file_that_is_gone_costs_no_step_of_any_member(in_turn, tmp_path, capsys):
    config, workdir, names = in_turn.config, tmp_path / "run", ("fold_1", "fold_2")
    plan, evaluate = batches.plan, Run.evaluate
    gone = {"training": 3}  # of which batch, or which evaluation, a file is gone

    def planned(seed, number, **options):
        if number == gone.get("training"):
            raise InputError("a.png does not exist: put it back.")
        return plan(seed, number, **options)

    def evaluated(self, state, **options):
        second = self.config["data"]["evaluation"] == "train[fold 2/2]"
        if second and int(state.step) == gone.get("evaluation"):
            raise InputError("b.png does not exist: put it back.")
        return evaluate(self, state, **options)

    def compile(self, states, batches):  # it is the same program each time
        self._step = in_turn.program
        return in_turn.program

    def stopped(which, at, says):
        with pytest.raises(InputError, match=rf"^{which}\.png does not exist"):
            train.train_and_evaluate(config, workdir)
        assert says in capsys.readouterr().out
        assert {max(roster.steps_of(workdir / name)) for name in names} == {at}
        stored = [load_for_inference(workdir / n, which="latest")[2] for n in names]
        assert [m.progress["owed"] for m in stored] == [False, which == "b"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ways.InTurn, "compile", compile)
        patch.setattr(batches, "plan", planned)
        patch.setattr(Run, "evaluate", evaluated)
        # Batches are placed two ahead of the steps.
        stopped("a", 1, "saved step 1 of all members; the same command goes on")
        for step in (2, 4):
            gone = {"evaluation": step}
            stopped("b", step, f"saved step {step} of all members, of which the eval")
        stopped("b", 4, "going on from step 4")
        gone = {}
        assert train.train_and_evaluate(config, workdir) == in_turn.results
        assert "the members are finished at step 4" in capsys.readouterr().out
    _assert_same(workdir, in_turn.workdir)


def test_what_went_on_meanwhile_is_not_made_again(in_turn):
    early = SimpleNamespace(names=("fold_1", "fold_2"), start=2)
    with pytest.raises(InputError, match="has been trained on meanwhile"):
        members.train(early, in_turn.workdir, say=print, interrupted=[])


def test_one_run_at_a_time_in_a_member(tmp_path, monkeypatch):
    config = _config(**{"members.folds": 2})
    first = members.configs(config)[0].config
    tried = []

    def training(team, workdir, **_):
        for folder, own in ((workdir, config), (workdir / "fold_1", first)):
            with pytest.raises(InputError, match=f"{folder} is in use by process"):
                train.train_and_evaluate(own, folder)
            tried.append(folder.name)
        raise InputError("that was it")

    monkeypatch.setattr(members, "train", training)
    with pytest.raises(InputError, match="that was it"):
        train.train_and_evaluate(config, tmp_path / "run")
    assert tried == ["run", "fold_1"]
    with (
        lock.hold(tmp_path / "run" / "fold_2"),
        pytest.raises(InputError, match=r"fold_2 is in use by process"),
    ):
        train.train_and_evaluate(config, tmp_path / "run")


def test_seeds_are_an_ensemble(tmp_path, capsys):
    config = _config(**{"members.seeds": 2, "train.steps": 1})
    results = train.train_and_evaluate(config, tmp_path)
    assert f"--workdir={tmp_path} averages its 2 nets" in capsys.readouterr().out
    assert _apart(tmp_path / "seed_0", tmp_path / "seed_1", "variables") > 0.1
    own = [load_for_inference(tmp_path / name)[2] for name in ("seed_0", "seed_1")]
    assert [meta.config["seed"] for meta in own] == [0, 1]
    assert results["dice"] == pytest.approx(np.mean([m.results["dice"] for m in own]))
    written = {"kind": "seeds", "members": ["seed_0", "seed_1"], "out_of_fold": {}}
    file = tmp_path / "members.json"
    assert json.loads(file.read_text()) == written
    # What is damaged is written again, by the same command.
    file.write_text('{"kind": "see')
    assert train.train_and_evaluate(config, tmp_path) == results
    assert json.loads(file.read_text()) == written


DAMAGED = {
    "empty": "",
    "list": "[]",
    "nothing": "{}",
    "deep": "[" * 9999,
    "bytes": "\xff",
    "nobody": '{"kind": "folds", "members": []}',
    "number": '{"kind": "folds", "members": [1]}',
    "kind": '{"kind": "f", "members": ["fold_1"]}',
    "elsewhere": '{"kind": "folds", "members": ["../elsewhere"]}',
    "deleted": None,
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_damaged_members_are_those_of_the_folders(tmp_path, text):
    for name in ("fold_1", "fold_2"):
        folder = tmp_path / name / "checkpoints" / "3"
        folder.mkdir(parents=True)
        (folder / "_CHECKPOINT_METADATA").write_text("")
    if text is not None:  # else it has been deleted
        (tmp_path / "members.json").write_text(text, encoding="latin-1")
    assert roster.stored_members(tmp_path) is None
    members.check_workdir(tmp_path, ("folds", ("fold_1", "fold_2")))
    three = ("folds", ("fold_1", "fold_2", "fold_3"))
    with pytest.raises(InputError) as refused:
        members.check_workdir(tmp_path, three)
    if text is None:
        assert "fold_1 holds a run of its own" in str(refused.value)
        members.check_workdir(tmp_path, None)
        return
    assert "damaged, and the folders beside it are fold_1, fold_2," in str(
        refused.value
    )
    with pytest.raises(InputError, match=r"members\.json is damaged"):
        members.check_workdir(tmp_path, None)
    (tmp_path / "checkpoints").symlink_to(tmp_path / "fold_1" / "checkpoints")
    with pytest.raises(InputError, match="holds a run of its own"):
        members.check_workdir(tmp_path, ("folds", ("fold_1", "fold_2")))


def test_members_read_with_as_many_threads_as_asked(monkeypatch):
    def reader(one):
        return lambda step: {"image": np.zeros(2**28, np.uint8)}  # 2 x 256 MB

    def side_by_side(readers, *, start, threads):
        assert (len(readers), start) == (2, 7)
        asked.append(threads)
        return iter(())

    asked = []
    monkeypatch.setattr(team, "_reader", reader)
    monkeypatch.setattr(team, "side_by_side", side_by_side)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for threads in (5, 0):
        runs = [SimpleNamespace(config={"train": {"threads": threads}})] * 2
        assert list(team.Team.batches(SimpleNamespace(runs=runs), 7)) == []
    assert asked == [5, 2]  # unasked as many as hold a GB


def test_members_that_went_apart_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(roster, "good_steps", roster.steps_of)
    for name, steps in (("fold_1", (1, 2, 3)), ("fold_2", (1,)), ("fold_3", (4,))):
        for step in steps:
            folder = tmp_path / name / "checkpoints" / str(step)
            folder.mkdir(parents=True)
            (folder / "_CHECKPOINT_METADATA").write_text("")
    for names in (("fold_1", "fold_2"), ("fold_2", "fold_3")):
        with pytest.raises(InputError, match=rf"apart \({names[0]} at .*{names[1]} at"):
            roster.common(tmp_path, names)
    assert roster.common(tmp_path, ("fold_2", "fold_4")) == 0
