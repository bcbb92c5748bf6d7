"""Pretrains a domain: the encoder and the weight offsets learn one domain of pictures on a frozen base model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax

from e4t_jax.cli.cores import use_all_cores
from e4t_jax.cli.progress import say, steps_bar
from e4t_jax.cli.run import Inline, NetworkCommand, value_of
from e4t_jax.cli.signals import stop_on_request
from e4t_jax.errors import Stopped, UserError
from e4t_jax.files.domain_files import save_domain
from e4t_jax.pretraining.pretrain import pretrain
from e4t_jax.pretraining.settings import DomainSettings, preset_of
from e4t_jax.pretraining.step import PretrainSettings
from e4t_jax.storage import check_writable
from e4t_jax.training.processes import Processes, is_first, joined, stop_of_all


@dataclass(frozen=True)
class Config(NetworkCommand):
    """Pretrain encoder and weight offsets on one domain of pictures."""

    example = "e4t pretrain --base stable-diffusion-v1-5/stable-diffusion-v1-5 --data folder:cats --domain-token cat --out cats"

    out: Path
    """Folder of the domain: domain.json, encoder.safetensors, offsets.safetensors."""
    base: str = "creatures"
    """Base model: "creatures", a Hub id, a diffusers folder, random:sd15 or random:sd21."""
    image_encoder: str | None = None
    """CLIP's, where the base brings none: Hub id or folder, random:vit-l14 or random:vit-h14; else the paper's ViT-H/14."""
    data: str = "creatures"
    """Pictures: creatures, fish, tfds:NAME, folder:DIR, cache:DIR that `e4t cache` wrote, or a source's MODULE:FUNCTION."""
    work: Path | None = None
    """Folder for data sets and checkpoints of this run alone; outputs/pretrain/NAME for an --out called NAME where not given."""
    resume: bool = False
    """Go on from the latest checkpoint in --work, or start where there is none yet."""
    profile: bool = False
    """Leave a trace of three steps in --work, for TensorBoard's profiler, XProf or Perfetto."""
    domain: Annotated[DomainSettings, Inline] = dataclasses.field(kw_only=True)
    training: Annotated[PretrainSettings, Inline] = PretrainSettings()
    processes: Annotated[Processes, Inline] = Processes()

    @classmethod
    def with_defaults(cls, arguments: Sequence[str]) -> type[Config]:
        """The options with the defaults of the preset of --data, or else of --base."""
        preset = preset_of(value_of(arguments, "--base") or cls.base, value_of(arguments, "--data") or cls.data)
        if preset is None:
            return cls
        fields = [
            ("domain", Annotated[DomainSettings, Inline], dataclasses.field(default=preset.domain, kw_only=True)),
            ("training", Annotated[PretrainSettings, Inline], preset.training),
        ]
        return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), frozen=True, namespace={"__doc__": cls.__doc__})


def main(config: Config) -> None:
    with joined(config.processes):
        use_all_cores()
        _pretrain(config, is_first())


def _pretrain(config: Config, first: bool) -> None:
    work = config.work or Path("outputs/pretrain") / config.out.resolve().name
    preset = preset_of(config.base, config.data)
    if first:
        check_writable(config.out)
    with stop_on_request() if jax.process_count() == 1 else contextlib.nullcontext(stop_of_all()) as stop:
        try:
            domain = pretrain(
                config.base,
                config.data,
                config.domain,
                config.training,
                work=work,
                resume=config.resume,
                image_encoder=config.image_encoder,
                preset=None if preset is None else preset.name,
                policy=config.policy(),
                track=steps_bar("pretraining") if first else iter,
                say=say if first else lambda line: None,
                profile=config.profile,
                stop=stop,
            )
        except Stopped as stopped:
            if first:
                say(f"Stopped as asked, after saving step {stopped.step} in {work}; the same command with --resume goes on.")
            return
        except UserError as error:
            if error.argument == "work" and config.work is None:  # it follows from --out
                raise UserError(error.message, "out") from None
            raise
    if first:
        save_domain(config.out, domain)
        print(f"Wrote {config.out}")
