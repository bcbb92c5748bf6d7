"""The drawn world: pictures, captions, tokenizer and dataset say the same of every (identity, scene)."""

import pickle
import subprocess
import sys

import grain
import numpy as np
import pytest

from e4t_jax.creatures.learning.tokenizer import build_tokenizer
from e4t_jax.creatures.world.attributes import (
    CLASSES,
    CONTEXTS,
    STYLES,
    hue_word,
    of_class,
    sample_identities,
    sample_relatives,
    sample_scenes,
    take,
)
from e4t_jax.creatures.world.captions import CAPTION_LENGTH, PARTS, describe, sentence, vocabulary, write_captions
from e4t_jax.creatures.world.dataset import SPLITS, Creatures, CreaturesConfig, as_source, prepare
from e4t_jax.creatures.world.pictures import look_alikes
from e4t_jax.creatures.world.renderer import IMAGE_SIZE, render
from e4t_jax.errors import UserError

COUNT = 48


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def world():
    """Forty-eight creatures: identities, scenes, images, masks."""
    identities, scenes = sample_identities(0, COUNT), sample_scenes(0, COUNT)
    return identities, scenes, *render(identities, scenes)


def rows_of(record):
    return {tuple(row) for row in np.stack(list(record.values()), axis=1).tolist()}


@pytest.mark.compiles
def test_rendering_is_deterministic(world):
    identities, _, images, masks = world
    again_identities, again_scenes = sample_identities(0, COUNT), sample_scenes(0, COUNT)
    for name, value in identities.items():
        assert (value == again_identities[name]).all(), name
    again = render(again_identities, again_scenes)
    assert (again[0] == images).all() and (again[1] == masks).all()


@pytest.mark.compiles
def test_row_of_a_batch_is_the_single_picture(world):
    identities, scenes, images, masks = world
    for row in (0, 17, COUNT - 1):
        image, mask = render(take(identities, np.array([row])), take(scenes, np.array([row])))
        assert image.shape == (1, IMAGE_SIZE, IMAGE_SIZE, 3) and mask.shape == (1, IMAGE_SIZE, IMAGE_SIZE)
        # Another batch size is another compiled program: the last bit of a colour may round the other way.
        assert np.abs(image[0].astype(int) - images[row]).max() <= 1
        assert np.abs(mask[0].astype(int) - masks[row]).max() <= 1


def test_identity_and_scene_both_show(world):
    """Another identity in the same scene, and another context around the same creature, change the picture."""
    identities, scenes, images, _ = world
    rolled = {name: np.roll(value, 1) for name, value in identities.items()}
    others = render(rolled, scenes)[0]
    elsewhere = render(identities, {**scenes, "context": (scenes["context"] + 1) % len(CONTEXTS)})[0]
    for changed in (others, elsewhere):
        assert np.abs(changed.astype(int) - images).mean(axis=(1, 2, 3)).min() > 1


def test_masks_cover_the_creature_and_not_the_picture(world):
    *_, masks = world
    assert masks.dtype == np.uint8
    covered = (masks / 255.0).mean(axis=(1, 2))
    assert covered.min() >= 0.05 and covered.max() <= 0.6
    # Solid: nearly every pixel is inside or outside, only contours lie between.
    assert ((masks > 0) & (masks < 255)).mean() < 0.15


def test_splits_and_seeds_share_no_identity():
    drawn = [rows_of(sample_identities(seed, 200, split=split)) for split in SPLITS for seed in (0, 1, 2, 12345)]
    assert sum(map(len, drawn)) == len(set().union(*drawn)) == 200 * len(drawn)


def test_scene_keywords_fix_an_attribute():
    """A fixed attribute is as asked, the others are as without it; an unknown one is an error."""
    free = sample_scenes(3, 8)
    fixed = sample_scenes(3, 8, context=4, style=np.arange(8) % 4, **{"class": 2})
    assert (fixed["context"] == 4).all() and (fixed["class"] == 2).all()
    assert (fixed["style"] == np.arange(8) % 4).all()
    for name in set(free) - {"context", "style", "class"}:
        assert (fixed[name] == free[name]).all(), name
    assert all(value.dtype == np.float32 and value.shape == (8,) for value in fixed.values())
    with pytest.raises(KeyError, match="weather"):
        sample_scenes(3, 8, weather=1)


def test_tokenizer_keeps_every_word_whole(tokenizer):
    for word in vocabulary():
        ids = tokenizer(word).input_ids
        assert len(ids) == 3 and tokenizer.convert_ids_to_tokens(ids[1]) == word + "</w>", word
    strange = tokenizer("zyzzyva 42").input_ids
    assert tokenizer.unk_token_id not in strange[1:-1]


def caption_texts(tokenizer, captions):
    return [tokenizer.decode(row, skip_special_tokens=True) for row in captions.ids]


def test_captions_fit_and_name_no_identity(tokenizer):
    """Style, noun and context are the scene's; all else is words of the vocabulary, and nothing was cut off."""
    count = 400
    kinds = np.arange(count) % len(CLASSES)
    identities, scenes = sample_identities(5, count), sample_scenes(5, count, **{"class": kinds})
    captions = write_captions(tokenizer, identities, scenes, 5)
    assert captions.ids.shape == (count, CAPTION_LENGTH)
    texts = caption_texts(tokenizer, captions)
    np.testing.assert_array_equal(captions.ids, tokenizer(texts, padding="max_length", max_length=CAPTION_LENGTH).input_ids)
    known = {*vocabulary(), "-"}
    for row, text in enumerate(texts):
        style, context = int(scenes["style"][row]), int(scenes["context"][row])
        assert text.startswith(list(STYLES.values())[style]), text
        assert text.endswith(list(CONTEXTS.values())[context]), text
        assert set(text.replace("-", " ").split()) <= known, text
        noun = tokenizer.convert_ids_to_tokens(int(captions.ids[row, captions.noun[row]]))
        assert noun == CLASSES[kinds[row]] + "</w>"


def test_longest_caption_fits(tokenizer):
    """Six adjectives of three tokens each are the most that a caption can hold."""
    adjectives = ["emerald-trimmed", "antennae-eared", "one-eyed", "crimson-spotted", "bunny-eared", "cat-eared"]
    longest = sentence(list(STYLES).index("sketch"), "creature", list(CONTEXTS).index("snow"), adjectives)
    assert len(tokenizer(longest).input_ids) <= CAPTION_LENGTH


def test_spelled_out_captions_have_no_parts_and_compounds_have(tokenizer):
    """Each blend of hues weighs 1, a shade its strength, every other part 1; most compounds carry all parts."""
    count = 300
    identities, scenes = sample_identities(6, count), sample_scenes(6, count)
    assert (write_captions(tokenizer, identities, scenes, 6, compounds=0).weights == 0).all()
    captions = write_captions(tokenizer, identities, scenes, 6, compounds=1)
    assert captions.weights.shape == (count, PARTS)
    assert captions.weights.min() >= 0 and captions.weights.max() <= 1
    flags = identities["cheeks"] + identities["feet"] + identities["tail"]
    # hues of body and trim, shape, eyes, ears, pattern, mouth and hat: eight parts of weight 1
    everything = 8 + np.abs(identities["lightness"]) + flags
    total = captions.weights.sum(axis=1)
    assert (total <= everything + 1e-4).all()
    assert (np.abs(total - everything) < 1e-4).mean() > 0.6


def test_description_weighs_hues_by_their_distance():
    identities = sample_identities(7, 100)
    adjectives, parts, weights = describe(identities)
    np.testing.assert_allclose(weights[:, :2].sum(axis=1), 1, atol=1e-6)
    # The caption's word is the blend's heavier part.
    heavier = np.take_along_axis(parts, np.argmax(weights[:, :2], axis=1)[:, None], axis=1)[:, 0]
    assert heavier.tolist() == adjectives[:, 0].tolist()
    np.testing.assert_array_equal(weights[:, 2], np.abs(identities["lightness"]))
    assert set(hue_word(identities["body_hue"])) == set(range(8))


def test_articles():
    snow, space = list(CONTEXTS).index("snow"), list(CONTEXTS).index("space")
    assert sentence(0, "creature", snow, []) == "a photo of a creature in the snow"
    assert sentence(1, "creature", space, ["orange"]) == "a cartoon of an orange creature in space"
    assert sentence(0, "creature", snow, ["one-eyed"]) == "a photo of a one-eyed creature in the snow"
    assert sentence(3, "*s", snow, [], named=True) == "a pencil sketch of *s in the snow"


_BUILD = """
import sys
from e4t_jax.creatures.world.dataset import CreaturesConfig, as_source
source = as_source("train", sys.argv[1], CreaturesConfig(seed=9, train=3, validation=3, test=3))
assert source[2]["image"].shape == (32, 32, 3)
print("tensorflow" in sys.modules)
"""


@pytest.mark.compiles
def test_dataset_reads_back_as_drawn_without_tensorflow(tmp_path):
    """Built by another process that never imports TensorFlow; found, not rebuilt, by this one."""
    built = subprocess.run([sys.executable, "-c", _BUILD, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    assert built.stdout.split()[-1] == "False"
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record*")}
    assert len(files) == len(SPLITS)
    config = CreaturesConfig(seed=9, train=3, validation=3, test=3)
    for split in SPLITS:
        source = as_source(split, tmp_path, config)
        scenes = sample_scenes(9, 3, split=split)
        images, masks = render(sample_identities(9, 3, split=split), scenes)
        assert len(source) == 3
        for row in range(3):
            example = source[row]
            assert example["identity"] == row
            assert (example["image"] == images[row]).all() and (example["mask"][..., 0] == masks[row]).all()
            style, context = int(scenes["style"][row]), int(scenes["context"][row])
            assert (example["style"], example["context"]) == (style, context)
            text = f"{list(STYLES.values())[style]} of *s {list(CONTEXTS.values())[context]}"
            assert example["caption"].decode() == text
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record*")}
    batch = grain.MapDataset.source(source).shuffle(seed=0).batch(3)[0]
    assert batch["image"].shape == (3, IMAGE_SIZE, IMAGE_SIZE, 3) and sorted(batch["identity"]) == [0, 1, 2]


@pytest.mark.compiles
@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_ask_at_once_share_one_dataset(tmp_path, locks):
    """One draws it and the others wait, or, on a file system without locks, take what the first one moved to its place."""
    unlocked = "import e4t_jax.storage\ne4t_jax.storage.fcntl = None\n"
    command = [sys.executable, "-c", ("" if locks else unlocked) + _BUILD, str(tmp_path / "data")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert said.split()[-1] == "False"
    assert len(list(tmp_path.rglob("*.array_record*"))) == len(SPLITS)
    assert not list(tmp_path.rglob("*incomplete*"))


def test_the_default_dataset_is_the_same_however_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(Creatures, "download_and_prepare", lambda self: None)
    asked, default = prepare(tmp_path, CreaturesConfig()), prepare(tmp_path)
    assert asked.builder_config == default.builder_config and asked.data_dir == default.data_dir


@pytest.mark.parametrize("kind", ["creature", "fish"])
def test_workers_of_their_own_read_the_same_dataset(tmp_path, monkeypatch, kind):
    """What is read in other processes goes there by pickling."""
    monkeypatch.setattr(Creatures, "download_and_prepare", lambda self: None)
    here = prepare(tmp_path, CreaturesConfig(kind=kind))
    there = pickle.loads(pickle.dumps(here))
    assert there.builder_config == here.builder_config and there.data_dir == here.data_dir


def test_dataset_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="choose train, validation, test"):
        as_source("dev", tmp_path)
    with pytest.raises(UserError, match="at least one"):
        CreaturesConfig(train=0)
    with pytest.raises(UserError, match="choose creature, house, fish, tree"):
        CreaturesConfig(kind="boat")


@pytest.mark.compiles
def test_the_second_domain_shows_fish(tmp_path):
    """Row i is identity i as a fish, under the caption that its creature has; the two lie side by side."""
    sizes = {"seed": 9, "train": 2, "validation": 2, "test": 2}
    fish = as_source("test", tmp_path, CreaturesConfig(**sizes, kind="fish"))
    creatures = as_source("test", tmp_path, CreaturesConfig(**sizes))
    images, masks = render(sample_identities(9, 2, split="test"), sample_scenes(9, 2, split="test", **of_class("fish")))
    for row in range(2):
        assert (fish[row]["image"] == images[row]).all() and (fish[row]["mask"][..., 0] == masks[row]).all()
        assert (creatures[row]["image"] != images[row]).any() and creatures[row]["caption"] == fish[row]["caption"]


@pytest.mark.compiles
def test_captions_of_fish_say_what_shows(tokenizer):
    """An attribute is spoken of where it changes the picture of a fish, and nowhere else."""
    count = 300
    identities, scenes = sample_identities(3, count), sample_scenes(3, count, **of_class("fish"))
    weights = write_captions(tokenizer, identities, scenes, 3, compounds=1).weights
    everything = write_captions(tokenizer, identities, sample_scenes(3, count), 3, compounds=1).weights
    parts = {"shape": 3, "eyes": 4, "ears": 5, "pattern": 8, "mouth": 9, "hat": 10, "cheeks": 11, "feet": 12, "tail": 13}
    pictures = render(identities, scenes)[0].astype(int)
    for name, part in parts.items():
        others = identities | {name: np.roll(identities[name], 1)}
        assert (pictures != render(others, scenes)[0]).any() == weights[:, part].any(), name
        assert everything[:, part].any(), name


def test_look_alikes_differ_in_who_they_show_alone():
    """Three batches in four are relatives of one class, context and style; batch k is the same wherever a run begins."""
    for step in range(8):
        identities, scenes = look_alikes(5, step, 16)
        kinds = {tuple(scenes[name][row] for name in ("class", "context", "style")) for row in range(16)}
        assert (len(kinds) == 1) == (step % 4 != 3)
        rows = {tuple(value[row] for value in identities.values()) for row in range(16)}
        assert len(rows) == 16
    again, _ = look_alikes(5, 7, 16)
    np.testing.assert_array_equal(again["lightness"], identities["lightness"])


def test_relatives_share_about_half_of_their_attributes_and_keep_their_trim_visible():
    families = [sample_relatives(seed, 32) for seed in range(40)]
    shared = np.mean([[np.ptp(value) == 0 for name, value in family.items() if name != "trim_hue"] for family in families])
    assert 0.4 < shared < 0.6
    for family in families:
        apart = np.abs((family["trim_hue"] - family["body_hue"] + 0.5) % 1.0 - 0.5)
        assert apart.min() > 0.12
