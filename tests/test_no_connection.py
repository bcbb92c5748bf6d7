"""With local folders alone given, no command asks anything of the net: any attempt is an error here."""

import os
import socket

import pytest
from sandbox import COMMANDS, call, make_world, nothing_compiled

pytestmark = pytest.mark.compiles


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline")
    with nothing_compiled():
        yield make_world(folder)


@pytest.fixture(autouse=True)
def no_net(monkeypatch):
    """Sockets that refuse, and libraries that are not told to stay away from the net."""
    attempts = []

    def refuse(*arguments, **_):
        attempts.append(arguments)
        raise AssertionError(f"a connection was attempted: {arguments}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield attempts
    assert not attempts


def test_the_refusal_is_one(no_net):
    """Else the others would prove nothing."""
    with pytest.raises(AssertionError, match="a connection was attempted"):
        socket.create_connection(("localhost", 1))
    assert len(no_net) == 1
    no_net.clear()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("domain", ["own", "shipped"])
def test_no_command_connects(world, tmp_path, command, domain, request):
    """Right calls to their end, or to where training would begin."""
    own = ["--domain", world.domain] if domain == "own" else []
    word = ["--domain-token", "creature"]
    concepts, small = [*world.concepts], ["--work", tmp_path / "work", "--steps", "1", "--batch-size", "2"]
    arguments = {
        "tune": ["--images", world.pictures / "0.png", "--steps", "1", "--out", tmp_path / "out", *own],
        "generate": ["--concepts", *concepts, "--prompts", "a *s", "--steps", "1", "--out", tmp_path / "out", *own],
        "export": ["--concept", concepts[0], "--out", tmp_path / "out", *own],
        "export-domain": ["--out", tmp_path / "out", *own],
        "pretrain": ["--base", world.base, "--data", f"folder:{world.pictures}", "--out", tmp_path / "out", *small, *word],
        "cache": ["--base", world.base, "--data", f"folder:{world.pictures}", "--out", tmp_path / "out", "--batch-size", "2"],
        "evaluate": ["--out", tmp_path / "out", *own],
        "demo": ["--out", tmp_path / "out"],
        "train-base": ["--start", world.base, "--out", tmp_path / "out", "--work", tmp_path / "work"],
        "train-judges": ["--out", tmp_path / "out"],
        "import-reference": ["--reference", world.base.parent / "pretrained", "--base", world.base, "--out", tmp_path / "out"],
    }
    outcome = call(command, arguments[command])
    assert not outcome.traceback, outcome.traceback
    # Concepts of the tiny domain are none of the shipped one's.
    refused = "2 of 2 concepts failed" if command == "generate" else "was tuned in another domain"
    if (command, domain) == ("export-domain", "own"):  # the tiny domain's encoder is the paper's
        assert "its encoder sees layers of CLIP" in outcome.said
        return
    assert outcome.status == 0 or (domain == "shipped" and refused in outcome.said), outcome


def test_the_embedded_worlds_pictures_are_drawn_without_a_connection(tmp_path):
    """TFDS asks its bucket for data sets that it knows."""
    from e4t_jax.creatures.world.dataset import CreaturesConfig, as_source

    source = as_source("train", tmp_path, CreaturesConfig(train=2, validation=1, test=1))
    assert len(source) == 2 and os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["pictures", "nowhere", "domain"])
def test_a_folder_that_is_no_base_is_not_looked_for_elsewhere(world, tmp_path, name):
    place = world.base.parent / name
    own = ["--base", place, "--data", f"folder:{world.pictures}", "--domain-token", "creature"]
    outcome = call("pretrain", [*own, "--work", tmp_path / "w", "--out", tmp_path / "o"])
    assert outcome.is_one_line and str(place) in outcome.said, outcome
