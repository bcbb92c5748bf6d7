"""Files are whole or not there, tell when they were changed, and honour what the user's system says of them."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from damaged import damage
from safetensors.numpy import save as save_bytes
from sandbox import open_base_once

from e4t_jax import storage
from e4t_jax.errors import UserError
from e4t_jax.files import domain_files
from e4t_jax.files.concept_files import load_concept
from e4t_jax.files.domain_files import load_domain
from e4t_jax.storage import check_writable, move_files, pack, temporary_folder, unpack, write_file, write_files, written_behind
from e4t_jax.testing import write_tiny_world

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b|c": np.ones(4, np.float16)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Files of a tiny domain."""
    return write_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def own_world(world, tmp_path):
    """A copy of them to be damaged, whose base is read once for all tests."""
    shutil.copytree(world.domain, tmp_path / "domain")
    return tmp_path / "domain"


@pytest.fixture(autouse=True)
def one_base(monkeypatch):
    """The tests here are of a domain's own files; its base takes seconds to read."""
    monkeypatch.setattr(domain_files, "open_base", open_base_once)


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


class Full:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        if len(content) > self.room[0]:
            self.file.write(content[: self.room[0]])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room[0] -= len(content)
        return self.file.write(content)

    def flush(self):
        self.file.flush()

    def fileno(self):
        return self.file.fileno()


def fill_disk_after(monkeypatch, room):
    left, fdopen = [room], os.fdopen
    monkeypatch.setattr(storage.os, "fdopen", lambda *arguments: Full(fdopen(*arguments), left))


# writing ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 3, 7])
def test_a_disk_that_fills_leaves_every_older_file(tmp_path, monkeypatch, room):
    """Whether at the first file or the second: all three are as they were, and nothing half-written lies beside them."""
    files = {tmp_path / name: f"old {name}" for name in ("one", "two", "three")}
    write_files(files)
    fill_disk_after(monkeypatch, room)
    with pytest.raises(UserError, match=r"Cannot write .*No space left"):
        write_files({path: "newer" for path in files})
    assert {path: path.read_text() for path in files} == files
    assert names_in(tmp_path) == ["one", "three", "two"]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_rename_that_fails_puts_the_others_back(tmp_path, monkeypatch, failing):
    """Of three files, two were there and one was not: after the failure it is so again."""
    write_files({tmp_path / "one": "old", tmp_path / "two": "old"})
    replace, calls = os.replace, []

    def fail_once(source, target):
        calls.append(target)
        if len(calls) == failing + 1:
            raise OSError(errno.EIO, "the disk is broken")
        replace(source, target)

    monkeypatch.setattr(storage.os, "replace", fail_once)
    with pytest.raises(UserError, match="the disk is broken"):
        write_files({tmp_path / "three": "new", tmp_path / "one": "new", tmp_path / "two": "new"})
    monkeypatch.undo()
    assert names_in(tmp_path) == ["one", "two"]
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text() == "old"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_the_umask_is_honoured(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_file(tmp_path / "file", "content")
        write_file(tmp_path / "file", "content anew")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_a_folder_in_the_place_of_a_file_is_told_before_anything_is_replaced(tmp_path):
    (tmp_path / "two").mkdir()
    write_file(tmp_path / "one", "old")
    with pytest.raises(UserError, match=r"Cannot write .*two: it is a folder"):
        write_files({tmp_path / "one": "new", tmp_path / "two": "new"})
    assert (tmp_path / "one").read_text() == "old"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "one/two"], ids=["long", "nul", "below a file"])
def test_names_that_no_file_can_have_are_one_line(tmp_path, name):
    write_file(tmp_path / "one", "a file")
    for attempt in (lambda: write_file(tmp_path / name, "content"), lambda: check_writable(tmp_path / name / "deeper")):
        with pytest.raises(UserError) as error:
            attempt()
        assert len(str(error.value).splitlines()) == 1 and "Cannot write" in str(error.value)
    assert names_in(tmp_path) == ["one"]


def test_asking_leaves_nothing_behind_and_touches_nothing(tmp_path):
    """No empty folder for a mistake that is found later; a user's own `.probe` stays."""
    write_file(tmp_path / "out" / ".probe", "mine")
    check_writable(tmp_path / "out")
    check_writable(tmp_path / "new" / "deeper")
    assert names_in(tmp_path) == ["out", "out/.probe"]
    assert (tmp_path / "out" / ".probe").read_text() == "mine"


def test_too_little_space_is_told_before_the_work(tmp_path):
    with pytest.raises(UserError, match=r"out: .* GB left, and .* GB will be needed"):
        check_writable(tmp_path, needed=10**18)


def test_a_folder_made_elsewhere_is_moved_whole_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_file(out / "unet" / "config.json", "old")
    with pytest.raises(UserError, match=f"{out}/vae"), temporary_folder(beside=out) as made:
        write_file(made / "unet" / "config.json", "new")
        fill_disk_after(monkeypatch, 0)
        write_file(made / "vae" / "config.json", "new")
    monkeypatch.undo()
    assert names_in(tmp_path) == ["out", "out/unet", "out/unet/config.json"]
    assert (out / "unet" / "config.json").read_text() == "old"
    with temporary_folder(beside=out) as made:
        write_file(made / "unet" / "config.json", "new")
        write_file(made / "vae" / "config.json", "new")
        move_files(made, out)
    assert (out / "unet" / "config.json").read_text() == (out / "vae" / "config.json").read_text() == "new"
    assert names_in(tmp_path) == ["out", "out/unet", "out/unet/config.json", "out/vae", "out/vae/config.json"]


_WRITER = """
import sys
from pathlib import Path
from e4t_jax.errors import UserError
from e4t_jax.storage import write_file, write_files

folder, letter, calls = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for call in range(calls):
    write_file(folder / "single", letter * 5000)
    write_files({folder / name: letter * 3000 for name in ("first", "second", "third")})
"""


def test_two_processes_that_write_one_folder_leave_whole_files_of_one_of_them(tmp_path):
    """800 calls (4,000 when E4T_FUZZ is set): no error, no half file, nothing temporary, and three that belong together do."""
    calls = 1000 if os.environ.get("E4T_FUZZ") else 200
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", _WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, letter, str(calls)], env=environment, stderr=subprocess.PIPE) for letter in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        with storage.locked(tmp_path, shared=True):
            texts = [(tmp_path / name).read_text() for name in ("first", "second", "third") if (tmp_path / name).exists()]
        single = (tmp_path / "single").read_text() if (tmp_path / "single").exists() else "a" * 5000
        assert single in ("a" * 5000, "b" * 5000)
        assert texts in ([], ["a" * 3000] * 3, ["b" * 3000] * 3)
        seen.update(text[0] for text in texts)
    assert [writer.communicate()[1] for writer in writers] == [b"", b""]
    assert seen == {"a", "b"}
    assert names_in(tmp_path) == ["first", "second", "single", "third"]


def test_on_a_disk_that_is_full_older_files_stay(small_disk):
    files = {small_disk / name: bytes([index]) * 150_000 for index, name in enumerate(("encoder", "offsets", "json"))}
    write_files(files)
    with pytest.raises(UserError, match=r"Cannot write .*No space left"):
        write_files({path: b"x" * 300_000 for path in files})
    assert {path: path.read_bytes() for path in files} == files
    assert len(names_in(small_disk)) == 3
    with pytest.raises(UserError, match=r"GB left, and .* GB will be needed"):
        check_writable(small_disk)


def test_a_read_only_disk_is_one_line(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for attempt in (lambda: check_writable(small_disk, argument="work"), lambda: write_file(small_disk / "file", "content")):
        with pytest.raises(UserError, match=f"Cannot write {small_disk}.*Read-only"):
            attempt()


# reading ----------------------------------------------------------------------------------------------------------------


def read(path):
    return unpack(path, "a kind", "a file of that kind")


def test_what_is_packed_is_unpacked_and_equal_content_gives_equal_files(tmp_path):
    content = pack(TENSORS, {"kind": "a kind", "more": "words"})
    assert content == pack(dict(reversed(TENSORS.items())), {"more": "words", "kind": "a kind"})
    tensors, header = read(write_file(tmp_path / "file", content))
    assert header["more"] == "words"
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype


def test_every_single_bit_of_a_packed_file_is_noticed(tmp_path):
    """All of them, header and padding included."""
    content = pack(TENSORS, {"kind": "a kind"})
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "file").write_bytes(flipped)
        with pytest.raises(UserError, match=f"^{tmp_path}/file "):
            read(tmp_path / "file")


def test_every_cut_of_a_packed_file_is_noticed(tmp_path):
    content = pack(TENSORS, {"kind": "a kind"})
    for length in range(len(content)):
        (tmp_path / "file").write_bytes(content[:length])
        with pytest.raises(UserError, match=f"^{tmp_path}/file "):
            read(tmp_path / "file")


@pytest.mark.parametrize(
    "header",
    [
        None,
        {},
        {"header": ""},
        {"header": "[]"},
        {"header": "null"},
        {"header": "3"},
        {"header": "{}"},
        {"header": '{"kind": "another", "format": "1"}'},
        {"header": '{"kind": "a kind"}'},
        {"header": '{"kind": "a kind", "format": null}'},
        {"header": '{"kind": "a kind", "format": []}'},
        {"header": '{"kind": "a kind", "format": "0"}'},
        {"header": '{"kind": "a kind", "format": "-1"}'},
        {"header": '{"kind": "a kind", "format": "1.0"}'},
        {"header": '{"kind": "a kind", "format": "' + "9" * 5000 + '"}'},
        {"header": '{"kind": "a kind", "format": ' + "9" * 5000 + "}"},
        {"header": '{"kind": "a kind", "format": "٣"}'},
        {"header": '{"kind": "a kind", "format": "4"}'},
        {"header": '{"kind": "a kind", "format": "2"}'},
        {"header": '{"kind": "a kind", "format": "2", "checksum": 7}'},
        {"header": '{"kind": ["a kind"], "format": "1"}'},
        {"header": "[" * 100_000},
        {"kind": "a kind", "format": "1"},
    ],
)
def test_headers_that_are_none_are_one_line(tmp_path, header):
    (tmp_path / "file").write_bytes(save_bytes(TENSORS, header))
    with pytest.raises(UserError) as error:
        read(tmp_path / "file")
    assert str(error.value).startswith(f"{tmp_path}/file ") and len(str(error.value).splitlines()) == 1


def test_an_older_file_without_checksum_is_read(tmp_path):
    (tmp_path / "file").write_bytes(save_bytes(TENSORS, {"header": '{"kind": "a kind", "format": "1"}'}))
    np.testing.assert_array_equal(read(tmp_path / "file")[0]["a"], TENSORS["a"])


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e300])
def test_numbers_that_are_not_finite_are_refused(tmp_path, number):
    write_file(tmp_path / "file", pack({"a": np.array([1.0, number])}, {"kind": "a kind"}))
    with pytest.raises(UserError, match="a holds numbers that are not finite"):
        read(tmp_path / "file")


def test_what_is_no_file_is_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / ("x" * 300), tmp_path / "a\0b", Path("/dev/null")):
        with pytest.raises(UserError) as error:
            read(path)
        assert len(str(error.value).splitlines()) == 1


# the files of a domain ----------------------------------------------------------------------------------------------------


@pytest.mark.compiles
@pytest.mark.parametrize("kind", ["flip", "cut", "insert"])
@pytest.mark.parametrize("name", ["encoder.safetensors", "offsets.safetensors", "domain.json"])
def test_a_hundred_of_a_hundred_damages_to_a_domain_are_noticed(own_world, name, kind):
    """Even in domain.json, white space between its facts apart."""
    path, generator = own_world / name, random.Random(f"{name} {kind}")
    content = path.read_bytes()
    noticed = harmless = 0
    for _ in range(100):
        path.write_bytes(content)
        damage(path, kind, generator)
        if name == "domain.json":
            with contextlib.suppress(ValueError):
                harmless += json.loads(path.read_bytes()) == json.loads(content)
        try:
            record = domain_files._read_record(own_world / "domain.json")
            domain_files._read_part(own_world / "domain.json", path.stem if path.suffix != ".json" else "encoder", record)
        except UserError as error:
            noticed += len(str(error).splitlines()) == 1
    assert noticed + harmless == 100
    assert harmless == 0 or kind != "flip"


@pytest.mark.compiles
@pytest.mark.parametrize("kind", ["flip", "cut", "insert"])
def test_a_hundred_of_a_hundred_damages_to_a_concept_are_noticed(world, tmp_path, kind):
    path, generator = tmp_path / "venus.safetensors", random.Random(kind)
    content = world.concepts[0].read_bytes()
    noticed = 0
    for _ in range(100):
        path.write_bytes(content)
        damage(path, kind, generator)
        with pytest.raises(UserError, match=f"^{path}"):
            load_concept(path)
        noticed += 1
    assert noticed == 100


def test_files_of_two_domains_do_not_mix(world, own_world, domain):
    other = own_world.parent / "other"
    loaded = load_domain(own_world)
    domain_files.save_domain(
        other, dataclasses.replace(loaded, encoder={**loaded.encoder, "shared_bias": loaded.encoder["shared_bias"] + 1})
    )
    shutil.copy(other / "encoder.safetensors", own_world / "encoder.safetensors")
    with pytest.raises(UserError, match=r"encoder.safetensors is not the one that domain.json was written with"):
        load_domain(own_world)


@pytest.mark.parametrize("room", [100, 5_000])
def test_a_domain_is_saved_whole_or_not_at_all(own_world, monkeypatch, room):
    before = {path: path.read_bytes() for path in own_world.iterdir()}
    loaded = load_domain(own_world)
    fill_disk_after(monkeypatch, room)
    with pytest.raises(UserError, match="No space left"):
        domain_files.save_domain(own_world, loaded)
    assert {path: path.read_bytes() for path in own_world.iterdir()} == before


def facts_of(folder, **changes):
    """domain.json with other facts, signed as if it had been written so; None takes one away."""
    facts = {**json.loads((folder / "domain.json").read_text()), **changes}
    facts = {name: value for name, value in facts.items() if value is not Ellipsis and name != "checksum"}
    (folder / "domain.json").write_text(storage.to_signed_json(facts))


@pytest.mark.parametrize(
    "changes",
    [
        *({name: ...} for name in ("base", "domain_token", "scale", "template", "format", "digests", "clip_features", "guidance")),
        *({"format": value} for value in (0, -1, 5, True, "2", 2.0, None, 10**30)),
        *({"scale": value} for value in ("0.1", None, -1, 0, True, [])),
        {"guidance": 1e9},
        {"base": 3},
        {"base": "", "base_beside": ...},
        {"base": "a\0b", "base_beside": ...},
        {"base": "a\0b", "base_beside": "a\0b"},
        {"domain_token": ""},
        {"domain_token": "two words"},
        {"domain_token": []},
        {"template": "bogus"},
        {"template": None},
        {"clip_features": "all"},
        {"clip_features": "tokens"},
        {"image_encoder": "../../x"},
        {"image_encoder": "../x"},
        {"image_encoder": 3},
        {"base_fingerprint": "0" * 16},
        {"base_fingerprint": None},
        {"digests": {}},
        {"digests": []},
        {"digests": {"encoder.safetensors": 3}},
        {"another": 1},
    ],
    ids=lambda changes: str(changes)[:40].replace("\0", "0"),
)
def test_a_domain_with_facts_out_of_reason_is_one_line(own_world, changes):
    facts_of(own_world, **changes)
    with pytest.raises(UserError) as error:
        load_domain(own_world)
    said = str(error.value)
    assert len(said.splitlines()) == 1 and len(said) < 500


def test_another_encoder_than_the_base_asks_for_is_refused(own_world):
    """Of other shapes, though checksums and digests hold."""
    for name, tensors in {
        "encoder": {"final|kernel": np.ones((2, 2), np.float32)},
        "offsets": {"nowhere|rows": np.ones((2, 3), np.float32), "nowhere|columns": np.ones((2, 3), np.float32)},
    }.items():
        path = own_world / f"{name}.safetensors"
        before, facts = path.read_bytes(), json.loads((own_world / "domain.json").read_text())
        path.write_bytes(pack(tensors, {"kind": "e4t domain"}))
        facts_of(own_world, digests={**facts["digests"], path.name: storage.file_digest(path)})
        with pytest.raises(UserError, match=f"{name}.safetensors does not fit"):
            load_domain(own_world)
        path.write_bytes(before)
        facts_of(own_world, digests=facts["digests"])
    load_domain(own_world)


@pytest.mark.parametrize(
    "tensors",
    [
        {"folded": np.ones(4)},
        {"residual": np.ones(4)},
        {"folded": np.ones((2, 2)), "residual": np.ones(4)},
        {"folded": np.ones(4), "encoder|final": np.ones(4)},
        {"folded": np.ones(4), "factors": np.ones(4)},
        {"folded": np.ones(4), "factors|a": np.ones(4)},
        {"folded": np.ones(4), "factors|a|rows": np.ones((4, 1))},
        {"folded": np.ones(4), "factors|a|rows": np.ones((4, 1)), "factors|a|columns": np.ones(4)},
        {"folded": np.ones(4), "factors|a|rows": np.ones((4, 1)), "factors|a|rows|b": np.ones((4, 1))},
        {"folded|x": np.ones(4)},
        {"folded": np.ones(4), "another": np.ones(4)},
        {"folded": np.zeros(4, bool)},
    ],
    ids=lambda tensors: " ".join(tensors),
)
@pytest.mark.parametrize("scope", ["compact", "bogus"])
def test_concepts_that_lack_a_part_or_have_another_are_refused(tmp_path, tensors, scope):
    whole = list(tensors) == ["folded"] and tensors["folded"].dtype == float  # what 0 steps give
    path = write_file(tmp_path / "x.safetensors", pack(tensors, {"kind": "e4t concept", "scope": scope, "domain": "d"}))
    if whole and scope == "compact":
        assert load_concept(path, "d").trainable.factors is None
        return
    with pytest.raises(UserError, match=f"^{path}"):
        load_concept(path, "d")


def test_files_written_behind_are_there_at_the_end_and_errors_are_not_lost(tmp_path):
    """A hundred files in another thread; a folder in the place of one ends with the usual line."""
    with written_behind() as write:
        for index in range(100):
            write(tmp_path / f"{index}", bytes([index]))
    assert all((tmp_path / f"{index}").read_bytes() == bytes([index]) for index in range(100))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: it is a folder"), written_behind() as write:
        write(tmp_path / "folder", b"")
