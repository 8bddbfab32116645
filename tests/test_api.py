"""The house: which way imports run, how light they are, what public code says."""

import ast
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import unet_jax

ROOT = Path(unet_jax.__file__).parent

# Each row may import from the rows above it and from nothing else of the package.
ROWS = [
    {"types"},
    {"log", "compiled", "distributed", "sharding", "programs"},
    {
        "convolution",
        "norms",
        "losses",
        "metrics",
        "bootstrap",
        "boundary",
        "objects",
        "warp",
        "normalisation",
        "optim",
        "budget",
        "tta",
        "postprocess",
        "integrity",
        "lock",
    },
    {"layers"},
    {"augment", "data", "resample", "bottlenecks", "partition"},
    {"blocks", "merges"},
    {"encoders", "decoders"},
    {"geometry", "checks"},
    {"models"},
    {"training", "pictures", "tiles", "meta", "resident"},
    {"torch_weights"},
    {"evaluation", "checkpoint"},
    {"transfer", "feasible", "options"},
    {"predict", "overlay", "run"},
    {"predict_files", "report", "preview", "measures", "inspection"},
    {
        "pruning",
        "features",
        "diagram",
        "convert",
        "parity",
        "books",
        "trials",
        "advice",
    },
    {"feature_sheet", "members"},
    {"cli", "__init__"},
    {"__main__"},
]
# Used where they are needed, not by whoever imports the package.
LATE = ["tensorflow_datasets", "torch", "matplotlib", "scipy", "tifffile", "nibabel"]
LATE += ["orbax", "grain", "PIL", "tensorboardX", "ml_collections", "configs"]
LATE += ["safetensors"]


def _modules():
    return sorted(p for p in ROOT.rglob("*.py"))


def _room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def _imports(path: Path, *, late: bool):
    """Names imported by a module, also inside functions if ``late``."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if late else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    rank = {room: i for i, row in enumerate(ROWS) for room in row}
    room = _room(path)
    assert room in rank, f"{room} has no row: say where it stands"
    for name in _imports(path, late=False):
        parts = name.split(".")
        if parts[0] != "unet_jax" or len(parts) == 1:
            continue
        other = parts[1]
        if other == room or other not in rank:
            continue
        assert rank[other] < rank[room], f"{room} imports {other}, which stands below"


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_are_imported_where_they_are_used(path):
    for name in _imports(path, late=False):
        if path.name == "isbi2012_tfds.py":  # a TFDS builder: TFDS is its base class
            continue
        assert name.split(".")[0] not in LATE, f"{path} imports {name} at the top"
    for name in _imports(path, late=True):
        assert name.split(".")[0] not in ("ml_collections", "configs", "tensorflow")


def test_import_is_light():
    code = (
        "import sys, unet_jax\n"
        f"print([m for m in {LATE} if m in sys.modules])\n"
        "unet_jax.Predictor\n"
        f"print([m for m in {LATE[:6]} if m in sys.modules])\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.split("\n")[:2] == ["[]", "[]"], out.stdout + out.stderr


def _public_functions():
    for info in pkgutil.walk_packages(unet_jax.__path__, "unet_jax."):
        if info.name.endswith(("__main__", "isbi2012_tfds")):
            continue
        module = __import__(info.name, fromlist=["_"])
        for name, value in vars(module).items():
            ours = getattr(value, "__module__", None) == info.name
            if inspect.isfunction(value) and ours and not name.startswith("_"):
                yield pytest.param(value, id=f"{info.name}.{name}")


@pytest.mark.parametrize("function", list(_public_functions()))
def test_public_functions_are_annotated_and_documented(function):
    assert inspect.getdoc(function)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for name, parameter in signature.parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty, name


@pytest.mark.parametrize("function", list(_public_functions()))
def test_what_is_random_takes_its_key_first(function):
    names = list(inspect.signature(function).parameters)
    assert "rng" not in names[1:]
    if "key" in names:
        assert names[0] == "key"


def test_no_room_is_called_a_junk_drawer():
    rooms = {path.stem for path in _modules()}
    assert not rooms & {"utils", "util", "common", "helpers", "misc"}
