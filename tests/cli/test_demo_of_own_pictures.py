"""`e4t demo --images`: a grid for each picture in any domain, and one line for what is wrong before work begins."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hub_cache import write_hub_cache, write_photograph
from PIL import Image
from public_checkpoints import HAS_TORCH
from sandbox import call, make_world, nothing_compiled

from e4t_jax.evaluation.own_pictures import DrawnSteps, step_grid
from e4t_jax.templates import SCENES, SHOWCASE


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with nothing_compiled():
        yield make_world(folder)


def test_every_picture_gets_a_grid_its_concepts_and_its_pictures(world, tmp_path):
    out = tmp_path / "out"
    images = [world.pictures / "0.png", world.pictures / "1.png"]
    outcome = call("demo", ["--domain", world.domain, "--images", *images, "--out", out])
    assert outcome.status == 0, outcome
    drawn = {f"{name}_{steps}_{prompt}.png" for name in "01" for steps in (0, 5, 15) for prompt in range(4)}
    concepts = {f"{name}_{steps}.safetensors" for name in "01" for steps in (0, 5, 15)}
    assert {path.name for path in out.iterdir()} == drawn | concepts | {"0_grid.png", "1_grid.png"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--domain", "{domain}"], "--images: there is none, and only creatures has examples of its own; give pictures"),
        (["--domain", "faces"], "--images: there is none, and only creatures"),
        (["--domain", "faces", "--images", "{pictures}/9.png"], "9.png does not exist"),
        (["--domain", "faces", "--images", "{notes}"], "notes.txt is not a picture"),
    ],
)
def test_a_mistake_is_told_before_anything_is_fetched(world, tmp_path, arguments, said):
    places = {"domain": world.domain, "pictures": world.pictures, "notes": world.base.parent / "notes.txt"}
    outcome = call("demo", [one.format(**places) for one in arguments] + ["--out", tmp_path / "out"])
    assert outcome.is_one_line and said in outcome.said, outcome
    assert not (tmp_path / "out").exists()


def test_the_grid_shows_given_and_drawn_in_rows_of_prompts():
    """Each picture in its place, of a colour of its own; small ones magnified to whole pixels, large ones shrunk."""
    for side, tile in ((32, 256), (100, 200), (512, 256)):
        greys = {steps: [10 + 40 * steps + 9 * row for row in range(4)] for steps in (0, 1, 2)}
        drawn = {steps: np.stack([np.full((side, side, 3), one, np.uint8) for one in own]) for steps, own in greys.items()}
        given = np.full((side, side, 3), 200, np.uint8)
        grid = step_grid(DrawnSteps(given, {}, drawn), SHOWCASE["face"], "me")
        step = tile + 4
        left, top = grid.shape[1] - 4 * step, grid.shape[0] - 4 * step  # texts stand before and above
        for prompt in range(4):
            seen = [grid[top + prompt * step + tile // 2, left + place * step + tile // 2, 0] for place in range(4)]
            assert seen == [200, *(own[prompt] for own in greys.values())]
        assert min(left, top) > 40 and (grid[:top] < 200).any() and (grid[:, : left - 4] < 200).any()


def test_every_kind_of_domain_has_its_prompts():
    assert set(SHOWCASE) == set(SCENES)
    assert all(prompt.count("*s") == 1 for prompts in SHOWCASE.values() for prompt in prompts)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TORCH, reason="PyTorch's classes write what is read here")
def test_a_face_from_the_hubs_cache_alone(tmp_path):
    """`e4t demo --domain faces --images p.jpg`, offline, with no word about a base: a grid whose pictures are no copies."""
    write_hub_cache(tmp_path / "home")
    picture = write_photograph(tmp_path / "p.jpg")
    environment = {"HF_HOME": tmp_path / "home", "XDG_CACHE_HOME": tmp_path / "cache"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "e4t_jax.cli", "demo", "--domain", "faces", "--images", picture, "--sampling-steps", "4"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out" / "p_grid.png") as grid:
        assert grid.width > 4 * 256 and grid.height > 4 * 256
    drawn = [np.asarray(Image.open(tmp_path / "out" / f"p_{steps}_0.png"), np.int16) for steps in (0, 5, 15)]
    assert all(np.abs(one - other).max() > 0 for one, other in itertools.pairwise(drawn))
    assert drawn[0].shape == (64, 64, 3) and drawn[0].std() > 1
