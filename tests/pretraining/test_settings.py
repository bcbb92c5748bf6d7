"""Whose settings hold where none are given: the paper's, or those of a preset."""

import json

import pytest

from e4t_jax import registry
from e4t_jax.cli import pretrain as command
from e4t_jax.cli.run import parse, run
from e4t_jax.creatures.presets import creatures
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.pretraining.pretrain import pretrain
from e4t_jax.pretraining.settings import DomainSettings, Preset, or_preset, preset_of
from e4t_jax.pretraining.step import PretrainSettings
from e4t_jax.testing import tiny_base, write_tiny_world


def test_the_defaults_are_stable_diffusions_and_the_papers():
    domain, training = DomainSettings("face"), PretrainSettings()
    assert (domain.template, domain.clip_features, domain.guidance) == ("neutral", "layers", 7.5)
    assert (training.learning_rate, training.regularisation, training.batch_size) == (1.6e-5, pytest.approx(0.01 * 0.4**2), 16)
    for name in ("template", "guidance"):
        assert getattr(domain, name) == getattr(Domain, name)
    assert training.regularisation == Domain.regularisation
    assert tiny_base()[0].image_encoder.features == domain.clip_features


def test_the_drawn_world_keeps_its_own():
    """What the shipped domain was pretrained with, beside the Makefile's flags."""
    for data, word in (("creatures", "creature"), ("fish", "fish")):
        name, domain, training = preset_of("creatures", data)
        assert (name, domain) == (data, DomainSettings(word, "creature", guidance=4.0))
        assert training == PretrainSettings(learning_rate=1.5e-3, regularisation=0.0027)


def test_the_preset_of_the_data_comes_first_then_that_of_the_base():
    assert preset_of("creatures", "folder:cats").name == "creatures"
    assert preset_of("elsewhere", "fish").name == "fish"
    assert preset_of("elsewhere", "folder:cats") is None


def test_what_is_given_is_taken_and_a_domain_needs_its_word():
    cat, few = DomainSettings("cat"), PretrainSettings(steps=3)
    assert or_preset("creatures", "fish", cat, few) == (cat, few, None)
    assert or_preset("creatures", "fish", None, few) == (preset_of("", "fish").domain, few, "fish")
    assert or_preset("elsewhere", "folder:cats", cat, None) == (cat, PretrainSettings(), None)
    with pytest.raises(UserError, match="domain_token: there is none; give the word"):
        or_preset("elsewhere", "folder:cats", None, few)


def test_pretraining_asks_for_the_word_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="domain_token: there is none; give the word"):
        pretrain("elsewhere", "folder:cats", work=tmp_path / "work")
    assert not list(tmp_path.iterdir())


def options(*arguments):
    return parse(command.Config.with_defaults(arguments), arguments, "e4t pretrain")


def test_a_commands_defaults_follow_its_base_and_data():
    config = options("--out", "o", "--data=fish", "--guidance", "5", "--steps", "7")
    assert isinstance(config, command.Config)
    assert config.domain == DomainSettings("fish", "creature", guidance=5.0)
    assert config.training == PretrainSettings(steps=7, learning_rate=1.5e-3, regularisation=0.0027)
    config = options("--out", "o", "--base", "random:sd15", "--data", "fish", "--data", "folder:x", "--domain-token", "face")
    assert (config.domain, config.training) == (DomainSettings("face"), PretrainSettings())


def test_help_shows_the_defaults_that_hold(capsys):
    for arguments, shown in (([], "creature"), (["--data", "fish"], "fish"), (["--base", "x", "--data", "folder:x"], "(required)")):
        with pytest.raises(SystemExit) as end:
            options(*arguments, "--help")
        text = " ".join(word for word in capsys.readouterr().out.replace("│", " ").split())
        assert not end.value.code and "Pretrain encoder and weight offsets" in text
        word = text[text.index("--domain-token") : text.index("--template")]
        assert shown in word.rpartition("; one token.")[2], word


def test_a_command_without_preset_asks_for_the_word():
    with pytest.raises(SystemExit, match="Error: --domain-token must be given; see --help"):
        run(command.main, ["--out", "o", "--base", "nowhere", "--data", "folder:nowhere"])


@pytest.mark.parametrize("of_command", [True, False])
def test_run_json_names_the_preset_and_what_it_came_to(tmp_path, monkeypatch, of_command):
    """Up to where steps would be taken."""
    from e4t_jax.pretraining import pretrain as module

    class Begun(Exception):
        pass

    def begin(*arguments, **options):
        raise Begun

    world = write_tiny_world(tmp_path / "world")
    monkeypatch.setattr(module, "pretrain_trainable", begin)
    monkeypatch.setitem(registry._ENTRIES["preset"], f"folder:{world.pictures}", f"{__name__}:tiny_preset")
    with pytest.raises(Begun):
        if of_command:
            arguments = ["--base", world.base, "--data", f"folder:{world.pictures}", "--out", tmp_path / "out"]
            run(command.main, [str(word) for word in (*arguments, "--work", tmp_path / "work", "--guidance", "3")])
        else:
            pretrain(str(world.base), f"folder:{world.pictures}", work=tmp_path / "work")
    told = json.loads((tmp_path / "work" / "run.json").read_text())["settings"]
    assert told["preset"] == "tiny" and told["domain_token"] == "cat" and told["batch_size"] == 2
    assert told["guidance"] == (3.0 if of_command else 7.5) and told["learning_rate"] == 1e-4


def tiny_preset():
    return Preset("tiny", DomainSettings("cat"), PretrainSettings(batch_size=2, learning_rate=1e-4))


def test_the_presets_are_registered():
    assert registry.names("preset") == ["creatures", "fish"]
    assert registry.find("preset", "creatures") is creatures
