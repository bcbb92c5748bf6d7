"""A thousand pictures of the drawn world, three of them broken, in a run that is killed at half and resumed.

python benchmarks/thousand.py --pictures 1000 --out outputs/thousand

Checks that the first run's concepts are not touched by the second, that every picture but the broken ones has its concept, and that
the broken ones are named; watches the memory of the process. Prints what it found, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_BROKEN = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("outputs/thousand"), help="an empty folder, or none")
    parser.add_argument("tuning", nargs="*", help="further options of `e4t tune`, after --")
    options = parser.parse_args()
    given, concepts = options.out / "given", options.out / "concepts"
    if concepts.exists():
        parser.error(f"{concepts} is there already")
    paths = draw_pictures(options.pictures, given)
    command = [sys.executable, "-m", "e4t_jax.cli", "tune", "--out", str(concepts), "--resume", *options.tuning]
    command += ["--images", *map(str, paths)]
    first = watch(command, concepts, stop_at=options.pictures // 2)
    kept = {path: path.stat().st_mtime_ns for path in concepts.glob("*.safetensors")}
    second = watch(command, concepts)
    again = [path.name for path, then in kept.items() if path.stat().st_mtime_ns != then]
    facts = {
        "pictures": options.pictures,
        "options": options.tuning,
        "concepts": len(list(concepts.glob("*.safetensors"))),
        "left_over": [path.name for path in concepts.glob(".*")],
        "kept": len(kept),
        "tuned_again": len(again),
        "failed": json.loads((concepts / "tune.json").read_text())["failed"],
        "killed": first,
        "resumed": second,
    }
    print(json.dumps(facts, indent=2))
    print(json.dumps(facts))


def draw_pictures(count: int, folder: Path) -> list[Path]:
    """PNG files of validation identities; three of them empty, a text, and cut off."""
    from e4t_jax.creatures.judging.personalisation_trial import held_out, write_pictures

    paths = write_pictures(held_out(3, count, split="validation"), folder, "picture")
    empty, text, cut = (paths[row] for row in (count // 10, count // 3, count - 2))
    empty.write_bytes(b"")
    text.write_text("no picture")
    cut.write_bytes(cut.read_bytes()[:-100])
    return paths


def watch(command: list[str], concepts: Path, stop_at: int | None = None) -> dict:
    """Runs a command, kills it when there are `stop_at` concepts; its memory in GB at the first concept, at most and at the end."""
    began, resident = time.perf_counter(), []
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(command, stderr=errors) as process:
        while process.poll() is None:
            time.sleep(2)
            there = len(list(concepts.glob("*.safetensors")))
            memory = resident_gb(process.pid)
            if there and memory:
                resident.append(memory)
            if stop_at is not None and there >= stop_at:
                process.kill()
        errors.seek(0)
        said = [line.rsplit("\r", 1)[-1] for line in errors.read().splitlines()]
    seconds = time.perf_counter() - began
    figures = {"first": resident[0], "most": max(resident), "last": resident[-1]}
    return {"status": process.returncode, "seconds": round(seconds), "memory_gb": figures, "said": said[-1 - _BROKEN :]}


def resident_gb(process: int) -> float:
    """Of Linux; 0 of a process that has just ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1e6
    except (OSError, StopIteration):
        return 0.0


if __name__ == "__main__":
    main()
