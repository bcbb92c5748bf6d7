"""Odd checkpoints of the public PyTorch implementation: one kind of the odd inputs (`odd_inputs`)."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from public_checkpoints import HAS_TORCH
from sandbox import Case, attempt

from e4t_jax.files.domain_files import load_domain
from e4t_jax.testing import World


def imports(world: World, generator: random.Random) -> Iterator[Case]:
    """Checkpoints of the public code: both formats, damaged, mixed up, with odd settings; where PyTorch is there to read them."""
    if not HAS_TORCH:
        return
    public, eyes = world.base.parent, ["--image-encoder", world.base / "image_encoder"]
    picture = ["--image", world.pictures / "0.png"]

    def reference(name: str, *more, base: Path = world.base) -> list:
        return ["--reference", public / name, "--base", base, "--out", "out", *more]

    def can_be_read() -> bool:
        """What was written, where it was not refused."""
        return not Path("out").exists() or attempt(load_domain, "out")[1].status == 0

    def rewrite(file: str, change: Callable[[dict], object]) -> Callable[[], None]:
        def now() -> None:
            import torch

            path = public / "pretrained" / file
            if path.suffix == ".json":
                path.write_text(json.dumps(change(json.loads(path.read_text()))))
            else:
                torch.save(change(torch.load(path, weights_only=True)), path)

        return now

    for name, more in (("pretrained", []), ("tuned", picture)):
        yield Case("imports", "right", "import-reference", reference(name, *more), holds=can_be_read)
    for name, more in (
        ("tuned", []),
        ("newer-tuned", []),
        ("pretrained", eyes),
        ("newer-pretrained", eyes),  # of another width than the checkpoint's
        ("newer-pretrained", ["--image-encoder", "nowhere"]),
        ("newer-pretrained", ["--image-encoder", world.domain]),
        ("tuned", ["--image", world.base.parent / "notes.txt"]),
        ("pretrained", ["--open-clip", "2.24"]),
        ("nowhere", []),
        ("pictures", []),
        ("domain", []),
    ):
        yield Case("imports", "refused", "import-reference", reference(name, *more))
    for place in (world.domain, world.pictures, public / "nowhere", public / "pretrained"):
        yield Case("imports", "refused", "import-reference", reference("pretrained", base=place))
    for place in ("x" * 300, "/proc/e4t", "/dev/null", "a\0b"):
        yield Case("imports", "refused", "import-reference", [*reference("pretrained"), "--out", place])
    for name, values in {
        "domain_class_token": (None, "", "two words", 7),
        "domain_embed_scale": ("x", float("nan"), 0, -1, True),
        "reg_lambda": ("x", float("inf"), -1, [1]),
    }.items():
        for value in values:
            changed = rewrite("config.json", lambda facts, n=name, v=value: {**facts, n: v})
            yield Case("imports", "refused", "import-reference", reference("pretrained"), changed)
    for value in (None, 7, ["x"], "x" * 5000, "{placeholder_token}"):
        changed = rewrite("config.json", lambda facts, v=value: {**facts, "prompt_template": v})
        yield Case("imports", "either", "import-reference", reference("pretrained"), changed, can_be_read)
    for file in ("encoder.pt", "weight_offsets.pt"):
        for change in (
            lambda state: dict(list(state.items())[: len(state) // 2]),
            lambda state: {name: tensor * float("nan") for name, tensor in state.items()},
            lambda state: {name: tensor[..., :-1] for name, tensor in state.items()},
            lambda state: {name: tensor.flatten() for name, tensor in state.items()},
            lambda state: {name: tensor.tolist() for name, tensor in state.items()},
            lambda state: list(state.values()),
            lambda state: {},
        ):
            yield Case("imports", "refused", "import-reference", reference("pretrained"), rewrite(file, change))
        wrapped = rewrite(file, lambda state: {"state_dict": {f"module.{name}": one.double() for name, one in state.items()}})
        yield Case("imports", "right", "import-reference", reference("pretrained"), wrapped, can_be_read)
