"""Data sets of TFDS: those prepared as array_record are read, others are one line with the command; nothing is ever fetched."""

import io
import json
import socket

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from e4t_jax.data.sources import open_pictures
from e4t_jax.errors import UserError


class Greys(tfds.core.GeneratorBasedBuilder):
    """Four pictures of one grey each."""

    name = "greys"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(16, 16, 3), encoding_format="png")}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for row in range(4):
            content = io.BytesIO()
            Image.fromarray(np.full((16, 16, 3), 60 * row, np.uint8)).save(content, "PNG")
            yield row, {"image": content.getvalue()}


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path, monkeypatch):
    """TFDS keeps nothing of its own, and no connection can be made."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "own"))

    def refuse(*_, **__):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def prepared(tmp_path):
    folder = tmp_path / "data"
    Greys(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def as_tfrecord(folder):
    """Named as TensorFlow's own files are, which it takes TensorFlow to write."""
    (index,) = folder.rglob("dataset_info.json")
    content = json.loads(index.read_text())
    content["fileFormat"] = "tfrecord"
    for split in content["splits"]:
        split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    index.write_text(json.dumps(content))
    for file in folder.rglob("*.array_record-*"):
        file.rename(file.with_name(file.name.replace("array_record", "tfrecord")))


@pytest.mark.parametrize("name", ["greys", "greys:1.0.0", "greys:1.*.*"])
@pytest.mark.parametrize("where", ["data", "own"])
def test_a_prepared_set_is_read(prepared, tmp_path, name, where):
    prepared.rename(tmp_path / where)
    rows = open_pictures(f"tfds:{name}", 16, tmp_path / "data")
    np.testing.assert_allclose([row["image"].mean() for row in rows], np.arange(4) * 60 / 127.5 - 1, atol=1e-6)


def command(name, folder):
    made = f"tfds.builder({name!r}, data_dir={str(folder)!r}, file_format='array_record').download_and_prepare()"
    return f'python -c "import tensorflow_datasets as tfds; {made}"'


@pytest.mark.parametrize("name", ["mnist", "oxford_flowers102", "no_such_set", "huggingface:mnist"])
def test_a_set_that_is_not_prepared_is_one_line_and_nothing_is_fetched_or_left(tmp_path, name):
    with pytest.raises(UserError) as raised:
        open_pictures(f"tfds:{name}", 16, tmp_path / "data")
    said = f"data: tfds:{name} is not prepared in {tmp_path / 'data'}; nothing is fetched unasked, prepare it: "
    assert str(raised.value) == said + command(name, tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_a_set_prepared_as_tfrecord_is_told_the_format_and_the_command(prepared, tmp_path):
    as_tfrecord(prepared)
    with pytest.raises(UserError) as raised:
        open_pictures("tfds:greys", 16, prepared)
    said = f"data: tfds:greys was prepared as tfrecord in {prepared}, which cannot be read by number; prepare it with "
    assert str(raised.value) == said + 'file_format="array_record": ' + command("greys", tmp_path / "own")
    Greys(data_dir=str(tmp_path / "own"), file_format="array_record").download_and_prepare()
    assert len(open_pictures("tfds:greys", 16, prepared)) == 4


@pytest.mark.parametrize("name", ["a b", "../x", "greys/", "greys:x"])
def test_a_name_that_no_set_can_have_is_one_line(prepared, name):
    with pytest.raises(UserError, match=f"^data: tfds:{name} (cannot be opened|is not prepared) in "):
        open_pictures(f"tfds:{name}", 16, prepared)


def test_a_set_without_the_split_or_with_a_shard_lost_is_one_line(prepared):
    (shard,) = prepared.rglob("*.array_record-*")
    shard.unlink()
    with pytest.raises(UserError, match=r"^data: tfds:greys cannot be read in .*; prepare it again\.$"):
        len(open_pictures("tfds:greys", 16, prepared))
    (index,) = prepared.rglob("dataset_info.json")
    index.write_text(index.read_text().replace('"train"', '"test"'))
    with pytest.raises(UserError, match='data: tfds:greys has no split "train", only test; give'):
        open_pictures("tfds:greys", 16, prepared)
