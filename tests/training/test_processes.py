"""Which process of how many: said by flags or the environment, and one line where it is said by halves."""

import re
import threading

import jax
import pytest

from e4t_jax.errors import UserError
from e4t_jax.training import processes
from e4t_jax.training.processes import Processes, agreed, is_first, joined

CLUSTERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


@pytest.fixture
def calls(monkeypatch):
    """No cluster, and what would be asked of JAX."""
    calls = []
    for name in CLUSTERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *given, **_: calls.append(given))
    monkeypatch.setattr(processes.jax.distributed, "shutdown", lambda: calls.append("shutdown"))
    monkeypatch.setattr(processes, "_watch_others", lambda left: None)
    return calls


def test_alone_where_nothing_says_otherwise(calls, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    with joined(Processes()):
        assert is_first() and agreed(7) == 7
    assert calls == []


@pytest.mark.parametrize(("name", "value"), [*zip(CLUSTERS, ("4", "2", "a:1,b:1", "a,b"), strict=True)])
def test_a_cluster_says_it(calls, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with joined(Processes()):
        pass
    assert calls == [(None, None, None), "shutdown"]


def test_flags_say_it(calls):
    with joined(Processes(coordinator="10.0.0.1:8476", num_processes=2, process_id=1)):
        pass
    with joined(Processes(coordinator="auto")):
        pass
    assert calls == [("10.0.0.1:8476", 2, 1), "shutdown", (None, None, None), "shutdown"]


@pytest.mark.parametrize(("what", "is_lost"), [("UNKNOWN: Gloo AllGather failed: reset by peer", True), ("no space left", False)])
@pytest.mark.parametrize("kind", [ValueError, jax.errors.JaxRuntimeError])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_process_lost_within_a_save_is_told_as_lost(calls, what, is_lost, kind, wrapped):
    """Though the save made a line of its own of it; and what is no loss stays what it was."""
    said = "another process of the run is lost (UNKNOWN: Gloo" if is_lost else "Cannot write" if wrapped else what
    with pytest.raises(Exception, match=re.escape(said)), joined(Processes(coordinator="auto")):
        try:
            raise kind(what)
        except Exception as error:
            if wrapped:
                raise UserError(f"Cannot write a checkpoint ({error}); free some space and resume.") from None
            raise


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"coordinator": "a:1"}, "process_id: HOST:PORT needs num_processes and process_id beside it"),
        ({"coordinator": "a:1", "process_id": 0}, "num_processes: HOST:PORT needs"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "coordinator: 'a' names no port; give HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id: 2 is none of 2; count from 0"),
        ({"num_processes": 2}, "num_processes: it belongs to a coordinator"),
    ],
)
def test_what_is_said_by_halves_is_one_line(calls, given, said):
    with pytest.raises(UserError, match=said), joined(Processes(**given)):
        pass
    assert calls == []


def test_a_process_that_is_not_found_is_one_line(calls, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED: nobody came\nmore")

    monkeypatch.setattr(processes.jax.distributed, "initialize", fail)
    said = r"did not find one another \(DEADLINE_EXCEEDED: nobody came\); start all"
    with pytest.raises(UserError, match=said), joined(Processes(coordinator="a:1", num_processes=2, process_id=1)):
        pass


class Store:
    """The processes' shared store, of which one stopped writing."""

    def __init__(self):
        self.signs = {"signs/1": "5"}

    def key_value_set(self, name, sign, allow_overwrite):
        self.signs[name] = sign

    def key_value_dir_get(self, folder):
        return list(self.signs.items())


def test_a_process_without_a_sign_of_life_is_lost_and_one_that_left_is_not(monkeypatch):
    store, said = Store(), []

    def end(line):
        said.append(line)
        raise SystemExit

    monkeypatch.setattr(processes.global_state, "client", store)
    monkeypatch.setattr(processes, "end", end)
    monkeypatch.setattr(processes, "_SIGN_EVERY", 0.01)
    monkeypatch.setattr(processes, "_LOST_AFTER", 0.1)
    with pytest.raises(SystemExit):
        processes._watch_others(threading.Event())
    assert said == ["Error: process 0: process 1 of the run is lost; see what it said, start all again and resume."]

    store.signs, left = {"signs/1": "left"}, threading.Event()
    threading.Timer(0.5, left.set).start()
    processes._watch_others(left)
    assert len(said) == 1 and store.signs["e4t_jax/signs/0"] == "left"
