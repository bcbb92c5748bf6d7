"""Arrows point down only: who may import whom, in one table."""

import ast
from pathlib import Path

import pytest

import e4t_jax

ROOT = Path(e4t_jax.__file__).parent
# From the bottom up; a module may import its own layer and those below it.
LAYERS = [
    ("errors", "registry", "arrays"),
    ("storage", "ranges", "chunks", "outcomes", "quantise"),
    ("diffusion", "samplers", "encoder", "offsets", "prompts", "scopes", "bases"),
    ("objective", "sample", "encode", "captioning"),
    ("training", "data"),
    ("concept", "domain", "domain_files", "looks", "pretraining", "caching", "serving", "aot"),
    ("interop", "evaluation"),
    ("creatures", "testing"),
    ("cli",),
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = HEIGHT[path.relative_to(ROOT).parts[0].removesuffix(".py")]
    for node in ast.walk(ast.parse(path.read_text())):
        imported = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("e4t_jax"):
            imported = [f"{node.module}.{alias.name}" if node.module == "e4t_jax" else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names if alias.name.startswith("e4t_jax.")]
        for name in imported:
            if name.split(".")[1] in HEIGHT:
                assert HEIGHT[room(name)] <= own, f"{path.name} imports {name}"


def test_every_room_has_a_layer():
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in MODULES}
    assert rooms == set(HEIGHT)


def test_the_doors_hold_no_code_of_their_own():
    for folder in ("train", "infer"):
        for path in (ROOT.parent / folder).glob("*.py"):
            assert len(path.read_text().splitlines()) < 10, path
