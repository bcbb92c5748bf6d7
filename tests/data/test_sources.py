"""Pictures for pretraining: every source gives the same kind of row, and batch k is batch k after a restart too."""

import numpy as np
import pytest
from PIL import Image

from e4t_jax import registry
from e4t_jax.data.batches import training_batches
from e4t_jax.data.sources import Broken, Split, open_pictures
from e4t_jax.errors import UserError

SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven pictures of different sizes, one with a mask beside it, and a file that is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    generator = np.random.default_rng(0)
    for index in range(7):
        pixels = generator.integers(0, 255, (20 + index, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if index > 4 else "") / f"{index}.png")
    half = np.zeros((20, 30), np.uint8)
    half[:, :15] = 255
    Image.fromarray(half).save(folder / "0.mask.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def fake_tokenize(prompts):
    """The length of each prompt as its only token."""
    ids = np.array([[len(prompt)] for prompt in prompts], np.int32)
    return ids, ids > 0


def read(pictures, count, first=0, **options):
    batches = training_batches(
        pictures, fake_tokenize, ["*s", "a photo of *s"], batch_size=3, seed=5, first=first, last=first + count, **options
    )
    return [next(batches) for _ in range(count)]


def test_folder_rows_are_square_pictures_with_masks(folder, tmp_path):
    pictures = open_pictures(f"folder:{folder}", SIZE, tmp_path)
    assert len(pictures) == 7
    rows = [pictures[index] for index in range(7)]
    assert all(row["image"].shape == (SIZE, SIZE, 3) and row["image"].dtype == np.float32 for row in rows)
    assert all(np.abs(row["image"]).max() <= 1 for row in rows)
    # The square is cropped around what the mask leaves: three columns in four of it.
    assert rows[0]["mask"].mean() == pytest.approx(0.75, abs=0.02) and all((row["mask"] == 1).all() for row in rows[1:])


def test_batches_go_on_where_a_run_stopped(folder, tmp_path):
    pictures = open_pictures(f"folder:{folder}", SIZE, tmp_path)
    whole, rest = read(pictures, 6), read(pictures, 2, first=4)
    for old, new in zip(whole[4:], rest, strict=True):
        for name in old:
            np.testing.assert_array_equal(old[name], new[name])
    assert any((whole[0]["image"] != batch["image"]).any() for batch in whole[1:])
    assert {int(one) for batch in whole for one in batch["ids"].ravel()} == {len("*s"), len("a photo of *s")}


def test_the_shares_of_all_processes_are_the_batch(folder, tmp_path):
    """Whatever their number, from any batch on; and nothing that does not divide."""
    pictures = open_pictures(f"folder:{folder}", SIZE, tmp_path)
    whole = read(pictures, 4)
    shares = [read(pictures, 2, first=2, share=(which, 3)) for which in range(3)]
    for index in range(2):
        for name, rows in whole[2 + index].items():
            np.testing.assert_array_equal(np.concatenate([share[index][name] for share in shares]), rows)
    with pytest.raises(UserError, match="batch_size: 3 does not divide by 2 processes; choose a multiple of 2"):
        read(pictures, 1, share=(0, 2))


def test_batches_of_one_picture_are_batches(folder, tmp_path):
    """People do ask for them; every picture comes once before any comes again."""
    pictures = open_pictures(f"folder:{folder}", SIZE, tmp_path)
    batches = list(training_batches(pictures, fake_tokenize, ["*s"], batch_size=1, seed=0, last=len(pictures)))
    assert [batch["image"].shape for batch in batches] == [(1, SIZE, SIZE, 3)] * len(pictures)
    assert len({batch["image"].tobytes() for batch in batches}) == len({row["image"].tobytes() for row in pictures})


def test_a_batch_larger_than_the_data_is_a_mistake(folder, tmp_path):
    with pytest.raises(UserError, match="batch_size: 9 is more than the 7 pictures"):
        training_batches(open_pictures(f"folder:{folder}", SIZE, tmp_path), fake_tokenize, ["*s"], batch_size=9, seed=0, last=1)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("photos", "data: 'photos' is unknown"),
        ("folder:", "is unknown"),
        ("folder:/nowhere/at/all", "is no folder"),
        ("tfds:no_such_data_set", "tfds:no_such_data_set is not prepared in"),
    ],
)
def test_mistakes_name_the_flag(spec, said, tmp_path):
    with pytest.raises(UserError, match=said):
        open_pictures(spec, SIZE, tmp_path)


def test_an_empty_folder_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="holds no picture"):
        open_pictures(f"folder:{tmp_path}", SIZE, tmp_path)


@pytest.fixture
def spoiled(folder, tmp_path):
    """The same pictures, two of them broken: one empty, one cut off."""
    for path in folder.rglob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:200])
    return tmp_path


def test_broken_pictures_are_skipped_said_once_and_counted(spoiled):
    """The next sound one is in their place; however many processes read, the batches are the same."""
    said = []
    broken = Broken(said.append)
    pictures = open_pictures(f"folder:{spoiled}", SIZE, spoiled, broken)
    rows = [pictures[index]["image"] for index in range(7)]
    np.testing.assert_array_equal(rows[3], rows[5])
    np.testing.assert_array_equal(rows[4], rows[5])
    one, many = read(pictures, 7, broken=broken), read(pictures, 7, workers=2, broken=broken)
    for batch, other in zip(one, many, strict=True):
        np.testing.assert_array_equal(batch["image"], other["image"])
    assert len(said) == 2 and all(f"{name}.png" in line for name, line in zip((3, 4), sorted(said), strict=True))
    assert broken.rows == {3, 4}


def test_a_folder_of_broken_pictures_alone_is_one_line(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.png").write_text("no picture")
    with pytest.raises(UserError, match="holds no picture that can be read"):
        open_pictures(f"folder:{tmp_path}", SIZE, tmp_path, Broken(lambda line: None))[0]


def test_what_is_held_out_is_in_no_batch(folder, tmp_path):
    """Of seven pictures three, evenly spread; the two parts are the whole, with the rows of each as they were."""
    whole = open_pictures(f"folder:{folder}", SIZE, tmp_path)
    parts = [open_pictures(f"folder:{folder}", SIZE, tmp_path, split=Split(3, validation)) for validation in (True, False)]
    assert [len(part) for part in parts] == [3, 4]
    for part, rows in zip(parts, ([0, 2, 4], [1, 3, 5, 6]), strict=True):
        for index, row in enumerate(rows):
            np.testing.assert_array_equal(part[index]["image"], whole[row]["image"])
    with pytest.raises(UserError, match="held_out: 7 of the 7 pictures of the data leave none to learn from; lower it"):
        open_pictures(f"folder:{folder}", SIZE, tmp_path, split=Split(7, False))


def test_a_broken_picture_is_replaced_by_one_of_its_own_part(spoiled):
    """Picture 4 is broken and held out: the next of those held out is in its place; 3 is broken, and 5 learned from."""
    whole = open_pictures(f"folder:{spoiled}", SIZE, spoiled)
    held, learned = (open_pictures(f"folder:{spoiled}", SIZE, spoiled, split=Split(3, validation)) for validation in (True, False))
    np.testing.assert_array_equal(held[2]["image"], whole[0]["image"])
    np.testing.assert_array_equal(learned[1]["image"], whole[5]["image"])


def test_a_registered_source_is_split_too(tmp_path, monkeypatch):
    monkeypatch.setitem(registry._ENTRIES["data"], "greys", f"{__name__}:greys")
    held, learned = (open_pictures("greys", SIZE, tmp_path, split=Split(2, validation)) for validation in (True, False))
    greys_of = lambda part: [round(float((part[row]["image"].mean() + 1) * 127.5)) for row in range(len(part))]  # noqa: E731
    assert greys_of(held) == [0, 40] and greys_of(learned) == [20, 60, 80]


def test_a_function_that_can_be_imported_needs_no_name(tmp_path):
    rows = open_pictures(f"{__name__}:greys", SIZE, tmp_path)
    assert len(rows) == 5 and rows[0]["image"].shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nowhere:open", "nowhere:open cannot be imported .*No module named 'nowhere'.*PYTHONPATH"),
        (f"{__name__}:nothing", "cannot be imported .*has no attribute 'nothing'"),
        (f"{__name__}:SIZE", "gives int, not a source"),
        ("os:getcwdb().x", "is unknown; give creatures, fish, tfds:NAME, folder:DIR, cache:DIR or MODULE:FUNCTION"),
        ("bogus", "is unknown; give creatures, fish, tfds:NAME, folder:DIR, cache:DIR or MODULE:FUNCTION"),
        ("folder:", "is unknown"),
    ],
)
def test_what_opens_no_source_is_one_line(spec, said, tmp_path):
    with pytest.raises(UserError, match=said) as error:
        open_pictures(spec, SIZE, tmp_path)
    assert error.value.argument == "data"


def greys(folder):
    """Five pictures of one grey each."""
    return [{"image": np.full((SIZE, SIZE, 3), 20 * row, np.uint8)} for row in range(5)]
