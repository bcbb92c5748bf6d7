"""Pretrains a domain: the encoder and the weight offsets learn one domain of pictures on a frozen base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from e4t_jax.cli.shared import Inline, NetworkCommand, say, steps_bar, stop_on_request, use_all_cores
from e4t_jax.domain_files import save_domain
from e4t_jax.errors import Stopped
from e4t_jax.pretraining import DomainSettings, pretrain
from e4t_jax.storage import check_writable
from e4t_jax.training.pretrain import PretrainSettings


@dataclass(frozen=True)
class Config(NetworkCommand):
    """Pretrain encoder and weight offsets on one domain of pictures."""

    out: Path
    """Folder of the domain: domain.json, encoder.safetensors, offsets.safetensors."""
    base: str = "creatures"
    """Base model: "creatures", a Hub id, a diffusers folder, random:sd15 or random:sd21."""
    image_encoder: str | None = None
    """CLIP's, where the base brings none: Hub id or folder, random:vit-l14 or random:vit-h14; else the paper's ViT-H/14."""
    remat: Literal["none", "blocks"] = "none"
    """What is computed again for the gradient rather than kept: nothing, or every block of the networks (less memory)."""
    data: str = "creatures"
    """Pictures: creatures, tfds:NAME or folder:DIR."""
    work: Path | None = None
    """Folder for data sets and checkpoints of this run alone; outputs/pretrain/ and the name of --out where not given."""
    resume: bool = False
    """Go on from the latest checkpoint in --work, or start where there is none yet."""
    domain: Annotated[DomainSettings, Inline] = DomainSettings()
    training: Annotated[PretrainSettings, Inline] = PretrainSettings()


def main(config: Config) -> None:
    use_all_cores()
    check_writable(config.out)
    work = config.work or Path("outputs/pretrain") / config.out.resolve().name
    with stop_on_request() as stop:
        try:
            domain = pretrain(
                config.base,
                config.data,
                config.domain,
                config.training,
                work=work,
                resume=config.resume,
                image_encoder=config.image_encoder,
                policy={"dtype": config.dtype, "remat": config.remat},
                track=steps_bar("pretraining"),
                say=say,
                stop=stop,
            )
        except Stopped as stopped:
            say(f"Stopped as asked, after saving step {stopped.step} in {work}; the same command with --resume goes on.")
            return
    save_domain(config.out, domain)
    print(f"Wrote {config.out}")
