"""The queue before a domain: every picture is answered once, with the concept that it has alone."""

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest
from concept_numbers import numbers

from e4t_jax.errors import UserError
from e4t_jax.tuning import batching
from e4t_jax.tuning.batching import Batch
from e4t_jax.tuning.tuner import Tuner, call_size

FEW = {"steps": 1, "caption": "a photo of *s"}  # what compiles soonest
PICTURES = [np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8) for index in range(4)]
compiles = pytest.mark.compiles


@pytest.fixture
def calls(monkeypatch):
    """(size, pictures) of every call of a program."""
    made, run = [], Batch.run

    def noted(self, rows):
        made.append((self.size, len(rows)))
        return run(self, rows)

    monkeypatch.setattr(Batch, "run", noted)
    return made


@pytest.fixture
def cores(monkeypatch):
    """Two devices that are a core each, whatever the machine has."""
    monkeypatch.setattr(batching, "_one_by_one", lambda devices: True)


@pytest.mark.slow
def test_pictures_that_come_together_are_tuned_in_one_call_each_as_if_alone(domain, calls, cores):
    """Four in a full call, three in one that is filled up, one; and cores of their own: as from `Domain.tune`, alone, to 1e-5."""
    apart = [domain.tune([picture], names=[str(row)], **FEW)[0] for row, picture in enumerate(PICTURES)]

    def compare(tuner, count):
        promised = [tuner.submit(picture, apart[row].name) for row, picture in enumerate(PICTURES[:count])]
        for future, alone in zip(promised, apart[:count], strict=True):
            concept = future.result()
            assert concept._replace(trainable=None, folded=None) == alone._replace(trainable=None, folded=None)
            np.testing.assert_allclose(numbers(concept), numbers(alone), rtol=0, atol=1e-5)

    with Tuner(domain, max_batch=4, max_wait=1.0, **FEW) as tuner:
        assert tuner.sizes == [1, 2, 4]
        calls.clear()
        for count in (4, 3, 1):
            compare(tuner, count)
    assert calls == [(4, 4), (4, 3), (1, 1)]
    with Tuner(domain, **FEW) as tuner:
        compare(tuner, 4)


def test_a_call_is_filled_up_by_a_quarter_at_most():
    chosen = {count: call_size(count, [1, 2, 4, 8]) for count in (0, 1, 2, 3, 4, 5, 6, 7, 8, 100)}
    assert chosen == {0: 1, 1: 1, 2: 2, 3: 4, 4: 4, 5: 4, 6: 8, 7: 8, 8: 8, 100: 8}


@compiles
def test_what_fails_fails_alone(domain, tmp_path, monkeypatch):
    """A damaged file, then a call that the device cannot make, then pictures as before."""
    (tmp_path / "venus.png").write_bytes(b"no picture")
    with Tuner(domain, max_batch=2, max_wait=1.0, **FEW) as tuner:
        broken, *whole = [tuner.submit(image) for image in (tmp_path / "venus.png", *PICTURES[:2])]
        with pytest.raises(UserError, match=r"venus\.png is not a picture"):
            broken.result()
        assert all(future.result() for future in whole)
        with monkeypatch.context() as patch:
            patch.setattr(Batch, "run", lambda self, rows: 1 / 0)
            for future in [tuner.submit(picture) for picture in PICTURES[:2]]:
                assert isinstance(future.exception(), ZeroDivisionError)
        assert tuner.submit(PICTURES[0]).result()


@compiles
def test_closing_answers_all_that_wait(domain, calls, cores):
    """Sent from four threads at once, to two cores that each take the next picture when they are free."""
    with Tuner(domain, **FEW) as tuner, ThreadPoolExecutor(4) as senders:
        assert tuner.sizes == [1] and len(calls) == 2
        promised = list(senders.map(lambda row: tuner.submit(PICTURES[row % 4], str(row)), range(12)))
    assert all(future.done() for future in promised)
    assert len(calls) == 14
    assert [future.result().name for future in promised] == [str(row) for row in range(12)]
    with pytest.raises(RuntimeError, match="after shutdown"):
        tuner.submit(PICTURES[0])


@compiles
def test_who_does_not_want_to_wait_may_cancel(domain, monkeypatch):
    """One by one while another is tuned; and all that wait when an error leaves the block."""
    begun, free, run = threading.Event(), threading.Event(), Batch.run

    def held(self, rows):
        begun.set()
        free.wait()
        return run(self, rows)

    def closing():
        with Tuner(domain, max_batch=2, **FEW) as tuner:
            monkeypatch.setattr(Batch, "run", held)
            promised.append(tuner.submit(PICTURES[0]))
            begun.wait()
            promised.extend(tuner.submit(picture) for picture in PICTURES[1:])
            assert promised[1].cancel() and not promised[0].cancel()
            threading.Timer(0.5, free.set).start()
            raise KeyboardInterrupt

    promised = []
    with pytest.raises(KeyboardInterrupt):
        closing()
    assert promised[0].result().name == "concept_0"
    for future in promised[1:]:
        with pytest.raises(CancelledError):
            future.result(timeout=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_batch": 0}, "max_batch: 0 is out of range"),
        ({"max_wait": -1.0}, "max_wait: -1.0 is out of range"),
        ({"caption": "a photo"}, "lacks the placeholder"),
        ({"steps": -1}, "steps: -1"),
        ({"colour": 3}, "'colour' is no setting"),
    ],
)
def test_wrong_options_are_refused(domain, options, said):
    with pytest.raises(UserError, match=said):
        Tuner(domain, **options)
