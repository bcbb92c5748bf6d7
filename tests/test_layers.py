"""Arrows point down only: who may import whom, in one table."""

import ast
from pathlib import Path

import pytest

import e4t_jax

ROOT = Path(e4t_jax.__file__).parent
# From the bottom up; a module may import its own layer and those below it.
LAYERS = [
    ("errors", "registry", "arrays"),
    ("storage", "checks", "machine", "files.quantisation", "files.places", "tuning"),
    ("process", "samplers", "encoder", "offsets", "words", "templates", "tuning.scopes", "bases"),
    ("objective", "sample", "image_inputs", "captioning"),
    ("training", "data"),
    ("tuning.tune", "tuning.recipe", "tuning.public_recipe", "tuning.personalise"),
    ("concept", "domain"),
    ("files", "tuning.tuner"),
    ("pretraining",),
    ("interop", "evaluation"),
    ("creatures", "testing"),
    ("cli",),
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def dotted(path: Path) -> str:
    return ".".join(["e4t_jax", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


def height(module: str) -> int | None:
    """The layer of "e4t_jax.room.module": that of the module where it is listed, else of its room."""
    _, *parts = module.split(".")
    return HEIGHT.get(".".join(parts[:2]), HEIGHT.get(parts[0]))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = height(dotted(path))
    assert own is not None, f"{path} has no layer"
    for node in ast.walk(ast.parse(path.read_text())):
        imported = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("e4t_jax"):
            imported = [f"{node.module}.{alias.name}" if node.module == "e4t_jax" else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names if alias.name.startswith("e4t_jax.")]
        for name in imported:
            imports = height(name)
            assert imports is None or imports <= own, f"{path.name} imports {name}"


def test_every_layer_lists_what_is_there():
    there = {dotted(path).removeprefix("e4t_jax.") for path in MODULES}
    there |= {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in MODULES}
    assert set(HEIGHT) <= there


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short_and_calls_say_what_they_give(path):
    """No function over 60 lines but drawings of the creatures' world, no call with more than 5 positional arguments."""
    drawn = ROOT / "creatures" in path.parents
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not drawn:
            assert node.end_lineno - node.lineno < 60, f"{node.name} is long"
        # Axes of an array, and operands of a kernel, have no names.
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            unnamed = name in ("reshape", "transpose") or any(isinstance(one, ast.Starred) for one in node.args)
            assert unnamed or len(node.args) <= 5, f"line {node.lineno} calls {name} with {len(node.args)} positional arguments"


def test_few_modules_lie_at_the_top():
    assert len(list(ROOT.glob("*.py"))) <= 20


def test_the_doors_hold_no_code_of_their_own():
    for folder in ("train", "infer"):
        for path in (ROOT.parent / folder).glob("*.py"):
            assert len(path.read_text().splitlines()) < 10, path


def test_few_files_know_what_of_clip_the_encoder_sees():
    """The image encoder carries it: outside of bases/ the setting, its flag and two records name it."""
    named = [path for path in MODULES if ROOT / "bases" not in path.parents and "clip_features" in path.read_text()]
    assert len(named) <= 4, named
