"""One prepared run on a GPU: ours beside the same work in PyTorch, in the time there is.

pip install -e ".[cuda,test]"
python benchmarks/gpu.py --minutes 8 --out gpu.json

Stable Diffusion 1.5's true geometry with random weights: seconds from the start of a process to the end of its first step, with
nothing compiled yet and with all of it in the cache; pretraining, five steps of tuning, drawing. PyTorch runs diffusers' U-Net with
scaled-dot-product attention, without and with `torch.compile`. Each case is a process of its own (`gpu_ours.py`, `gpu_pytorch.py`);
what was measured when the time is over is kept. `--base creatures` rehearses all of it on a CPU. Prints a table as it grows, and
JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# (name, script, its arguments), the most wanted first; the second run of pretraining finds the programs of the first.
_CASES = [
    ("pretraining, nothing compiled", "gpu_ours.py", ["pretraining"]),
    ("pretraining", "gpu_ours.py", ["pretraining"]),
    ("pretraining, PyTorch", "gpu_pytorch.py", ["pretraining"]),
    ("tuning", "gpu_ours.py", ["tuning"]),
    ("drawing", "gpu_ours.py", ["drawing"]),
    ("drawing, PyTorch", "gpu_pytorch.py", ["drawing"]),
    ("tuning, PyTorch", "gpu_pytorch.py", ["tuning"]),
    ("pretraining, PyTorch compiled", "gpu_pytorch.py", ["pretraining", "--compile"]),
    ("drawing, PyTorch compiled", "gpu_pytorch.py", ["drawing", "--compile"]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="after them no case goes on")
    parser.add_argument("--base", default="random:sd15", help="random:sd15, random:sd21, or creatures for a rehearsal")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="what the networks compute in")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures a step of pretraining")
    parser.add_argument("--out", type=Path, help="file for the figures, written anew after each of them")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    rows: list[dict[str, Any]] = []
    print(f"{'case':34} {'figure':24} {'value':>10}", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        for name, script, arguments in _CASES:
            shared = ["--base", options.base, "--dtype", options.dtype, "--batch-size", str(options.batch_size)]
            for figures in measured([script, *arguments, *shared], deadline, cache):
                rows.append({"case": name, **figures})
                for figure, value in figures.items():
                    print(f"{name:34} {figure:24} {value if isinstance(value, str) else format(value, '10.3f')}", flush=True)
                if options.out:
                    write(options.out, summary(options, rows))
    print(json.dumps(summary(options, rows)))


def measured(command: list[str], deadline: float, cache: str) -> Iterator[dict[str, Any]]:
    """What a case prints until it ends or the time is over, as it comes; why it ended, where it failed."""
    left = deadline - time.monotonic()
    if left <= 0:
        yield {"not run": "the time was over"}
        return
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "E4T_BENCHMARK_BEGAN": str(time.time())}
    path = str(Path(__file__).with_name(command[0]))
    child = subprocess.Popen([sys.executable, path, *command[1:]], env=environment, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(left, child.kill)
    timer.start()
    assert child.stdout
    yield from (json.loads(line) for line in child.stdout if line.startswith("{"))
    timer.cancel()
    if child.wait() != 0:
        yield {"ended early": "the time was over" if time.monotonic() >= deadline else f"status {child.returncode}"}


def summary(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All figures by case, and ours over PyTorch's where both are there."""
    cases: dict[str, dict[str, Any]] = {}
    for row in rows:
        cases.setdefault(row["case"], {}).update({name: value for name, value in row.items() if name != "case"})
    ratios = {}
    for task, figure in (("pretraining", "images/s"), ("drawing", "pictures/s")):
        for rival in (f"{task}, PyTorch", f"{task}, PyTorch compiled"):
            if figure in cases.get(task, {}) and figure in cases.get(rival, {}):
                ratios[f"{task} over {rival}"] = cases[task][figure] / cases[rival][figure]
    return {"base": options.base, "dtype": options.dtype, "batch_size": options.batch_size, "cases": cases, "ratios": ratios}


def write(path: Path, figures: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(figures, indent=1))
    partial.rename(path)


if __name__ == "__main__":
    main()
