"""Traced programs kept between processes: found by all that a trace follows from, and never believed when damaged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from e4t_jax.objective import LossWeights
from e4t_jax.tuning import batching, kept_programs
from e4t_jax.tuning.kept_programs import kept, made_here


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


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(home, program):
    home.write_text("a file in its place")
    np.testing.assert_array_equal(kept(program, 1, ARGUMENTS, jax.devices()[:1])(*ARGUMENTS)[0], [0, 2, 4])


@struct.dataclass
class Foreign(LossWeights):
    """Code of another package: it may change while this package's stays."""


def test_only_trees_of_this_package_are_traced_from_its_source_alone():
    assert made_here(jax.tree.structure({"a": (LossWeights(0.1), [None, 1.0])}))
    assert not made_here(jax.tree.structure({"a": (Foreign(0.1), [None, 1.0])}))


def add(shared, own):
    return shared + own


def subtract(shared, own):
    return shared - own


def test_two_functions_and_two_ways_to_batch_are_programs_of_their_own(home, monkeypatch):
    example, static = np.float32(2), {"the": "same"}
    for one, expected in ((add, 3), (subtract, -1)):
        batch = batching.fitted(one, jnp.float32(1), example, 1, lower="batch_size", static=static)
        assert batch.run([example]) == [expected]
    monkeypatch.setattr(batching, "core_count", lambda: 1000)  # fewer devices than cores: side by side
    batching.fitted(add, jnp.float32(1), example, 1, lower="batch_size", static=static)
    assert len(list(home.glob("*.stablehlo"))) == 3
