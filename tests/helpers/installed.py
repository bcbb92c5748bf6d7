"""Run by the Python of a fresh environment with the wheel in it: what a user gets, used from an empty folder (`make wheel`)."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    files = importlib.metadata.files("e4t-jax") or []
    tops = {Path(str(file)).parts[0] for file in files}
    assert {top for top in tops if not top.endswith(".dist-info") and top != ".."} == {"e4t_jax"}, tops
    command = Path(sys.executable).with_name("e4t")
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": "", "XDG_CACHE_HOME": folder}

        def call(*arguments: str) -> str:
            done = subprocess.run([command, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert "tune" in call("--help") and importlib.metadata.version("e4t-jax") in call("--version")
        picture = (
            "from e4t_jax.creatures.judging.personalisation_trial import held_out; from PIL import Image; "
            "Image.fromarray(held_out(0, 1, split='validation').pictures[0]).save('venus.png')"
        )
        subprocess.run([sys.executable, "-c", picture], cwd=folder, env=environment, check=True)
        print(call("tune", "--images", "venus.png", "--out", "concepts"), end="")
        scene = ("--prompts", "a photo of *s in the snow", "--steps", "10")
        print(call("generate", "--concepts", "concepts/venus.safetensors", *scene, "--out", "pictures"), end="")
        assert {path.name for path in Path(folder, "pictures").iterdir()} == {"venus_0.png", "grid.png", "generate.json"}


main()
