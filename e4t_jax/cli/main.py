"""`e4t COMMAND …`: every command of this package under one name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches

from e4t_jax.cli.streams import ends_with_its_reader

# Command -> (module in this folder, what it does).
COMMANDS = {
    "tune": ("tune", "personalise a domain from pictures: one concept a picture, in five steps"),
    "generate": ("generate", "draw concepts in new scenes"),
    "export": ("export", "write a concept for diffusers, ComfyUI, A1111 and others"),
    "evaluate": ("evaluate", "measure personalisation on held-out identities of the embedded world"),
    "demo": ("demo", "the whole method in one go: look at the grid it draws"),
    "pretrain": ("pretrain", "pretrain a domain: encoder and weight offsets on a frozen base model"),
    "cache": ("cache", "encode pictures once, for pretraining without VAE and CLIP"),
    "aot": ("aot", "compile the step of pretraining for TPUs that are not there: its memory and traffic"),
    "export-domain": ("export_domain", "write a domain as a checkpoint of the public PyTorch implementation"),
    "import-reference": ("import_reference", "read a checkpoint of the public PyTorch implementation"),
    "train-base": ("base", "train the embedded world's base model from scratch"),
    "train-judges": ("judges", "train the embedded world's judges"),
}


@ends_with_its_reader()
def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command's name and hands the rest on."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return
    name = words[0]
    if name == "--version":
        from e4t_jax import __version__

        print(__version__)
        return
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, 1)
        nearest = f"the nearest is {near[0]}; " if near else ""
        sys.exit(f"Error: {name!r} is no command; {nearest}choose one of {', '.join(COMMANDS)}.")
    # On demand: importing JAX takes seconds, which a list of commands should not.
    from importlib import import_module

    from e4t_jax.cli.run import run

    run(import_module(f"e4t_jax.cli.{COMMANDS[name][0]}").main, words[1:], f"e4t {name}")


def usage() -> str:
    """What `e4t --help` says."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    head = ["usage: e4t COMMAND [OPTIONS]", "", "Personalise a text-to-image model from one picture.", ""]
    return "\n".join([*head, *lines, "", "e4t COMMAND --help tells more."])
