"""Output that nobody reads, or that cannot be written."""

import os
import subprocess
import sys

import pytest


def run_with(output, *words, buffered=True, **options):
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "e4t_jax.cli", *words]
    return subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, env=environment, timeout=120, **options)


@pytest.mark.parametrize("words", [("--help",), ("tune", "--help"), ("--version",)])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_left_ends_a_command_without_a_word(words, buffered):
    """`e4t --help | head -3`; the status is what a shell says of a program that SIGPIPE ended."""
    unread, written = os.pipe()
    os.close(unread)
    try:
        done = run_with(written, *words, buffered=buffered)
    finally:
        os.close(written)
    assert (done.stderr, done.returncode) == ("", 141)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
@pytest.mark.parametrize("words", [("--help",), ("tune", "--help")])
def test_output_that_cannot_be_written_is_one_line(words):
    with open("/dev/full", "w") as full:
        done = run_with(full, *words)
    assert done.returncode == 1
    assert done.stderr == "Error: the output cannot be written (No space left on device); check where it goes.\n"


def test_a_command_whose_output_is_closed_goes_on():
    done = run_with(None, "--help", preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "")


def test_another_broken_pipe_is_no_reader_that_left(monkeypatch):
    """A worker's that died, say: it is told."""
    import dataclasses

    from e4t_jax.cli.run import Command, run

    @dataclasses.dataclass(frozen=True)
    class Config(Command):
        """A script."""

    def main(config: Config) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(main.__annotations__, "config", Config)
    with pytest.raises(SystemExit, match="Error: Broken pipe"):
        run(main, [])
