"""The command lines: every script explains itself, and a user's mistake is one line and a non-zero exit."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

SCRIPTS = ("train.base", "train.judges", "train.pretrain", "train.tune", "infer.generate", "infer.evaluate", "infer.demo")


def call(*arguments):
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_option(script):
    done = call(script, "--help")
    assert done.returncode == 0
    assert "--out" in done.stdout and "--seed" in done.stdout


def test_tune_and_generate_on_a_saved_domain(domain, tmp_path, monkeypatch):
    """The main path on a tiny domain, run twice: the same seed gives the same files."""
    from pathlib import Path

    from e4t_jax import backbone
    from e4t_jax.domain import Domain, save_domain
    from infer import generate
    from train import tune

    backbone.save_base(tmp_path / "base", domain.base, domain.params)
    base, params = backbone.load_base(tmp_path / "base")
    save_domain(
        tmp_path / "domain", Domain(str(tmp_path / "base"), "creature", base, params, domain.encoder, domain.factors, domain.scale)
    )
    pixels = np.random.default_rng(0).integers(0, 255, (2, 40, 32, 3), np.uint8)
    pictures = [tmp_path / "venus.png", tmp_path / "ada.png"]
    for path, picture in zip(pictures, pixels, strict=True):
        Image.fromarray(picture).save(path)
    written = []
    for turn in ("first", "second"):
        out = tmp_path / turn
        tune.main(tune.Config(tuple(pictures), out / "concepts", domain=str(tmp_path / "domain"), steps=2))
        files = tuple(out / "concepts" / f"{name}.safetensors" for name in ("venus", "ada"))
        prompts = ("a photo of *s", "*s in the snow")
        generate.main(generate.Config(files, prompts, out / "pictures", domain=str(tmp_path / "domain"), steps=2))
        names = sorted(path for path in Path(out).rglob("*") if path.suffix in (".png", ".safetensors"))
        written.append({path.relative_to(out): path.read_bytes() for path in names})
    assert len(written[0]) == 2 + 4 + 1
    assert written[0] == written[1]


def test_pretrain_writes_a_domain_and_resumes(domain, tmp_path):
    """Main path on a folder of pictures: written, read back; a run stopped halfway ends where an unbroken one does."""
    from e4t_jax import backbone
    from e4t_jax.domain import load_domain
    from train import pretrain

    backbone.save_base(tmp_path / "base", domain.base, domain.params)
    (tmp_path / "pictures").mkdir()
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
    common = {"base": str(tmp_path / "base"), "data": f"folder:{tmp_path / 'pictures'}", "batch_size": 2, "template": "neutral"}
    for name in ("jit", "pmap"):
        pretrain.main(pretrain.Config(tmp_path / name, work=tmp_path / f"work_{name}", steps=2, parallel=name, **common))
    written = load_domain(tmp_path / "jit")
    assert written.domain_token == "creature" and written.template == "neutral"
    assert (tmp_path / "jit" / "encoder.safetensors").read_bytes() != (tmp_path / "pmap" / "encoder.safetensors").read_bytes()
    again = pretrain.Config(tmp_path / "again", work=tmp_path / "work_jit", steps=2, resume=True, **common)
    pretrain.main(again)
    assert (tmp_path / "again" / "encoder.safetensors").read_bytes() == (tmp_path / "jit" / "encoder.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train.tune", "--images", "a.png", "--out", "{}/o", "--domain", "{}/nowhere"), "nowhere"),
        (("train.tune", "--images", "x/a.png", "y/a.png", "--out", "{}/o"), "--images holds two files of one name"),
        (("train.tune", "--images", "a.png", "--out", "/proc/o"), "Cannot write /proc/o"),
        (("train.pretrain", "--base", "{}/nowhere", "--out", "{}/o"), "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_a_status(arguments, said, tmp_path):
    done = call(*(argument.format(tmp_path) for argument in arguments))
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
