"""What is public explains itself: the API pages show every module, and every name on them has a docstring."""

import ast
import dataclasses
import importlib
import inspect
import io
import re
import tokenize
from pathlib import Path

import pytest

import e4t_jax

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "e4t_jax"
NOT_SHOWN = ("cli", "creatures", "testing")  # commands have `--help`; the drawn world is a leaf; helpers of tests


def module_name(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def shown():
    """The modules of the API pages."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    return re.findall(r"(?m)^::: ([\w.]+)$", pages)


def path_of(module):
    return ROOT / f"{module.replace('.', '/')}.py"


def public(body):
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def undocumented(module):
    """Public names of a module without a docstring; what overrides a method of a class beside it may leave it to that."""
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    if not ast.get_docstring(tree):
        yield module
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in public(tree.body):
        if not ast.get_docstring(node):
            yield f"{module}.{node.name}"
        if isinstance(node, ast.ClassDef):
            bases = [classes[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
            inherited = {method.name for base in bases for method in public(base.body) if ast.get_docstring(method)}
            for method in public(node.body):
                # Flax calls `setup`; nobody else does.
                if not ast.get_docstring(method) and method.name not in inherited | {"setup"}:
                    yield f"{module}.{node.name}.{method.name}"


def test_every_module_is_on_a_page():
    found = {module_name(path) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    found = {name for name in found if name.split(".")[1] not in NOT_SHOWN}
    assert sorted(shown()) == sorted(found), "each has one line `::: MODULE` in docs/api/"


@pytest.mark.parametrize("module", shown())
def test_every_public_name_has_a_docstring(module):
    assert list(undocumented(module)) == []


def test_names_that_docstrings_point_to_exist():
    """`room.name` and `room.module.name`, as the docstrings of the package write them, are found where they say."""
    modules = {module_name(path).removeprefix("e4t_jax.") for path in PACKAGE.rglob("*.py")}
    rooms = {name.split(".")[0] for name in modules}
    lost = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))]
        names = {name for node in documented for name in re.findall(r"`([a-z_]\w*(?:\.\w+)+)`", ast.get_docstring(node) or "")}
        for name in names:
            parts = name.split(".")
            if parts[0] not in rooms or name.endswith((".json", ".safetensors")):
                continue
            own = next((".".join(parts[:end]) for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in modules), "")
            rest = parts[len(own.split(".")) :] if own else parts
            text = (PACKAGE / (f"{own.replace('.', '/')}.py")) if own else path
            text = text if text.exists() else PACKAGE / own.replace(".", "/") / "__init__.py"
            if not own or (rest and not re.search(rf"\b{rest[0]}\b", text.read_text(encoding="utf-8"))):
                lost.append(f"{path.relative_to(ROOT)}: {name}")
    assert lost == []


def fields_documented(kind):
    """The fields of a class that a string beneath or a comment on the same lines explains."""
    source = inspect.getsource(kind).splitlines()
    body = next(node for node in ast.parse("\n".join(source)).body if isinstance(node, ast.ClassDef)).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign):
            continue
        text = "\n".join(line.strip() for line in source[node.lineno - 1 : node.end_lineno])
        comment = any(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(text).readline))
        string = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
        if comment or string:
            yield node.target.id


def calls(name):
    """(label, function or method) of a public name."""
    thing = getattr(e4t_jax, name)
    if not inspect.isclass(thing):
        return [(name, thing, inspect.getdoc(thing) or "")]
    made_by_fields = dataclasses.is_dataclass(thing) or hasattr(thing, "_fields")
    own = [] if made_by_fields else [(name, thing.__init__, inspect.getdoc(thing) or "")]
    methods = [(key, value) for key, value in vars(thing).items() if inspect.isfunction(value) and not key.startswith("_")]
    generated = ("replace",)  # by flax.struct
    return own + [(f"{name}.{key}", value, inspect.getdoc(value) or "") for key, value in methods if key not in generated]


@pytest.mark.parametrize("name", e4t_jax.__all__)
def test_every_argument_and_error_of_the_public_names_is_stated(name):
    thing = getattr(e4t_jax, name)
    if inspect.isclass(thing) and (dataclasses.is_dataclass(thing) or hasattr(thing, "_fields")):
        fields = [field for field in getattr(thing, "__annotations__", {}) if not field.isupper()]
        assert sorted(set(fields) - set(fields_documented(thing))) == []
    for label, call, text in calls(name):
        arguments = [argument for argument in inspect.signature(call).parameters if argument != "self"]
        assert [argument for argument in arguments if not re.search(rf"`{argument}`|(?m:^\s*{argument}: )", text)] == [], label
        assert (inspect.isclass(thing) and issubclass(thing, Exception)) or "Errors:" in text, label


def test_public_names_live_where_the_api_page_says():
    page = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"\| \[`(\w+)`\]\[([\w.]+)\]", page))
    assert sorted(told) == sorted(e4t_jax.__all__)
    for name, home in told.items():
        module, _, attribute = home.rpartition(".")
        assert getattr(importlib.import_module(module), attribute) is getattr(e4t_jax, name)
