"""Traced programs kept between processes: found by all that a trace follows from, and never believed when damaged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax.tuning import kept_programs
from e4t_jax.tuning.kept_programs import kept


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_programs, "folder", lambda: tmp_path / "traced")
    return tmp_path / "traced"


@pytest.fixture
def traces():
    return []


@pytest.fixture
def program(traces):
    def double(leaves, rows):
        traces.append(1)
        return [leaf * rows[0] for leaf in leaves]

    return jax.jit(double)


ARGUMENTS = [jnp.arange(3.0)], [np.float32(2)]


def test_a_program_is_traced_once_for_all_processes(home, program, traces):
    first = kept(program, {"steps": 5}, ARGUMENTS, jax.devices()[:1])
    np.testing.assert_array_equal(first(*ARGUMENTS)[0], [0, 2, 4])
    assert len(traces) == 1 and len(list(home.glob("*.stablehlo"))) == 1
    again = kept(jax.jit(lambda leaves, rows: 1 / 0), {"steps": 5}, ARGUMENTS, jax.devices()[:1])
    np.testing.assert_array_equal(again(*ARGUMENTS)[0], [0, 2, 4])


@pytest.mark.parametrize("change", ["static", "shape", "source", "option"])
def test_whatever_changes_the_trace_is_another_program(home, program, monkeypatch, change):
    kept(program, {"steps": 5}, ARGUMENTS, jax.devices()[:1])
    static, arguments = {"steps": 5}, ARGUMENTS
    if change == "static":
        static = {"steps": 6}
    elif change == "shape":
        arguments = [jnp.arange(4.0)], [np.float32(2)]
    elif change == "source":
        monkeypatch.setattr(kept_programs, "_source_digest", lambda: "another")
    with jax.default_matmul_precision("highest" if change == "option" else None):
        kept(program, static, arguments, jax.devices()[:1])
    assert len(list(home.glob("*.stablehlo"))) == 2


def test_a_damaged_file_is_traced_again(home, program, traces):
    kept(program, 1, ARGUMENTS, jax.devices()[:1])
    (file,) = home.glob("*.stablehlo")
    file.write_bytes(file.read_bytes()[:100])
    again = kept(program, 1, ARGUMENTS, jax.devices()[:1])
    np.testing.assert_array_equal(again(*ARGUMENTS)[0], [0, 2, 4])


def test_without_a_folder_or_a_description_nothing_is_kept(home, program, monkeypatch):
    assert kept(program, None, ARGUMENTS, jax.devices()[:1]) is program
    monkeypatch.setattr(kept_programs, "folder", lambda: None)
    assert kept(program, 1, ARGUMENTS, jax.devices()[:1]) is program
    assert not home.exists()


def test_programs_used_longest_ago_make_room(home, program, monkeypatch):
    monkeypatch.setattr(kept_programs, "_KEPT", 2)
    for number in range(4):
        kept(program, number, ARGUMENTS, jax.devices()[:1])
    assert len(list(home.glob("*.stablehlo"))) == 2
