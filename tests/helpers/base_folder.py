"""What tests do to the files of a base, and what loading it then says."""

import json

import pytest

from e4t_jax import bases
from e4t_jax.errors import UserError


def change(path, **entries):
    """Entries of a JSON file; those of value `...` are removed."""
    content = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def assert_one_line(folder, match):
    with pytest.raises(UserError, match=match) as raised:
        bases.load_base(str(folder))
    assert len(str(raised.value).splitlines()) == 1


def without_checksums(folder):
    change(folder / "model_index.json", _checksums=...)
    return folder
