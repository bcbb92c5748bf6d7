"""Paths as people write them: the home folder, variables, and addresses that no file of this machine can be."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from sandbox import call, make_world, nothing_compiled

from e4t_jax.data.sources import open_pictures
from e4t_jax.errors import UserError
from e4t_jax.files.concept_files import load_concept, save_concept
from e4t_jax.files.domain_files import load_domain, save_domain
from e4t_jax.files.places import local_data, local_name, local_path
from e4t_jax.pretraining.pretrain import pretrain
from e4t_jax.storage import check_writable, write_file


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with nothing_compiled():
        yield make_world(tmp_path_factory.mktemp("home"))


@pytest.fixture
def home(world, tmp_path, monkeypatch):
    """The world's folder is the user's home; work is done elsewhere."""
    home = world.base.parent
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PLACE", str(home))
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    return home


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~/a", "HERE/a"),
        ("$HOME/a", "HERE/a"),
        ("${PLACE}/a/$HOME.b", "HERE/a/HERE.b"),
        ("file://HERE/a", "HERE/a"),
        ("file:/HERE/a", "HERE/a"),
        ("a/~", "a/~"),
        ("cost$5.png", "cost$5.png"),
        ("a$NOWHERE", "a$NOWHERE"),
        ("C:/a", "C:/a"),
        ("", "."),
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_leads_where_a_shell_would_take_it(home, written, meant, kind):
    assert local_path(kind(written.replace("HERE", str(home)))) == Path(meant.replace("HERE", str(home)))


@pytest.mark.parametrize("name", ["~", "$HOME", "$NOWHERE", "gs:", "gs:/b"])
def test_what_is_there_by_the_name_as_written_is_meant(home, name):
    Path(name).mkdir(parents=True)
    assert local_path(name) == Path(name) and local_path(Path(name) / "new").parts[0] == Path(name).parts[0]


@pytest.mark.parametrize(
    ("written", "line"),
    [
        ("gs://b/o", "out: gs://b/o is no path of this machine; mount the bucket (gcsfuse) and give the folder it is mounted on."),
        ("S3://b", "out: S3://b is no path of this machine; mount the bucket (mount-s3, s3fs) and give the folder"),
        ("memory://b/o", "out: memory://b/o is no path of this machine; give a folder or a file of this machine, or mount it"),
        ("https://x.org/a.png", "out: https://x.org/a.png is no path of this machine; download it, and give the file or folder."),
        ("hf://owner/model", "out: hf://owner/model is no path of this machine; give its Hub id, such as owner/model"),
        ("$NOWHERE/o", "out: $NOWHERE/o: $NOWHERE is not set; set it, or give the path itself."),
        ("~nobody-at-all/o", "out: ~nobody-at-all/o: no home folder is known for ~nobody-at-all; give the path itself."),
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_what_no_path_can_be_is_one_line(home, written, line, kind):
    with pytest.raises(UserError, match=f"^{re.escape(line)}"):
        local_path(kind(written), "out")


def test_names_that_are_no_paths_stay_as_they_are(home):
    for name in ("creatures", "owner/model", "random:sd15", "./base", "base/"):
        assert local_name(name) == name
    for spec in ("creatures", "tfds:gs", "module.one:function", "folder:a/b", "cache:/a", "tfds:a/b:1.0.0"):
        assert local_data(spec) == spec
    assert local_name("~/base") == f"{home}/base" and local_data("folder:~/cats") == f"folder:{home}/cats"


COMMANDS = {
    "tune": {"--images": "~/pictures/0.png", "--out": "out", "--domain": "~/domain", "--steps": "1"},
    "generate": {"--concepts": "~/venus.safetensors", "--prompts": "*s", "--out": "out", "--domain": "$HOME/domain"},
    "export": {"--concept": "$HOME/venus.safetensors", "--out": "out", "--domain": "~/domain"},
    "pretrain": {"--out": "out", "--work": "work", "--base": "~/base", "--data": "folder:~/pictures"},
    "cache": {"--out": "out", "--base": "$PLACE/base", "--data": "folder:$PLACE/pictures", "--batch-size": "2"},
}
SMALL = {"pretrain": ["--steps", "2", "--batch-size", "2", "--domain-token", "creature"]}


def arguments(command, **changes):
    options = {**COMMANDS[command], **changes}
    return [word for pair in options.items() for word in pair] + SMALL.get(command, [])


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_home_and_variables_and_write_there(home, command):
    outcome = call(command, arguments(command, **{"--out": f"~/out_{command}"}))
    assert (outcome.status, outcome.said, outcome.traceback) == (0, "", "")
    assert list((home / f"out_{command}").iterdir()) and not Path("~").exists() and not Path("out").exists()


PATHS = ("--images", "--concepts", "--concept", "--out", "--work", "--domain", "--base", "--data")


@pytest.mark.parametrize(("command", "flag"), [(name, flag) for name, own in COMMANDS.items() for flag in own if flag in PATHS])
def test_a_bucket_is_one_line_that_names_the_flag_and_nothing_is_made(home, command, flag):
    outcome = call(command, arguments(command, **{flag: "gs://bucket/o"}))
    assert outcome.is_one_line, outcome
    assert outcome.said.startswith(f"Error: {flag}: gs://bucket/o is no path of this machine; mount the bucket")
    assert not [name for name in os.listdir() if name.startswith("gs")]


def test_the_library_takes_them_too(home, domain):
    loaded = load_domain("~/domain")
    concept = load_concept("$PLACE/venus.safetensors", loaded.fingerprint)
    save_concept("~/again.safetensors", concept)
    assert (home / "again.safetensors").exists()
    (tuned,) = loaded.tune(["~/pictures/0.png"], steps=0)
    save_domain("~/saved", pretrain("~/base", "folder:~/pictures", *settings(), work="~/work"))
    assert tuned.name == "0" and (home / "work" / "run.json").exists()
    assert load_domain("~/saved").base_name == str(home / "base")
    assert len(open_pictures("folder:~/pictures", 16, "data")) == 4
    assert not os.listdir()


def settings():
    from e4t_jax.pretraining.settings import DomainSettings
    from e4t_jax.pretraining.step import PretrainSettings

    return DomainSettings("creature"), PretrainSettings(steps=1, batch_size=2)


def test_the_library_refuses_a_bucket_before_it_makes_a_folder(home, domain):
    loaded = load_domain("~/domain")
    concept = load_concept("~/venus.safetensors")
    for act in (
        lambda: load_domain("gs://b/domain"),
        lambda: save_domain("gs://b/domain", domain),
        lambda: save_concept("gs://b/venus.safetensors", concept),
        lambda: load_concept("gs://b/venus.safetensors"),
        lambda: pretrain("~/base", "folder:~/pictures", *settings(), work="gs://b/work"),
        lambda: pretrain("gs://b/base", "folder:~/pictures", *settings(), work="work"),
        lambda: loaded.tune(["gs://b/venus.png"], steps=0),
        lambda: write_file(Path("gs://b/x"), b""),
        lambda: check_writable(Path("gs://b/x")),
    ):
        with pytest.raises(UserError, match=r"gs://b/.* is no path of this machine; mount the bucket"):
            act()
    assert not os.listdir()


def test_a_picture_whose_name_has_signs_of_a_path_is_written_under_it(home):
    """What is expanded is what the user wrote, never what a file's name made of it."""
    write_file(Path("out/$HOME.txt"), b"x")
    assert os.listdir("out") == ["$HOME.txt"]
    assert np.array_equal(os.listdir(), ["out"])
