"""The README keeps its word."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

from unet_jax import models

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_research_snippet_runs_as_it_stands(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (block,) = [b for b in blocks if "make_train_step" in b]
    exec(compile(block, "README.md", "exec"), {})
    assert 0.0 < float(capsys.readouterr().out) < 5.0


def test_both_commands_set_up_everything_themselves():
    commands = [c for c in README.splitlines() if c.startswith("python3 -m venv")]
    assert len(commands) == 2
    for command in commands:
        assert ".venv/bin/pip install" in command
    assert "train.py --workdir=" in commands[0]
    assert "-m pytest" in commands[1] and "[test]" in commands[1]


def test_what_it_links_to_exists():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


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
