"""The Hub is asked for what the cache lacks, for that alone, and never for what can only be a folder."""

import json
import shutil
import socket
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
from hub_cache import write_repository
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from e4t_jax import bases
from e4t_jax.bases import hub
from e4t_jax.errors import UserError
from e4t_jax.testing import tiny_base


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A whole base; what the Hub's repository holds."""
    folder = tmp_path_factory.mktemp("written")
    bases.save_folder(folder, *tiny_base())
    return folder


class FakeHub:
    """A repository on a server, and a cache; `asked` are the calls that went to the server, `tags` what it says of licences."""

    def __init__(self, monkeypatch, remote, cache, offline=False):
        self.remote, self.cache, self.offline, self.asked, self.tags = remote, cache, offline, [], ["license:creativeml-openrail-m"]
        monkeypatch.setattr(hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(hub, "model_info", self.model_info)

    def _files(self):
        return [path.relative_to(self.remote).as_posix() for path in self.remote.rglob("*") if path.is_file()]

    def model_info(self, name, revision=None, files_metadata=False):
        self.asked.append(name)
        if self.offline:
            raise OfflineModeIsEnabled("no connection today")
        sizes = {name: (self.remote / name).stat().st_size for name in self._files()}
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=sizes[name]) for name in sizes], tags=self.tags)

    def snapshot_download(self, name, revision=None, allow_patterns=None, local_files_only=False):
        if local_files_only:
            if not self.cache.exists():
                raise LocalEntryNotFoundError("nothing there")
            return str(self.cache)
        assert allow_patterns, "everything would be fetched"
        for file in self._files():
            if any(fnmatch(file, pattern) for pattern in allow_patterns) and not (self.cache / file).exists():
                (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.remote / file, self.cache / file)
        return str(self.cache)


def copied(written, folder):
    return Path(shutil.copytree(written, folder))


def test_a_whole_cache_needs_no_connection(written, tmp_path, monkeypatch):
    fake = FakeHub(monkeypatch, written, copied(written, tmp_path / "cache"))
    assert hub.find_folder("owner/tiny", "base") == tmp_path / "cache"
    assert fake.asked == []


@pytest.mark.parametrize(
    "lost",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "tokenizer/merges.txt",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "image_encoder/model.safetensors",
    ],
)
def test_what_a_cache_lacks_is_fetched_or_named(written, tmp_path, monkeypatch, lost):
    cache = copied(written, tmp_path / "cache")
    (cache / lost).unlink()
    (cache / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)  # newer libraries write it, and it stands for merges.txt
    fake = FakeHub(monkeypatch, written, cache, offline=True)
    named = lost.replace(".safetensors", "").split(".")[0]
    with pytest.raises(UserError, match=rf"^base: owner/tiny: the Hub's cache lacks {named}[^\n]*no connection today[^\n]*$"):
        hub.find_folder("owner/tiny", "base")
    fake.offline = False
    bases.load_folder(hub.find_folder("owner/tiny", "base"))


def test_a_fetch_is_announced_and_what_it_left_out_is_not_asked_for_again(written, tmp_path, monkeypatch, capsys):
    """The library itself calls a snapshot incomplete that lacks other formats; here it has all that is read."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    copied(written, tmp_path / "files")
    snapshot = write_repository(
        tmp_path / "home", "owner/tiny", tmp_path / "files", ("model.ckpt", "unet/diffusion_pytorch_model.bin")
    )
    with pytest.raises(LocalEntryNotFoundError):
        huggingface_hub.snapshot_download("owner/tiny", local_files_only=True)
    assert hub.find_folder("owner/tiny", "base") == snapshot
    assert capsys.readouterr().err == ""
    (snapshot / "vae" / "config.json").unlink()
    assert hub.find_local("owner/tiny", "base") is None
    FakeHub(monkeypatch, written, tmp_path / "cache")
    hub.find_folder("owner/tiny", "base")
    said = capsys.readouterr().err
    assert said.startswith("Fetching 0.00 GB: owner/tiny (0.00 GB, licence CreativeML OpenRAIL-M), to ") and said.count("\n") == 1


def test_nothing_in_the_cache_and_no_connection_is_one_line(written, tmp_path, monkeypatch):
    FakeHub(monkeypatch, written, tmp_path / "cache", offline=True)
    with pytest.raises(
        UserError, match=r"owner/tiny: it is neither a folder nor in the Hub's cache, and could not be fetched \(no con"
    ):
        hub.find_folder("owner/tiny", "base")


def to_bin(folder, part, stem):
    torch = pytest.importorskip("torch")
    from safetensors.numpy import load_file

    path = next((folder / part).glob("*.safetensors"))
    torch.save({name: torch.tensor(value) for name, value in load_file(path).items()}, folder / part / f"{stem}.bin")
    path.unlink()


def test_weights_in_bin_alone_are_fetched_and_read(written, tmp_path, monkeypatch):
    remote = copied(written, tmp_path / "remote")
    index = json.loads((remote / "model_index.json").read_text())
    (remote / "model_index.json").write_text(json.dumps({name: value for name, value in index.items() if name != "_checksums"}))
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        to_bin(remote, part, stem)
    FakeHub(monkeypatch, remote, tmp_path / "cache")
    _, params = bases.load_base("owner/tiny")
    _, expected = bases.load_folder(written)
    np.testing.assert_array_equal(params["unet"]["conv_in"]["kernel"], expected["unet"]["conv_in"]["kernel"])


def test_of_several_formats_one_is_fetched(written, tmp_path, monkeypatch):
    remote = copied(written, tmp_path / "remote")
    own = "unet/diffusion_pytorch_model"
    for name in (
        f"{own}.bin",
        f"{own}.fp16.safetensors",
        f"{own}.non_ema.safetensors",
        "model.ckpt",
        "safety_checker/model.safetensors",
    ):
        (remote / name).parent.mkdir(exist_ok=True)
        (remote / name).write_bytes(b"large")
    FakeHub(monkeypatch, remote, tmp_path / "cache")
    folder = hub.find_folder("owner/tiny", "base")
    assert sorted(path.name for path in (folder / "unet").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert not (folder / "model.ckpt").exists() and not (folder / "safety_checker").exists()


def test_half_of_the_shards_are_not_whole(written, tmp_path, monkeypatch):
    """A cache with one of two shards is completed; a repository with one of two is refused."""
    remote = copied(written, tmp_path / "remote")
    (remote / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in shards:
        (remote / "unet" / name).write_bytes(b"shard")
    (remote / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    cache = copied(remote, tmp_path / "cache")
    (cache / "unet" / shards[0]).unlink()
    FakeHub(monkeypatch, remote, cache)
    assert (hub.find_folder("owner/tiny", "base") / "unet" / shards[0]).exists()
    for folder in (remote, cache):
        (folder / "unet" / shards[1]).unlink()
    with pytest.raises(UserError, match=r"owner/tiny is a repository without unet/diffusion_pytorch_model.safetensors \(whole, or"):
        hub.find_folder("owner/tiny", "base")


def test_an_image_encoder_is_its_weights_and_configuration(written, tmp_path, monkeypatch):
    remote = copied(written / "image_encoder", tmp_path / "remote")
    (remote / "pytorch_model.bin").write_bytes(b"large")
    FakeHub(monkeypatch, remote, tmp_path / "cache")
    folder = hub.find_folder("owner/clip", "image_encoder", hub.IMAGE_ENCODER)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.fixture
def no_connection(monkeypatch):
    """Any attempt at one fails the test, whatever becomes of the error."""
    tried = []

    def refuse(*_, **__):
        tried.append(True)
        raise OSError("a connection was tried")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("snapshot_download", "model_info"):
        monkeypatch.setattr(hub, name, refuse)
    yield
    assert not tried


@pytest.mark.parametrize("name", ["./x", "../x", "/nowhere/x", "~/x", "x", "a/b/c", "a\\b", "x/", ".x/y", "x/.y", "", "-x/y"])
def test_a_name_that_can_only_be_a_folders_is_not_asked_for(name, no_connection, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^base: [^\n]*no such folder, and not a Hub id[^\n]*$"):
        hub.find_folder(name, "base")


def test_a_file_is_no_base(tmp_path, monkeypatch, no_connection):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="models/base is a file; give the folder"):
        bases.load_base("models/base")


def test_a_folder_that_is_no_base_asks_nobody(written, tmp_path, no_connection):
    """It has no image encoder, and still none is looked for; a whole one that lacks it alone is what would be asked for."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/vae/config.json does not exist"):
        bases.load_base(str(tmp_path / "empty"))
    for lost in ("unet/diffusion_pytorch_model.safetensors", "tokenizer/merges.txt", "scheduler/scheduler_config.json"):
        folder = copied(written, tmp_path / lost.replace("/", "_"))
        shutil.rmtree(folder / "image_encoder")
        (folder / lost).unlink()
        with pytest.raises(UserError, match=lost.split("/")[0]):
            bases.load_base(str(folder))


def test_local_folders_make_no_connection(written, tmp_path, no_connection):
    folder = copied(written, tmp_path / "base")
    shutil.move(folder / "image_encoder", tmp_path / "clip")
    index = json.loads((folder / "model_index.json").read_text())
    del index["_checksums"]["image_encoder/model.safetensors"]
    (folder / "model_index.json").write_text(json.dumps(index))
    base, params = bases.load_base(str(folder), str(tmp_path / "clip"))
    assert base.image_size == 16 and set(params) == {"vae", "unet", "text_encoder", "image_encoder"}
