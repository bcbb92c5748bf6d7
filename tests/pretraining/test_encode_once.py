"""A cache of encoded pictures: the same run without VAE and CLIP, and nothing that is not the run's own."""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from damaged import damage
from PIL import Image

from e4t_jax.bases import load_base, load_base_shapes, save_folder
from e4t_jax.data.cache import MANIFEST, CachedRows, Manifest, read_manifest, to_record, write_shard
from e4t_jax.data.images import read_image
from e4t_jax.data.sources import Split, open_pictures
from e4t_jax.errors import UserError
from e4t_jax.image_inputs import Encoders, encode_pictures
from e4t_jax.pretraining import pretrain as pretraining
from e4t_jax.pretraining.aot import compile_pretraining
from e4t_jax.pretraining.encode_once import CacheSettings, cache
from e4t_jax.pretraining.pretrain import pretrain
from e4t_jax.pretraining.settings import DomainSettings
from e4t_jax.pretraining.step import PretrainSettings
from e4t_jax.storage import locked
from e4t_jax.testing import tiny_base, write_tiny_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny base, and five pictures, one of them with a mask, one broken."""
    world = write_tiny_world(tmp_path_factory.mktemp("world"))
    half = np.zeros((16, 16), np.uint8)
    half[:, 3:13] = 255
    Image.fromarray(half).save(world.pictures / "0.mask.png")
    (world.pictures / "4.png").write_bytes(b"no picture")
    return world


@pytest.fixture(scope="module")
def kept(world, tmp_path_factory):
    """Their cache, in float32."""
    folder = tmp_path_factory.mktemp("cache") / "kept"
    settings = CacheSettings(batch_size=2, kept="float32")
    assert cache(str(world.base), f"folder:{world.pictures}", folder, settings, say=lambda line: None) == 5
    return folder


@pytest.mark.compiles
def test_rows_are_what_the_encoders_make_of_the_pictures(world, kept):
    """Each against the picture encoded alone; relative 1e-4."""
    base, params = load_base(str(world.base))
    weights = Encoders(params["vae"], params["image_encoder"])
    encode = jax.jit(lambda image, mask: encode_pictures(base, weights, image, mask))
    rows = CachedRows(kept)
    for index, name in enumerate((0, 1, 2, 3, 0)):  # in the place of the broken one, the last, is the first
        image, mask = read_image(world.pictures / f"{name}.png", 16)
        encoded = encode(image[None], (np.ones((16, 16), np.float32) if mask is None else mask)[None])
        for part in ("latents", "clip", "mask"):
            np.testing.assert_allclose(rows[index][part], getattr(encoded, part)[0], rtol=1e-4, atol=1e-5)
        assert rows[index]["caption"] == ""
    assert rows[0]["mask"].min() < 1 and rows.manifest.broken == 1


def losses_of(world, data, work):
    settings = PretrainSettings(steps=6, batch_size=2, watch_every=1, learning_rate=1e-3)
    domain = DomainSettings("creature")
    learned = pretrain(str(world.base), data, domain, settings, work=work, say=lambda line: None)
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["loss"] for line in lines]), learned


@pytest.mark.compiles
def test_a_run_on_a_cache_takes_the_same_steps_and_keeps_neither_vae_nor_clip(world, kept, tmp_path, monkeypatch):
    """Losses of six steps within 1e-4, with the moments in float32; neither part is kept while steps are taken."""
    plain, _ = losses_of(world, f"folder:{world.pictures}", tmp_path / "plain")
    trained, kept_parts = pretraining.pretrain_trainable, []

    def train(method, weights, *arguments, **options):
        kept_parts.append(weights.encoders)
        return trained(method, weights, *arguments, **options)

    monkeypatch.setattr(pretraining, "pretrain_trainable", train)
    cached, learned = losses_of(world, f"cache:{kept}", tmp_path / "cached")
    assert kept_parts == [None]
    assert set(learned.params) == {"vae", "unet", "text_encoder", "image_encoder"}
    np.testing.assert_allclose(cached, plain, rtol=1e-4)
    assert len(plain) == 6


@pytest.mark.compiles
def test_several_views_of_a_picture_lie_side_by_side(world, kept, tmp_path):
    """The first is the picture itself, the second is another; half precision keeps it to a thousandth."""
    folder = tmp_path / "views"
    settings = CacheSettings(batch_size=3, views=2)  # of which the two devices take none evenly: one does it all
    assert cache(str(world.base), f"folder:{world.pictures}", folder, settings, say=lambda line: None) == 10
    rows, single = CachedRows(folder), CachedRows(kept)
    for index in range(5):
        for part in ("latents", "clip", "mask"):
            one = single[index][part]
            np.testing.assert_allclose(rows[2 * index][part], one, rtol=2e-3, atol=2e-3)
        assert np.abs(rows[2 * index + 1]["latents"] - single[index]["latents"]).max() > 0.01


@pytest.fixture
def copied(kept, tmp_path):
    """A copy of the cache, to spoil."""
    for path in kept.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def run_on(world, folder, base=None, **domain):
    settings = PretrainSettings(steps=1, batch_size=2)
    pretrain(str(base or world.base), f"cache:{folder}", DomainSettings("creature", **domain), settings, work=folder / "work")


def change_a_number(folder):
    """Flips a bit of row 1's latents."""
    rows = CachedRows(folder)
    content = bytearray(rows.paths[0].read_bytes())
    content[content.index(np.ascontiguousarray(rows[1]["latents"]).tobytes()) + 40] ^= 1
    rows.paths[0].write_bytes(content)
    return content


@pytest.mark.compiles
def test_damaged_and_missing_shards_are_one_line(world, copied):
    shard = copied / read_manifest(copied).shards[0]["file"]
    content = change_a_number(copied)
    with pytest.raises(UserError, match=r"rows-00000.array_record was changed since it was written"):
        run_on(world, copied)
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"rows-00000.array_record is damaged"):
        run_on(world, copied)
    shard.unlink()
    with pytest.raises(UserError, match=r"rows-00000.array_record is missing; make the cache again"):
        run_on(world, copied)
    assert not (copied / "work").exists()


@pytest.mark.compiles
@pytest.mark.parametrize("kind", ["flip", "cut", "insert"])
@pytest.mark.parametrize("name", [MANIFEST, "rows-00000.array_record"])
def test_a_hundred_of_a_hundred_damages_to_a_cache_are_noticed(copied, name, kind):
    """Before the first step, white space between the manifest's facts apart."""
    path, generator = copied / name, random.Random(f"{name} {kind}")
    content = path.read_bytes()
    noticed = harmless = 0
    for _ in range(100):
        path.write_bytes(content)
        damage(path, kind, generator)
        if name == MANIFEST:
            with contextlib.suppress(ValueError):
                harmless += json.loads(path.read_bytes()) == json.loads(content)
        try:
            CachedRows(copied).check([0])
        except UserError as error:
            noticed += len(str(error).splitlines()) == 1
    assert noticed + harmless == 100
    assert harmless == 0 or kind != "flip"


def test_a_disk_that_fills_is_one_line_and_leaves_no_half_shard(small_disk):
    write_shard(small_disk / "rows-00000.array_record", [os.urandom(1000)])
    with pytest.raises(UserError, match=r"Cannot write .*rows-00001.array_record"):
        write_shard(small_disk / "rows-00001.array_record", (os.urandom(10_000) for _ in range(300)))
    assert os.listdir(small_disk) == ["rows-00000.array_record"]


def test_a_changed_row_is_noticed_when_it_is_read(copied):
    change_a_number(copied)
    with pytest.raises(UserError, match="row 1 is damaged"):
        CachedRows(copied)[1]


@pytest.mark.compiles
def test_a_cache_of_another_base_or_another_clip_is_one_line(world, copied, tmp_path):
    base, params = tiny_base()
    save_folder(tmp_path / "other", base, {**params, "unet": jax.tree.map(lambda leaf: leaf * 1.5, params["unet"])})
    save_folder(tmp_path / "vae", base, {**params, "vae": jax.tree.map(lambda leaf: leaf * 1.5, params["vae"])})
    for other in ("other", "vae"):
        with pytest.raises(UserError, match="was made with another base"):
            run_on(world, copied, tmp_path / other)
    with pytest.raises(UserError, match="was made with clip_features = 'layers', not 'tokens'"):
        run_on(world, copied, clip_features="tokens")
    manifest = copied / MANIFEST
    manifest.write_text(manifest.read_text().replace('"views": 1', '"views": 2'))
    with pytest.raises(UserError, match="was changed since it was written"):
        run_on(world, copied)
    with pytest.raises(UserError, match=r"nowhere/cache.json does not exist; give a folder of encoded pictures"):
        run_on(world, tmp_path / "nowhere")


def test_a_folder_that_holds_a_cache_is_not_written_again(world, kept):
    with pytest.raises(UserError, match=r"out: .* holds a cache already; give another folder"):
        cache(str(world.base), f"folder:{world.pictures}", kept)


def test_a_cache_is_made_of_pictures_not_of_a_cache(world, kept, tmp_path):
    with pytest.raises(UserError, match=r"data: cache:.* is encoded already; give pictures: .*folder:DIR"):
        cache(str(world.base), f"cache:{kept}", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_name_that_is_not_utf_8_is_refused(world, kept, tmp_path):
    """By who writes, with nothing written, and by who reads."""
    strange = tmp_path / "\udc80"
    with pytest.raises(UserError, match=r"out: .* is no name in UTF-8, as a cache needs; give a folder of another name"):
        cache(str(world.base), f"folder:{world.pictures}", strange)
    assert not strange.exists()
    shutil.copytree(kept, strange)
    with pytest.raises(UserError, match=r"data: .* is no name in UTF-8"):
        CachedRows(strange)


@pytest.mark.slow
def test_the_compiled_step_of_a_cache_has_neither_vae_nor_clip(world):
    """Fewer operations, fewer bytes moved and smaller arguments than with pictures, whose encoders it does not take."""
    told = {}
    for cached in (False, True):
        compiled = compile_pretraining(jax.devices(), load_base_shapes(str(world.base)), 2, PretrainSettings(), cached=cached)
        cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
        told[cached] = cost["flops"], cost["bytes accessed"], memory.argument_size_in_bytes
    assert all(less < more for less, more in zip(told[True], told[False], strict=True)), told


def test_all_views_of_a_picture_are_held_out_together(tmp_path):
    """Of three pictures with two views each one: its two rows, and nothing else of it."""
    row = {"latents": np.zeros((2, 2, 1), np.float16), "clip": np.zeros((1, 2), np.float16), "mask": np.ones((2, 2), np.float16)}
    shard = write_shard(tmp_path / "rows-00000.array_record", (to_record(row, f"{number}") for number in range(6)))
    shapes = {part: list(value.shape) for part, value in row.items()}
    what = {
        "base": "",
        "clip_features": "layers",
        "image_size": 16,
        "data": "",
        "pictures": 3,
        "broken": 0,
        "views": 2,
    }
    manifest = Manifest(**what, dtype="float16", computed_in="float32", shapes=shapes, shards=[shard])
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    held, learned = (open_pictures(f"cache:{tmp_path}", 16, tmp_path, split=Split(1, validation)) for validation in (True, False))
    assert [held[index]["caption"] for index in range(len(held))] == ["0", "1"]
    assert [learned[index]["caption"] for index in range(len(learned))] == ["2", "3", "4", "5"]


TWO_ROWS_A_SHARD = """
import sys
from e4t_jax.pretraining import encode_once
from e4t_jax.cli import cache
from e4t_jax.cli.run import run
encode_once._SHARD_ROWS = 2
run(cache.main, sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_make_the_cache_of_one(world, tmp_path):
    """Three shards, of which process 1 writes the second: every file of the two is the same, manifest and checksums among them."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", TWO_ROWS_A_SHARD, "--base", str(world.base), "--data", f"folder:{world.pictures}"]
    made = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        joined = [["--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id", str(own)] for own in range(2)]
        processes = [
            subprocess.Popen(
                [*command, "--out", str(folder), "--batch-size", "2", *more], env=environment, stderr=subprocess.PIPE, text=True
            )
            for more in (joined if count == 2 else [[]])
        ]
        for process in processes:
            said = process.communicate(timeout=600)[1]
            assert process.returncode == 0, said
        made[count] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(made[1]) == {MANIFEST, *(f"rows-{number:05}.array_record" for number in range(3))}
    assert made[1] == made[2] and read_manifest(tmp_path / "2").broken == 1


def test_two_runs_never_write_one_cache(world, tmp_path):
    """The second is told at once; what the first writes stays whole."""
    out = tmp_path / "out"
    out.mkdir()
    with locked(out), pytest.raises(UserError, match=f"^out: another process writes a cache into {out}; let it end, or give anoth"):
        cache(str(world.base), f"folder:{world.pictures}", out, CacheSettings(batch_size=2))
    assert not list(out.rglob("*array_record*"))
