"""Which process of how many: said by flags or the environment, and one line where it is said by halves."""

import pytest

from e4t_jax.errors import UserError
from e4t_jax.training import distributed
from e4t_jax.training.distributed import Processes, agreed, is_first, joined

CLUSTERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


@pytest.fixture
def calls(monkeypatch):
    """No cluster, and what would be asked of JAX."""
    calls = []
    for name in CLUSTERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *given, **_: calls.append(given))
    monkeypatch.setattr(distributed.jax.distributed, "shutdown", lambda: calls.append("shutdown"))
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


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"coordinator": "a:1"}, "process_id: HOST:PORT needs --num-processes and --process-id beside it"),
        ({"coordinator": "a:1", "process_id": 0}, "num_processes: HOST:PORT needs"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "coordinator: 'a' names no port; give HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id: 2 is none of 2; count from 0"),
        ({"num_processes": 2}, "num_processes: it belongs to --coordinator"),
    ],
)
def test_what_is_said_by_halves_is_one_line(calls, given, said):
    with pytest.raises(UserError, match=said), joined(Processes(**given)):
        pass
    assert calls == []


def test_a_process_that_is_not_found_is_one_line(calls, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED: nobody came\nmore")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", fail)
    said = r"did not find one another \(DEADLINE_EXCEEDED: nobody came\); start all"
    with pytest.raises(UserError, match=said), joined(Processes(coordinator="a:1", num_processes=2, process_id=1)):
        pass
