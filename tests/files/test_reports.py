"""What was done is said beside the results: settings as used, captions read off pictures, which file shows what."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from e4t_jax.concept import Concept
from e4t_jax.data.grids import picture_grid
from e4t_jax.data.images import encode_png, read_image
from e4t_jax.files.concept_files import load_concept
from e4t_jax.files.domain_files import load_domain
from e4t_jax.files.reports import given_picture
from e4t_jax.files.resumable import draw_to_files, tune_to_files
from e4t_jax.sample import SampleSettings
from e4t_jax.templates import SCENES, heaviest_captions, scene_captions
from e4t_jax.testing import write_tiny_world
from e4t_jax.tuning.tune import TuneSettings

PROMPTS = ("a photo of *s", "*s im Gebüsch, 夜", "*s in the snow")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two pictures tuned without a caption and drawn in three prompts, by the commands."""
    from e4t_jax.cli import generate, tune

    folder = tmp_path_factory.mktemp("run")
    world = write_tiny_world(folder / "world")
    pictures = tuple(sorted(world.pictures.iterdir())[:2])
    Image.fromarray(np.full((16, 16), 255, np.uint8)).save(world.pictures / "0.mask.png")
    tune.main(tune.Config(pictures, folder / "tuned", domain=str(world.domain), tuning=TuneSettings(steps=1, seed=3)))
    concepts = tuple(sorted((folder / "tuned").glob("*.safetensors")))
    drawing = SampleSettings(seed=5, steps=2)
    generate.main(generate.Config(concepts, PROMPTS, folder / "drawn", domain=str(world.domain), drawing=drawing))
    return folder, world, load_domain(world.domain)


@pytest.mark.compiles
def test_tune_json_says_what_was_used_and_which_captions_were_read_off(run):
    folder, world, domain = run
    report = json.loads((folder / "tuned" / "tune.json").read_text())
    recipe = TuneSettings(steps=1).recipe_of(domain.regularisation)
    assert report["learning_rate"] == recipe.learning_rate and report["word_rate"] == recipe.word_rate
    assert report["regularisation"] == domain.regularisation
    assert (report["scope"], report["steps"], report["seed"], report["batch_size"]) == ("compact", 1, 3, 16)
    assert None not in report.values()
    known = {caption for row in scene_captions(domain.template) for caption in row}
    assert set(report["captions"]) == {"0", "1"}
    for name, weights in report["captions"].items():
        captions, shares = [one["caption"] for one in weights], [one["weight"] for one in weights]
        assert set(captions) <= known and report["caption"][name] == captions[0] and 1 <= len(captions) <= 8
        assert shares == sorted(shares, reverse=True) and 0.1 < sum(shares) < 1.01
    assert report["pictures"] == {name: str(world.pictures / f"{name}.png") for name in ("0", "1")}


def test_the_heaviest_captions_come_first_by_their_own_weights():
    media, places = SCENES["creature"]
    weights = np.random.default_rng(0).dirichlet(np.full(40, 0.1)).reshape(4, 10)
    said = heaviest_captions("creature", weights, most=5)
    largest = sorted(np.ndindex(4, 10), key=lambda at: -weights[at])[:5]
    kept = [(f"{media[m]} of *s {places[p]}", round(weights[m, p], 3)) for m, p in largest if weights[m, p] >= 0.005]
    assert [(one["caption"], one["weight"]) for one in said] == kept and len(kept) > 1


@pytest.mark.compiles
def test_a_concepts_header_says_steps_seed_and_captions(run, tmp_path):
    folder, world, domain = run
    tuning = load_concept(folder / "tuned" / "0.safetensors").tuning
    assert (tuning["steps"], tuning["seed"], tuning["caption"]) == (1, 3, None)
    report = json.loads((folder / "tuned" / "tune.json").read_text())
    assert tuning["captions"] == report["captions"]["0"] and tuning["learning_rate"] == report["learning_rate"]
    none, picture = TuneSettings(steps=0), [world.pictures / "0.png"]
    given = tune_to_files(domain, picture, tmp_path, none, caption="*s in the snow")
    assert given.captions == {"0": [{"caption": "*s in the snow", "weight": 1.0}]}
    again = tune_to_files(domain, picture, tmp_path, none, caption="*s in the snow", resume=True)
    assert again.captions == given.captions
    assert tune_to_files(domain, [world.pictures / "1.png"], tmp_path, none).captions == {"1": []}


@pytest.mark.compiles
def test_generate_json_and_the_pictures_say_which_is_which(run):
    folder, world, domain = run
    report = json.loads((folder / "drawn" / "generate.json").read_text())
    used = {"seed": 5, "steps": 2, "guidance": domain.guidance, "sampling": "ddim"}
    assert {name: report[name] for name in used} == used
    assert report["prompts"] == list(PROMPTS) and report["domain"] == str(world.domain) and report["failed"] == {}
    assert report["concepts"] == {name: str(folder / "tuned" / f"{name}.safetensors") for name in ("0", "1")}
    assert len(report["pictures"]) == 6
    for name, shown in report["pictures"].items():
        assert shown == {"concept": name[0], "prompt": PROMPTS[int(re.fullmatch(r"._(\d)\.png", name)[1])]}
        with Image.open(folder / "drawn" / name) as picture:
            texts = picture.text
        assert (texts["prompt"], texts["concept"], texts["seed"]) == (shown["prompt"], shown["concept"], "5")
        assert texts["Title"] == shown["prompt"] and texts["guidance"] == str(domain.guidance)


@pytest.mark.compiles
def test_the_grid_shows_the_pictures_given_before_those_drawn(run):
    """Magnified to 160 pixels; the first column after the labels is what tuning saw, by its checksum."""
    folder, world, _ = run
    grid = np.asarray(Image.open(folder / "drawn" / "grid.png"))
    left = grid.shape[1] - 4 * 164 - 4
    assert 0 < left < 100 and grid.shape[0] > 2 * 164 + 20
    for row, name in enumerate("01"):
        y = grid.shape[0] - 4 - (2 - row) * 164 + 4
        tiles = [grid[y : y + 160, left + 4 + 164 * column :][:, :160] for column in range(4)]
        given = np.round((read_image(world.pictures / f"{name}.png", 16)[0] + 1) * 127.5)
        np.testing.assert_array_equal(tiles[0][5::10, 5::10], given)
        for column in range(3):
            drawn = np.asarray(Image.open(folder / "drawn" / f"{name}_{column}.png"))
            np.testing.assert_array_equal(tiles[column + 1][5::10, 5::10], drawn)


@pytest.mark.compiles
def test_another_picture_in_its_place_is_not_shown_as_the_one_given(run, tmp_path):
    folder, world, _ = run
    concept = folder / "tuned" / "1.safetensors"
    assert given_picture(concept, 16) is not None
    report = json.loads((folder / "tuned" / "tune.json").read_text())
    (tmp_path / "1.safetensors").write_bytes(concept.read_bytes())
    assert given_picture(tmp_path / "1.safetensors", 16) is None
    for path in (world.pictures / "2.png", tmp_path / "nowhere.png"):
        (tmp_path / "tune.json").write_text(json.dumps({**report, "pictures": {"1": str(path)}}))
        assert given_picture(tmp_path / "1.safetensors", 16) is None
    for spoiled in ("", "[]", '{"pictures": 3}', '{"pictures": {"1": 3}}'):
        (tmp_path / "tune.json").write_text(spoiled)
        assert given_picture(tmp_path / "1.safetensors", 16) is None


def test_titles_take_the_lines_they_need_and_labels_the_width():
    tile = np.zeros((8, 8, 3), np.uint8)
    long = "a photo of *s in the snow on the top of a mountain far away from the city at night under the stars " * 3
    grid = picture_grid([[tile, None]] * 2, titles=[long, "x" * 400], labels=["venus", "y" * 400], side=160)
    assert grid.shape[0] == 2 * 164 + 4 + 4 + 6 * 16
    left = grid.shape[1] - 2 * 164 - 4
    assert 100 < left <= 144
    assert (grid[-100, left + 100] == 0).all() and (grid[-100, left + 264] == 255).all()


def test_a_prompt_of_any_letters_is_kept_in_a_picture(tmp_path):
    prompt = "*s in Malmö 夜 \udc80"
    (tmp_path / "a.png").write_bytes(encode_png(np.zeros((2, 2, 3), np.uint8), texts={"prompt": prompt}))
    assert Image.open(tmp_path / "a.png").text["prompt"] == "*s in Malmö 夜 \\udc80"


def test_a_concept_of_an_older_file_says_nothing_of_its_tuning():
    assert Concept("venus", "compact", "", None, np.zeros(1)).tuning is None


def test_the_evaluations_report_names_the_guidance_that_was_used(domain):
    from e4t_jax.files.reports import drawing_settings

    assert drawing_settings(domain, SampleSettings())["guidance"] == domain.guidance == 7.5
    assert drawing_settings(domain, SampleSettings(guidance=0.0, sampling="euler"))["guidance"] == 0.0


def test_drawing_to_files_still_finds_what_it_drew(run, tmp_path):
    folder, _, domain = run
    concepts = sorted((folder / "tuned").glob("*.safetensors"))
    again = draw_to_files(domain, concepts, PROMPTS, folder / "drawn", SampleSettings(seed=5, steps=2), resume=True)
    assert again.drawn == 0
