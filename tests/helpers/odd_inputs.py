"""About four hundred odd or bad inputs, made anew from a seed: `python tests/odd_inputs.py [SEED]`; JSON on the last line.

Each is a call of a command, in process, on a tiny world in which nothing is compiled. Three questions are asked of it: is there a
traceback, is what was there before still there, and, where all went well, is the result the right one? What each kind of input
may end with is said beside it: "refused" (one line), "right" (as if nothing were odd) or "either".
"""

import collections
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from odd_checkpoints import imports
from PIL import Image
from sandbox import Case, Outcome, call, half_written, make_world, nothing_compiled, snapshot

from e4t_jax.data.images import read_image, to_uint8
from e4t_jax.storage import pack
from e4t_jax.testing import World


def tune(world: World, *images, more=()):
    return ["--images", *(images or [world.pictures / "0.png"]), "--domain", world.domain, "--out", "out", "--steps", "1", *more]


def generate(world: World, *concepts, more=()):
    fixed = ["--domain", world.domain, "--out", "out", "--steps", "1"]
    return ["--concepts", *(concepts or world.concepts), "--prompts", "a *s", *fixed, *more]


def export(world: World, more=()):
    return ["--concept", world.concepts[0], "--domain", world.domain, "--out", "out", *more]


def pretrain(world: World, more=()):
    small = ["--steps", "2", "--batch-size", "2", "--domain-token", "creature", "--checkpoint-every", "1"]
    return ["--base", world.base, "--data", f"folder:{world.pictures}", "--out", "out", "--work", "work", *small, *more]


def cached(world: World, more=()):
    return ["--base", world.base, "--data", f"folder:{world.pictures}", "--out", "out", "--batch-size", "2", *more]


RIGHT = {"tune": tune, "generate": generate, "export": export, "pretrain": pretrain, "cache": cached}


def numbers(world: World, generator: random.Random) -> Iterator[Case]:
    """Numbers out of range, not finite, not whole, or none."""
    bad = ["nan", "inf", "-inf", "-1", "1e400", "x", "", "9" * 400, "9" * 5000, "1.5", str(-generator.randrange(1, 10**9))]
    flags = {
        "tune": ["steps", "batch-size", "seed", "learning-rate", "word-rate", "regularisation"],
        "generate": ["steps", "seed", "guidance"],
        "pretrain": ["steps", "batch-size", "seed", "learning-rate", "regularisation", "checkpoint-every"],
        "cache": ["views", "batch-size", "seed", "workers"],
    }
    real = ("learning-rate", "word-rate", "regularisation", "guidance")
    for command, names in flags.items():
        for name in names:
            for value in bad:
                may = "either" if name in real and value in ("-1", "1.5", bad[-1]) else "refused"
                yield Case("numbers", may, command, RIGHT[command](world, more=[f"--{name}", value]))
    for name in ("steps", "batch-size"):
        yield Case("numbers", "refused", "pretrain", pretrain(world, more=[f"--{name}", "0"]))


def words(world: World, generator: random.Random) -> Iterator[Case]:
    """Unknown names, prompts and captions that will not do, flags that are none, options left without value."""
    odd = "".join(generator.choices("bcdfghjklmnpqrstvwxz", k=9))
    for command, names in {
        "tune": ["scope", "mask", "bogus"],
        "generate": ["sampling", "bogus"],
        "export": ["format", "dtype", "bogus"],
        "pretrain": ["template", "domain-token", "clip-features", "parallel", "data", "base", "bogus", "image-encoder"],
        "cache": ["clip-features", "kept", "dtype", "data", "base", "bogus", "image-encoder"],
    }.items():
        for name in names:
            for value in (odd, "", "two words"):
                yield Case("words", "refused", command, RIGHT[command](world, more=[f"--{name}", value]))
        if command not in ("pretrain", "cache"):  # which ask for no more
            yield Case("words", "refused", command, ["--out", "out"])
        yield Case("words", "refused", command, [*RIGHT[command](world), "--out"])
    for prompt in ("", "no placeholder", "*sun", "*s " * 500, "x" * 5000, f"{odd} " * 90 + "*s"):
        yield Case("words", "refused", "generate", generate(world, more=["--prompts", prompt]))
        yield Case("words", "refused", "tune", tune(world, more=["--caption", prompt]))
    yield Case("words", "refused", "generate", ["--concepts", "--prompts", "*s", "--out", "out"])
    yield Case("words", "refused", "generate", ["--concepts", world.concepts[0], "--prompts", "--out", "out"])
    yield Case("words", "refused", "tune", ["--images", "--out", "out"])


def places(world: World, generator: random.Random) -> Iterator[Case]:
    """Folders that cannot be written or read, files where folders are expected and the other way round."""
    Path("mine").write_text("mine")
    for command in RIGHT:
        for place in ("mine", "mine/below", "/proc/e4t", "/dev/null", "x" * 300, "a\0b"):
            right = RIGHT[command](world)
            right[right.index("--out") + 1] = place
            yield Case("places", "refused", command, right, holds=lambda: Path("mine").read_text() == "mine")
    for place in ("mine", "mine/below", "/proc/e4t", "x" * 300):
        yield Case("places", "refused", "pretrain", pretrain(world, more=["--work", place]))
    for place in ("nowhere", "", world.pictures, world.base, world.concepts[0], "x" * 5000, "a\nb"):
        for command in ("tune", "generate", "export"):
            yield Case("places", "refused", command, RIGHT[command](world, more=["--domain", place]))
    for place in ("nowhere", world.pictures, world.concepts[0], "x" * 5000):
        yield Case("places", "refused", "pretrain", pretrain(world, more=["--base", place]))
        yield Case("places", "refused", "pretrain", pretrain(world, more=["--data", f"folder:{place}/none"]))


def pictures(world: World, generator: random.Random) -> Iterator[Case]:
    """Pictures and masks of every mode, and files that are none."""
    seed = generator.randrange(10**6)
    truth = np.random.default_rng(seed).integers(40, 200, (4, 4, 3), np.uint8).repeat(6, 0).repeat(6, 1)
    picture, grey = Image.fromarray(truth), Image.fromarray(truth[..., 0])

    def is_read(path: Path, colours: np.ndarray, tolerance: int) -> Callable[[], bool]:
        return lambda: bool(np.abs(to_uint8(read_image(path, 24)[0]).astype(int) - colours).max() <= tolerance)

    written: dict[str, tuple[Image.Image, np.ndarray, int]] = {
        "rgb.png": (picture, truth, 0),
        "rgb.bmp": (picture, truth, 0),
        "palette.png": (picture.quantize(256), truth, 2),
        "palette.gif": (picture.quantize(256), truth, 2),
        "cmyk.tif": (picture.convert("CMYK"), truth, 2),
        "alpha.png": (picture.convert("RGBA"), truth, 0),
        "grey.png": (grey, truth[..., :1], 0),
        "greyalpha.png": (grey.convert("LA"), truth[..., :1], 0),
        "deep.png": (Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), truth[..., :1], 1),
        "deep.tif": (Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), truth[..., :1], 1),
        "float.tif": (Image.fromarray(np.asarray(grey, np.float32) / 255), truth[..., :1], 1),
        "float255.tif": (Image.fromarray(np.asarray(grey, np.float32)), truth[..., :1], 1),
        "whole.tif": (Image.fromarray(np.asarray(grey, np.int32)), truth[..., :1], 1),
        "rgb.webp": (picture, truth, 0),
        "rgb.jpg": (picture, truth, 6),
    }
    for name, (image, colours, tolerance) in written.items():
        path = Path(name).absolute()
        image.save(path, **{".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}}.get(path.suffix, {}))
        yield Case("pictures", "right", "tune", tune(world, path), holds=is_read(path, colours, tolerance))
    # EXIF rotations: as the owner saw it, whichever way it was stored.
    for turn, back in {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.items():
        exif, path = Image.Exif(), Path(f"turned{turn}.png").absolute()
        exif[0x0112] = turn
        (picture if back is None else picture.transpose(Image.Transpose(back))).save(path, exif=exif)
        yield Case("pictures", "right", "tune", tune(world, path), holds=is_read(path, truth, 0))
    bad = {
        "empty.png": b"",
        "zero.png": bytes(3000),
        "text.jpg": b"no picture",
        "drawing.svg": b"<svg/>",
        "archive.png": b"PK\x03\x04" + bytes(90),
        "negative.tif": np.asarray(grey, np.float32) - 90,
        "nan.tif": np.asarray(grey, np.float32) * np.nan,
        "dot.png": truth[:1, :1],
        "narrow.png": np.zeros((9, 1000, 3), np.uint8),
        "transparent.png": np.zeros((20, 20, 4), np.uint8),
    }
    for name, content in bad.items():
        path = Path(name).absolute()
        path.write_bytes(content) if isinstance(content, bytes) else Image.fromarray(content).save(path)
        yield Case("pictures", "refused", "tune", tune(world, path))
    noise = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)
    for suffix in ("png", "jpg", "bmp", "tif"):
        for share in (generator.uniform(0.1, 0.4), generator.uniform(0.5, 0.9)):
            path = Path(f"cut{share:.3f}.{suffix}").absolute()
            Image.fromarray(noise).save(path)
            path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
            yield Case("pictures", "refused", "tune", tune(world, path))
    # Masks: black, of another size, no picture, of other modes, caught by a shell's glob.
    for name, mask in {
        "black": Image.new("L", (24, 24)),
        "small": Image.new("L", (20, 24), 255),
        "clear": Image.new("RGBA", (24, 24)),
    }.items():
        path = Path(f"{name}.png").absolute()
        picture.save(path)
        mask.save(path.with_name(f"{name}.mask.png"))
        yield Case("masks", "refused", "tune", tune(world, path))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "F"):
        shape = Image.fromarray(np.pad(np.full((12, 12), 255, np.uint8), 6)).convert(mode)
        path, suffix = Path(f"masked{mode}.png").absolute(), "tif" if mode in "IF" else "png"
        picture.save(path)
        shape.save(path.with_name(f"masked{mode}.mask.png"), format="TIFF" if suffix == "tif" else "PNG")
        yield Case("masks", "right", "tune", tune(world, path), holds=lambda path=path: read_image(path, 24)[1].sum() == 144)
    globbed = [Path("maskedL.png").absolute(), Path("maskedL.mask.png").absolute()]
    files = {"maskedL.safetensors", "tune.json"}
    yield Case("masks", "right", "tune", tune(world, *globbed), holds=lambda: set(os.listdir("out")) == files)
    yield Case("masks", "refused", "tune", tune(world, globbed[1]))
    # One name for two.
    os.makedirs("other", exist_ok=True)
    picture.save("other/rgb.png")
    yield Case("names", "refused", "tune", tune(world, Path("rgb.png"), Path("other/rgb.png")))
    shutil.copy(world.concepts[0], "other/venus.safetensors")
    yield Case("names", "refused", "generate", generate(world, world.concepts[0], Path("other/venus.safetensors")))


def files(world: World, generator: random.Random) -> Iterator[Case]:
    """Files of ours that were flipped, cut, emptied, deleted or swapped, or whose header is odd; facts out of reason."""

    def spoil(path: Path, change: Callable[[bytes], bytes | None]) -> Callable[[], None]:
        def now():
            content = change(path.read_bytes())
            path.unlink() if content is None else path.write_bytes(content)

        return now

    def flip(content: bytes) -> bytes:
        at = generator.randrange(len(content))
        return content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :]

    def cut(content: bytes) -> bytes:
        return content[: generator.randrange(len(content))]

    changes: list[Callable[[bytes], bytes | None]] = [
        *[flip] * 6,
        *[cut] * 3,
        lambda _: b"",
        lambda _: None,
        lambda content: content + b"x",
    ]
    for path, command in {
        world.concepts[0]: "generate",
        world.domain / "encoder.safetensors": "tune",
        world.domain / "offsets.safetensors": "generate",
        world.domain / "domain.json": "export",
    }.items():
        for change in changes:
            yield Case("damaged", "refused", command, RIGHT[command](world), spoil(path, change))
    kept = world.base.parent / "kept"
    for path in sorted(kept.iterdir()):
        for change in changes:
            yield Case("damaged", "refused", "pretrain", pretrain(world, more=["--data", f"cache:{kept}"]), spoil(path, change))
    yield Case("damaged", "right", "pretrain", pretrain(world, more=["--data", f"cache:{kept}"]))
    yield Case("damaged", "refused", "cache", cached(world, more=["--out", str(kept)]))
    yield Case("damaged", "refused", "generate", generate(world, world.domain / "encoder.safetensors"))
    yield Case("damaged", "refused", "generate", generate(world, world.pictures / "0.png"))
    facts = json.loads((world.domain / "domain.json").read_text())
    for name in facts:
        without = {key: value for key, value in facts.items() if key != name}
        may = "either" if name in ("checksum", "base_beside") else "refused"
        yield Case(
            "damaged",
            may,
            "generate",
            generate(world),
            spoil(world.domain / "domain.json", lambda _, w=without: json.dumps(w).encode()),
        )
    header = {"kind": "e4t concept", "scope": "compact", "domain": "another"}
    for tensors, own in (({"folded": np.ones(16)}, header), ({"folded": np.ones(16)}, {}), ({"x": np.ones(16)}, header)):
        yield Case(
            "damaged", "refused", "generate", generate(world), spoil(world.concepts[0], lambda _, t=tensors, h=own: pack(t, h))
        )
    bases = sorted(path for path in world.base.rglob("*") if path.is_file())
    for path in bases:
        for change in (cut, lambda _: b"", lambda _: None):
            yield Case("damaged base", "either", "pretrain", pretrain(world), spoil(path, change))


def runs(world: World, generator: random.Random) -> Iterator[Case]:
    """A work folder that holds a run: other facts, no --resume, damaged checkpoints."""

    def run_first():
        assert call("pretrain", pretrain(world)).status == 0

    def damage(change: Callable[[Path], None]) -> Callable[[], None]:
        def now():
            run_first()
            change(Path("work/checkpoints"))

        return now

    def kept() -> bool:
        return {"1", "2", "facts.json"} <= set(os.listdir("work/checkpoints"))

    yield Case("runs", "refused", "pretrain", pretrain(world), run_first, kept)
    yield Case("runs", "refused", "pretrain", pretrain(world, more=["--template", "bogus"]), run_first, kept)
    for more in (
        ["--seed", "5"],
        ["--learning-rate", "1e-4"],
        ["--domain-token", "cat"],
        ["--template", "object"],
        ["--regularisation", "1"],
    ):
        yield Case("runs", "refused", "pretrain", pretrain(world, more=[*more, "--resume"]), run_first, kept)
        yield Case("runs", "refused", "pretrain", pretrain(world, more=more), run_first, kept)
    for more in (["--steps", "3"], ["--batch-size", "4"], ["--checkpoint-every", "2"], []):
        yield Case("runs", "right", "pretrain", pretrain(world, more=[*more, "--resume"]), run_first)
    yield Case("runs", "right", "pretrain", pretrain(world, more=["--resume"]))

    def spoil(step: int, how: str) -> Callable[[Path], None]:
        def now(folder: Path) -> None:
            paths = sorted(path for path in (folder / str(step)).rglob("*") if path.is_file() and path.stat().st_size)
            path = generator.choice(paths)
            path.unlink() if how == "deleted" else path.write_bytes(b"" if how == "emptied" else path.read_bytes()[:-1])

        return now

    for how in ("deleted", "emptied", "cut"):
        for _ in range(3):
            yield Case("runs", "right", "pretrain", pretrain(world, more=["--resume", "--steps", "3"]), damage(spoil(2, how)))
    yield Case(
        "runs", "refused", "pretrain", pretrain(world, more=["--resume"]), damage(lambda folder: (folder / "facts.json").unlink())
    )


KINDS = (numbers, words, places, pictures, files, runs, imports)


def ask(case: Case, world: World) -> tuple[Outcome, str]:
    """The outcome of a case, and what is wrong with it, if anything."""
    case.prepare()
    shutil.rmtree("out", ignore_errors=True)
    before = snapshot(Path.cwd().parent)
    outcome = call(case.command, case.arguments)
    after = snapshot(Path.cwd().parent)
    gone = {path for path, state in before.items() if state is not None and after.get(path) != state and "/work/" not in path}
    wrong = ""
    if outcome.traceback:
        wrong = f"traceback: {outcome.traceback.strip().splitlines()[-1]}"
    elif outcome.status and not outcome.is_one_line:
        wrong = f"not one line: {outcome.said!r}"
    elif case.may == "refused" and outcome.status == 0:
        wrong = "silently wrong: it should have been refused"
    elif case.may == "right" and outcome.status:
        wrong = f"refused, and right: {outcome.said}"
    elif not case.holds():
        wrong = "silently wrong: the result is not the right one"
    elif gone or half_written(before, after):
        wrong = f"silently wrong: {sorted(gone) or half_written(before, after)}"
    return outcome, wrong


def main(seed: int = 0) -> dict[str, int]:
    """Asks all cases; prints a table by kind, and what is wrong."""
    generator = random.Random(seed)
    table: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    figures = {"inputs": 0, "tracebacks": 0, "silently_wrong": 0, "refused_though_right": 0}
    start = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, nothing_compiled():
        whole = Path(folder, "whole")
        world = make_world(whole)
        here = whole / "here"
        here.mkdir()
        kept = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
        os.chdir(here)
        try:
            for kind in KINDS:
                for case in kind(world, generator):
                    outcome, wrong = ask(case, world)
                    figures["inputs"] += 1
                    figures["tracebacks"] += wrong.startswith("traceback")
                    figures["silently_wrong"] += wrong.startswith(("silently", "not one line"))
                    figures["refused_though_right"] += wrong.startswith("refused")
                    table[case.kind]["inputs"] += 1
                    table[case.kind]["one line" if outcome.is_one_line else "right" if outcome.status == 0 else "other"] += 1
                    table[case.kind]["wrong"] += bool(wrong)
                    if wrong:
                        print(f"{case.kind}: {case.command} {' '.join(map(str, case.arguments))[:300]}\n    {wrong[:600]}")
                    for path, content in kept.items():
                        if not path.exists() or path.read_bytes() != content:
                            path.write_bytes(content)
                    for leftover in ("work", "out"):
                        shutil.rmtree(leftover, ignore_errors=True)
        finally:
            os.chdir(start)
    columns = ("inputs", "one line", "right", "other", "wrong")
    print(f"| kind | {' | '.join(columns)} |\n| --- | {' | '.join('---' for _ in columns)} |")
    for name, row in table.items():
        print(f"| {name} | {' | '.join(str(row[column]) for column in columns)} |")
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    found = main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    sys.exit(found["tracebacks"] + found["silently_wrong"] + found["refused_though_right"] > 0)
