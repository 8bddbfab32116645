"""The README keeps its word."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from unet_jax import models, torch_weights

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TORCH = (ROOT / "docs" / "torch.md").read_text()


def test_the_research_snippet_runs_as_it_stands(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    block, on_mesh = [b for b in blocks if "make_train_step" in b]
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert 0.0 < float(capsys.readouterr().out) < 5.0
    exec(compile(on_mesh, "README.md", "exec"), names)
    assert int(names["state"].step) == 2


def test_both_commands_set_up_everything_themselves():
    commands = [c for c in README.splitlines() if c.startswith("python3 -m venv")]
    assert len(commands) == 2
    for command in commands:
        assert ".venv/bin/pip install" in command
    assert "train.py --workdir=" in commands[0]
    assert "-m pytest" in commands[1] and "[test]" in commands[1]


def test_what_it_links_to_exists():
    for folder, text in ((ROOT, README), (ROOT / "docs", TORCH)):
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / link).exists(), link


def test_every_config_is_in_it_or_among_the_named_nets():
    nets = (ROOT / "docs" / "nets.md").read_text()
    for path in (ROOT / "configs").glob("*.py"):
        text = nets if path.stem in models.MODELS else README
        assert f"configs/{path.name}" in text


def test_the_parameters_among_the_named_nets_are_right():
    table = (ROOT / "docs" / "nets.md").read_text().replace(",", "")
    for name in set(models.MODELS) - {"unet"}:
        (row,) = [line for line in table.splitlines() if f"| [{name}](" in line]
        model = models.build(name, num_classes=2)
        size = (132, 132, 116) if name == "unet_3d" else (572, 572)
        image = jax.ShapeDtypeStruct((1, *size, 1), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), image)
        count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        assert f" {count} " in row, name


def test_the_families_of_pytorch_are_all_in_it_with_what_is_taken_unless_told():
    rows = [line for line in TORCH.splitlines() if line.startswith("| `")]
    for family in torch_weights.FAMILIES.values():
        options, measured = [
            row for row in rows if row.startswith(f"| `{family.name}` |")
        ]
        *_, taken, _ = options.split("|")
        told = re.findall(r"`(\w+ = [^`]+)`", taken)
        assert told == [f"{k} = {v}" for k, v in family.options.items()], family.name
        assert re.search(r"\| \d\.\de-\d \|", measured), family.name
    named = {row.split("`")[1] for row in rows}
    assert set(torch_weights.FAMILIES) <= named


def test_the_examples_with_pytorch_run_as_they_stand(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)  # of some starts all ReLUs of so small a net are dead
    model = models.build("unet", num_classes=2, features=(4, 6))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    torch_weights.save("unet.pth", model, variables, "milesial")
    blocks = re.findall(r"```python\n(.*?)```", TORCH, re.DOTALL)
    space: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/torch.md", "exec"), space)
    off, *losses = map(float, capsys.readouterr().out.split())
    assert off < 1e-6
    theirs, ours = losses[:3], losses[3:]
    assert theirs[0] > theirs[2]
    assert ours == pytest.approx(theirs, abs=2e-5)


def test_the_errors_of_tutorials_name_tests_that_exist():
    errors = TORCH.split("## Errors you will meet in tutorials")[1].split("\n## ")[0]
    names = re.findall(r"`([\w/.:]*test_[\w/.:]+)`", errors)
    here = "tests/test_tutorial_errors.py"
    places = [(name.split("::") if ".py::" in name else [here, name]) for name in names]
    tests = [place for place in places if not place[-1].endswith(".py")]
    assert len(tests) >= 9
    for file, name in tests:
        assert f"def {name}(" in (ROOT / file).read_text(), name
