"""What the documents show runs: the blocks of extending.md in their order, the notebook, the README's Python."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sandbox import nothing_compiled

import e4t_jax
from e4t_jax import offsets, registry
from e4t_jax.evaluation.metrics import METRICS
from e4t_jax.pretraining.settings import preset_of
from e4t_jax.samplers import METHODS
from e4t_jax.tuning import scopes

ROOT = Path(__file__).parents[1]


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def additions(monkeypatch):
    """What the examples add to the package's tables is gone afterwards."""
    tables = (scopes.SCOPES, offsets.FORMS, METRICS, METHODS, *registry._ENTRIES.values())
    for table in tables:
        for name in list(table):
            monkeypatch.setitem(table, name, table[name])
    before = [(table, set(table)) for table in tables]
    yield
    for table, names in before:
        for name in set(table) - names:
            del table[name]


@pytest.mark.compiles
def test_every_example_of_extending_runs(domain, tmp_path, monkeypatch, additions):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save("picture.png")
    names = {"domain": domain, "picture": "picture.png"}
    for block in blocks(ROOT / "docs" / "extending.md"):
        module = re.match(r"# (\w+\.py)\n", block)
        if module:
            Path(module[1]).write_text(block)
        else:
            exec(compile(block, "extending.md", "exec"), names)
    assert names["concept"].scope == "word"
    assert np.all(np.asarray(names["concept"].trainable.residual) != 0)
    assert all(np.all(np.asarray(part["columns"]) == 0) for part in names["concept"].trainable.factors.values())
    moved = offsets.merge(domain.params["unet"], names["scaled_again"].trainable.factors)
    for name, kernel in domain.base.offset_kernels(domain.params["unet"]).items():
        scale = np.asarray(domain.base.offset_kernels(moved)[name] / kernel)
        inputs, outputs = (np.asarray(names["scaled"].trainable.factors[name][side]) for side in ("inputs", "outputs"))
        assert np.any(inputs) and np.any(outputs)
        np.testing.assert_allclose(scale, 1 + np.add.outer(inputs, outputs), atol=1e-4)  # read from float16
    assert names["pictures"].shape == (1, 1, 16, 16, 3) and names["drawn"].shape == (1, 1, 16, 16, 3)
    assert list(names["figures"]) == ["brightness"]
    assert len(names["rows"]) == 8 and names["learned"].factors
    assert preset_of("elsewhere", "stripes").domain.domain_token == "toy"
    seen = names["coarse_domain"].base.image_encoder
    assert (seen.features, seen.count, seen.width) == ("coarse", 4, 16)
    assert names["coarse_domain"].encoder["layer_kernels"].shape == (4, 16, 16)
    for module in ("stripes", "stripes_preset", "sketch_base", "patch_encoder"):
        sys.modules.pop(module, None)


@pytest.mark.compiles
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its code as it stands, on the shipped domain."""
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # it needs none
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    names: dict = {"display": lambda *things: None}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, "quickstart.ipynb", "exec"), names)
    assert names["images"].ndim == 5
    assert (tmp_path / "venus.safetensors").exists()


def test_the_readmes_python_runs(domain, tmp_path, monkeypatch):
    """As it stands, in a folder with the files it names, on a tiny domain in place of the shipped one; nothing is compiled."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(e4t_jax, "load_domain", lambda name: {"creatures": domain}[name])
    names: dict = {}
    (block,) = blocks(ROOT / "README.md")
    with nothing_compiled():
        exec(compile(block, "README.md", "exec"), names)
    assert [concept.name for concept in names["concepts"]] == ["venus", "ada"]
    assert names["images"].shape == (2, 1, 16, 16, 3)
    assert Image.open("venus_in_the_snow.png").size == (256, 256) and Path("venus.safetensors").exists()


def test_files_that_the_documents_name_as_examples_exist():
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for name in re.findall(r"examples/[\w./-]+\.\w+", path.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_the_documents_links_lead_somewhere():
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_lines_of_documents_fit_a_page():
    """132 characters, but for tables and for pictures, which cannot be broken."""
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 132 or line.startswith(("|", "![")), f"{path.name}:{number}"


def test_commands_have_one_spelling():
    """`e4t NAME`; that a checkout has doors to the same is said once, in the README."""
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "Makefile", *sorted((ROOT / "docs").rglob("*.md"))]:
        found = re.findall(r"\b(?:train|infer)\.(?!NAME)[a-z_]+(?=[\s`])", path.read_text(encoding="utf-8"))
        assert not found, f"{path.name}: {found}"
