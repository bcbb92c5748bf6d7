"""Whatever is asked and whatever is read: the right result or one line, nothing half-written, earlier files as they were.

`make fuzz` tries twenty times as much (E4T_FUZZ says how many times), other cases every time.
"""

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from public_checkpoints import HAS_TORCH
from sandbox import COMMANDS, attempt, call, half_written, make_world, nothing_compiled, same, snapshot

from e4t_jax.bases import load_base
from e4t_jax.data.images import read_image
from e4t_jax.files import domain_files
from e4t_jax.files.concept_files import load_concept

pytestmark = pytest.mark.compiles
TIMES = int(os.environ.get("E4T_FUZZ", "0"))


def fuzz(examples):
    """The same cases at every run of the suite; others, and more, in a long run."""
    return settings(
        max_examples=examples * max(TIMES, 1),
        derandomize=not TIMES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    with nothing_compiled():
        yield make_world(folder)


@contextlib.contextmanager
def elsewhere(world):
    """A working folder beside the world's files: what relative names lead to."""
    folder, before = world.base.parent / "here", Path.cwd()
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


# arguments ----------------------------------------------------------------------------------------------------------------

NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1",
    "2",
    "3",
    "1.5",
    "1e400",
    "1e30",
    "-0.0",
    "9" * 12,
    "9" * 400,
    "9" * 5000,
    "0x10",
    "1_0",
    "٣",
]
WORDS = [
    "",
    " ",
    "-",
    "--",
    "None",
    "*s",
    "a *s",
    "*s " * 40,
    "*sun",
    "\n",
    "a\nb",
    "a\0b",
    "é",
    "\udc80",
    "x" * 5000,
    "creature",
    "cat",
    "a b",
]
PLACES = [
    "out",
    "out/deeper",
    "file",
    "file/below",
    "",
    ".",
    "x" * 300,
    "a\0b",
    "a\nb",
    "é",
    "\udc80",
    "/proc/e4t",
    "/dev/null",
    "/dev/null/x",
]

numbers = st.one_of(st.sampled_from(NUMBERS), st.integers().map(str), st.floats().map(str))
words = st.one_of(st.sampled_from(WORDS), st.text(max_size=12))
places = st.sampled_from(PLACES)
# Kinds of folders and files that the world has, right and wrong ones.
of_world = st.sampled_from(
    ["base", "domain", "pictures", "venus.safetensors", "ada.safetensors", "pictures/0.png", "notes.txt", "kept", "nowhere"]
)
checkpoints = st.sampled_from(["pretrained", "tuned", "newer-pretrained", "newer-tuned"])


def options_of(world):
    """Command -> (a call that is right, option -> what may be given for it)."""
    folder = world.base.parent
    file = of_world.map(lambda name: str(folder / name))
    tuning = {"scope": st.one_of(st.sampled_from(["compact", "head", "full"]), words), "mask": words, "learning-rate": numbers}
    tuning |= {"word-rate": numbers, "regularisation": numbers, "batch-size": numbers, "seed": numbers}
    few = st.sampled_from(["0", "1", "2", "-1", "nan", "1.5", "9" * 400, "1000001", "x"])
    drawing = {
        "steps": few,
        "seed": numbers,
        "guidance": numbers,
        "sampling": st.one_of(st.sampled_from(["ddim", "euler", "pndm"]), words),
    }
    common = {"cache": words, "bogus": words, "help": st.just("")}
    counts = {"seed": numbers, "sampling-steps": numbers, "concepts": numbers}
    pictures = ["--images", folder / "pictures/0.png", folder / "pictures/1.png"]
    concepts = ["--concepts", *world.concepts]
    domain = ["--domain", world.domain]
    data = st.one_of(
        st.sampled_from(["", "folder:", "tfds:", "cache:", "x", "folder:nowhere", f"folder:{folder}", f"folder:{world.base}"]),
        st.sampled_from([f"cache:{folder}/kept", f"cache:{folder}/pictures", "cache:nowhere"]),
        words,
    )
    small = ["--steps", "1", "--batch-size", "2", "--domain-token", "creature"]
    domain_settings = {"domain-token": words, "template": words, "clip-features": words, "guidance": numbers}
    training = {
        "steps": few,
        "batch-size": numbers,
        "learning-rate": numbers,
        "regularisation": numbers,
        "parallel": words,
        "seed": numbers,
    }
    return {
        "tune": (
            [*pictures, *domain, "--out", "out", "--steps", "1"],
            {**tuning, **common, "steps": few, "images": file, "out": places, "domain": file, "caption": words},
        ),
        "generate": (
            [*concepts, *domain, "--prompts", "a *s", "--out", "out", "--steps", "1"],
            {**drawing, **common, "concepts": file, "prompts": words, "out": places, "domain": file},
        ),
        "export": (
            ["--concept", world.concepts[0], *domain, "--out", "out"],
            {**common, "concept": file, "out": places, "domain": file, "rank": numbers, "dtype": words}
            | {"format": st.one_of(st.sampled_from(["lora", "embedding", "diffusers"]), words)},
        ),
        "export-domain": (["--out", "out"], {**common, "out": places, "domain": file}),
        "pretrain": (
            ["--base", world.base, "--data", f"folder:{world.pictures}", "--out", "out", "--work", "work", *small],
            {
                **common,
                **domain_settings,
                **training,
                "out": places,
                "work": places,
                "base": file,
                "data": data,
                "image-encoder": file,
            }
            | {"checkpoint-every": numbers, "resume": words},
        ),
        "cache": (
            ["--base", world.base, "--data", f"folder:{world.pictures}", "--out", "out", "--batch-size", "2"],
            {**common, "out": places, "base": file, "data": data, "image-encoder": file, "batch-size": numbers, "seed": numbers}
            | {"clip-features": words, "kept": words, "dtype": words, "views": few, "workers": few},
        ),
        "evaluate": (
            ["--out", "out", *domain],
            {**common, **tuning, **counts, "out": places, "domain": file, "prompts": numbers, "guidance": numbers}
            | {"given": words, "pictures": words, "split": words, "steps": few},
        ),
        "demo": (["--out", "out"], {**common, **counts, "out": places, "steps": numbers}),
        "train-base": (
            ["--out", "out", "--work", "work"],
            {**common, "out": places, "work": places, "start": file, "pictures": numbers, "batch-size": numbers, "seed": numbers}
            | {
                "autoencoder-batch": numbers,
                "contrast-batch": numbers,
                "autoencoder-steps": numbers,
                "denoiser-steps": numbers,
                "contrast-steps": numbers,
                "check": words,
            },
        ),
        "train-judges": (
            ["--out", "out"],
            {
                **common,
                "out": places,
                "only": words,
                "identities": numbers,
                "scenes": numbers,
                "creatures": numbers,
                "seed": numbers,
            }
            | {"identity-steps": numbers, "scene-steps": numbers, "attribute-steps": numbers},
        ),
        "import-reference": (
            ["--reference", folder / "pretrained", "--base", world.base, "--out", "out"],
            {**common, "reference": st.one_of(file, checkpoints.map(lambda name: str(folder / name))), "base": file, "out": places}
            | {"image": file, "image-encoder": st.one_of(file, words), "open-clip": words},
        ),
    }


def odd_call(data, right, options):
    """The right call with some options given otherwise, twice, without a value, or not at all."""
    arguments = [str(argument) for argument in right]
    for name in data.draw(st.lists(st.sampled_from(sorted(options)), min_size=1, max_size=3)):
        how = data.draw(st.sampled_from(["set", "set", "set", "add", "bare", "drop"]))
        value = data.draw(options[name])
        flag = f"--{name}"
        at = arguments.index(flag) if flag in arguments else None
        end = (
            at if at is None else next((i for i in range(at + 1, len(arguments)) if arguments[i].startswith("--")), len(arguments))
        )
        if how == "drop" and at is not None:
            # Without --data a command draws 32,768 pictures of the drawn world, rightly.
            arguments[at:end] = [] if name != "data" else [flag, "folder:nowhere"]
        elif how == "bare":
            arguments.append(flag)
        elif how == "set" and at is not None:
            arguments[at:end] = [flag, value]
        else:
            arguments += [flag, value]
    return arguments


@pytest.mark.parametrize("command", COMMANDS)
@given(data=st.data())
@fuzz(20)
def test_arguments(world, command, data):
    right, options = options_of(world)[command]
    with elsewhere(world) as here:
        arguments = odd_call(data, right, options)
        (here / "file").write_text("mine")
        before, own = snapshot(world.base.parent), snapshot(here)
        outcome = call(command, arguments)
        after = snapshot(world.base.parent)
        assert not outcome.traceback, f"{arguments}\n{outcome.traceback}"
        assert outcome.status == 0 or outcome.is_one_line, (arguments, outcome.said)
        assert len(outcome.said) < 2000, arguments
        assert {path: after.get(path) for path in before if path not in own} == {
            path: before[path] for path in before if path not in own
        }
        assert (here / "file").read_text() == "mine"
        assert not half_written(before, after), arguments
        if outcome.status and command != "pretrain":  # which prepares data in its work folder
            assert after == before, (arguments, outcome.said, set(after) ^ set(before))
        empty(here)


def empty(folder):
    for root, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(os.path.join(root, name))
        for name in folders:
            os.rmdir(os.path.join(root, name))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_right_calls_are_right(world, command):
    """Else no odd one would tell anything."""
    with elsewhere(world) as here:
        outcome = call(command, options_of(world)[command][0])
        assert outcome.status == 0, outcome
        empty(here)


# files -------------------------------------------------------------------------------------------------------------------


@st.composite
def damages(draw):
    """Some bytes flipped, put in, cut out or cut off, at places given as shares of the file."""
    how = st.tuples(st.sampled_from(["flip", "insert", "remove", "end", "zero", "repeat"]), st.floats(0, 1), st.integers(0, 255))
    return draw(st.lists(how, min_size=1, max_size=3))


def damaged(content, steps):
    content = bytearray(content)
    for how, share, byte in steps:
        at = min(int(share * len(content)), max(len(content) - 1, 0))
        if how == "flip" and content:
            content[at] ^= 1 << byte % 8
        elif how == "insert":
            content[at:at] = bytes([byte]) * (1 + byte % 9)
        elif how == "remove":
            del content[at : at + 1 + byte % 9]
        elif how == "zero":
            content[at : at + byte] = bytes(len(content[at : at + byte]))
        elif how == "repeat":
            content[at:at] = content[at : at + byte]
        else:
            del content[at:]
    return bytes(content)


def check_reading(path, steps, read, *, exact=True):
    """The file damaged, read and mended: what is read is what was read before, or one line that names a file."""
    content = path.read_bytes()
    truth, _ = attempt(read)
    path.write_bytes(damaged(content, steps))
    try:
        found, outcome = attempt(read)
    finally:
        path.write_bytes(content)
    assert not outcome.traceback, outcome.traceback
    assert outcome.is_one_line or (outcome.status == 0 and (not exact or same(found, truth))), outcome
    assert len(outcome.said) < 2000


@given(steps=damages())
@fuzz(60)
def test_concept_files(world, steps):
    check_reading(world.concepts[0], steps, lambda: load_concept(world.concepts[0])[3:])


@pytest.mark.parametrize("name", ["encoder.safetensors", "offsets.safetensors", "domain.json"])
@given(steps=damages())
@fuzz(25)
def test_domain_files(world, name, steps):
    def read():
        domain = domain_files.load_domain(world.domain)
        return domain.encoder, domain.factors, domain.domain_token, domain.scale, domain.guidance, domain.template

    check_reading(world.domain / name, steps, read)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


@given(
    name=st.sampled_from(
        ["base", "base_beside", "scale", "format", "digests", "domain_token", "checksum", "image_encoder", "", "x"]
    ),
    value=JSON,
)
@fuzz(40)
def test_facts_of_a_domain(world, name, value):
    """Any JSON for any fact, whether signed or not."""
    from e4t_jax.storage import to_signed_json

    path = world.domain / "domain.json"
    content = path.read_text()
    facts = {**json.loads(content), name: value}
    try:
        signed = to_signed_json({key: one for key, one in facts.items() if key != "checksum"})
    except (ValueError, RecursionError):  # no number is NaN in our files
        signed = None
    try:
        for text in (json.dumps(facts), signed):
            if text is not None:
                path.write_text(text)
                _, outcome = attempt(domain_files.load_domain, world.domain)
                assert not outcome.traceback, outcome.traceback
                assert outcome.status == 0 or outcome.is_one_line
    finally:
        path.write_text(content)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tif", "webp"])
@given(steps=damages(), as_mask=st.booleans())
@fuzz(15)
def test_pictures(world, suffix, steps, as_mask):
    """Only PNG tells of a change in its pixels; of the others, it must be a picture or one line."""
    folder = world.base.parent / "damaged"
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"x.{suffix}")
    (folder / "x.mask.png").unlink(missing_ok=True)
    path = folder / f"x.{suffix}"
    if as_mask:
        path = folder / "x.mask.png"
        Image.fromarray(pixels).save(path)
    check_reading(path, steps, lambda: read_image(folder / f"x.{suffix}", 16), exact=path.suffix == ".png")


@given(data=st.data(), steps=damages())
@fuzz(20)
def test_files_of_a_base(world, data, steps):
    """Configurations and words load, or one line says what is wrong; of weights, a change is noticed."""
    files = sorted(path for path in world.base.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    check_reading(path, steps, lambda: load_base(str(world.base))[1], exact=path.suffix == ".safetensors")


@pytest.mark.skipif(not HAS_TORCH, reason="the format is PyTorch's")
@given(name=checkpoints, file=st.sampled_from(["encoder.pt", "weight_offsets.pt", "unet.pt", "config.json"]), steps=damages())
@fuzz(20)
def test_public_checkpoints(world, name, file, steps):
    """PyTorch's format has no checksum that its reader asks for: what is written can be read again, or one line says why not."""
    path = world.base.parent / name / file
    if not path.exists():
        return
    content = path.read_bytes()
    with elsewhere(world) as here:
        path.write_bytes(damaged(content, steps))
        try:
            image = ["--image", world.pictures / "0.png"] if "tuned" in name else []
            outcome = call("import-reference", ["--reference", path.parent, "--base", world.base, "--out", "out", *image])
            if outcome.status == 0:
                domain_files.load_domain("out")
            else:
                assert outcome.is_one_line and not list(here.iterdir()), (outcome, list(here.iterdir()))
        finally:
            path.write_bytes(content)
            empty(here)
