"""The command lines: every script explains itself, and a user's mistake is one line and a non-zero exit."""

import dataclasses
import os
import subprocess
import sys

import jax
import pytest

SCRIPTS = {
    "train.base": "--check",
    "train.judges": "--seed",
    "train.pretrain": "--resume",
    "train.cache": "--views",
    "train.tune": "--images",
    "train.import_reference": "--reference",
    "infer.generate": "--prompts",
    "infer.evaluate": "--concepts",
    "infer.export": "--format",
    "infer.export_domain": "--domain",
    "infer.demo": "--seed",
}


def call(*arguments):
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.compiles
@pytest.mark.parametrize(("script", "option"), SCRIPTS.items())
def test_help_explains_every_option(script, option):
    done = call(script, "--help")
    assert done.returncode == 0
    assert "--out" in done.stdout and option in done.stdout


@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB")])
def test_want_of_memory_names_the_flag_to_lower(monkeypatch, error):
    from e4t_jax.cli.run import Command, run

    @dataclasses.dataclass(frozen=True)
    class Config(Command):
        """A script."""

        batch_size: int = 16

    def main(config: Config) -> None:
        raise error

    monkeypatch.setitem(main.__annotations__, "config", Config)
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit, match="out of memory; lower --batch-size"):
        run(main)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train.tune", "--images", "a.png", "--out", "{}/o", "--domain", "{}/nowhere"), "nowhere"),
        (("train.tune", "--images", "x/a.png", "y/a.png", "--out", "{}/o"), "--images: two files have one name"),
        (("train.tune", "--images", "a.png", "--out", "/proc/o"), "Cannot write /proc/o"),
        (("train.pretrain", "--base", "{}/nowhere", "--out", "{}/o"), "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_a_status(arguments, said, tmp_path):
    done = call(*(argument.format(tmp_path) for argument in arguments))
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_compiled_programs_are_kept_unless_told_otherwise(tmp_path):
    """In the user's cache folder; the child's own environment names none."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": os.getcwd()}
    source = """
from dataclasses import dataclass
import jax
from e4t_jax.cli.run import Command, run

@dataclass(frozen=True)
class Config(Command):
    "A script that compiles something."

def main(config: Config) -> None:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8)))

run(main)
"""
    (tmp_path / "script.py").write_text(source)
    for flags, kept in ((["--no-cache"], False), ([], True)):
        subprocess.run([sys.executable, tmp_path / "script.py", *flags], env=environment, check=True, timeout=120)
        assert (tmp_path / "cache" / "e4t-jax" / "compiled").exists() == kept
