"""A concept in the forms that diffusers' PyTorch pipelines load: a merged model, a LoRA, a word embedding.

Outside this library the word cannot be predicted anew at every step. One constant word stands for all: the mean of the words
along sampling trajectories of the domain's own prompts, which is the constant nearest to them in squares.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from safetensors.numpy import save

from e4t_jax import bases
from e4t_jax.bases import Params, StableDiffusion
from e4t_jax.checks import Between, Whole, check_range
from e4t_jax.concept import Concept
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.files.places import local_path
from e4t_jax.objective import effective_unet
from e4t_jax.offsets import delta
from e4t_jax.sample import DrawnConcept, SampleSettings, sample_latents
from e4t_jax.storage import check_writable, write_file
from e4t_jax.templates import templates
from e4t_jax.words import PLACEHOLDER, check_placeholder

FORMATS = ("diffusers", "lora", "embedding")
_DTYPES = ("float16", "float32")
_PROMPTS = 4
RANK = Whole(1, 10**9)  # beyond a kernel's smaller side it gains nothing, and is not taken
ERROR = Between(0, 1)


class Exported(NamedTuple):
    """What was written to `folder`: the prompt word of the concept, or the rank of its LoRA and what it misses (`Lora.error`)."""

    folder: Path
    token: str | None = None
    rank: int | None = None
    error: float | None = None


class Lora(NamedTuple):
    """Low-rank updates of the U-Net's attention in diffusers' names, and what they miss: ‖W ⊙ Δ - up down‖ / ‖W ⊙ Δ‖."""

    tensors: dict[str, np.ndarray]
    rank: int
    error: float


def export_concept(
    domain: Domain,
    concept: Concept,
    out: str | Path,
    *,
    format: str = "diffusers",
    rank: int | None = None,
    error: float = 0.05,
    token: str = PLACEHOLDER,
    dtype: str = "float16",
) -> Exported:
    """Writes a concept for diffusers' PyTorch pipelines of Stable Diffusion.

    Args:
        domain: The domain that the concept was tuned in.
        concept: The concept.
        out: Folder to write.
        format: "diffusers", a whole model for `StableDiffusionPipeline.from_pretrained`; "lora", the U-Net's change for
            `load_lora_weights`; "embedding", the word alone for `load_textual_inversion`.
        rank: Of the LoRA; where it is not given, the smallest that misses no more than `error` of the change.
        error: What a LoRA may miss: the relative error of its update, over all kernels.
        token: The concept's word in PyTorch's prompts.
        dtype: Precision of the weights, "float16" or "float32".

    Errors: `UserError` for a concept of another domain, a base other than Stable Diffusion, a token that is a word already, a
        concept that the format cannot hold, and a folder that cannot be written.
    """
    out = local_path(out, "out")
    _check_export(domain, concept, out, format, dtype)
    if format == "lora":
        update = lora(domain, concept, rank, error)
        _write_tensors(out / "pytorch_lora_weights.safetensors", update.tensors, dtype)
        return Exported(out, rank=update.rank, error=update.error)
    check_token(domain, token)
    word = constant_word(domain, concept)
    if format == "embedding":
        _write_tensors(out / "learned_embeds.safetensors", {token: word}, dtype)
    else:
        bases.save_folder(out, *merged_base(domain, concept, word, token), np.dtype(dtype))
    return Exported(out, token=token)


def _check_export(domain: Domain, concept: Concept, out: Path, format: str, dtype: str) -> None:
    """Errors: `UserError` as `export_concept`, for all that is known before anything is computed."""
    for argument, value, known in (("format", format, FORMATS), ("dtype", dtype, _DTYPES)):
        if value not in known:
            raise UserError(f"{value!r} is unknown; choose one of {', '.join(known)}.", argument)
    if concept.domain != domain.fingerprint:
        raise UserError(f"{concept.name} was tuned in another domain or on another base; give the domain it was tuned with.")
    _stable_diffusion(domain)
    check_writable(out)
    base = bases.local_folder(domain.base_name)
    if format == "diffusers" and base is not None and out.exists() and out.samefile(base):
        raise UserError(f"{out} holds the base that the domain was trained on; choose another folder.", "out")


def _stable_diffusion(domain: Domain) -> StableDiffusion:
    """The domain's base. Errors: `UserError` for one of another architecture."""
    if not isinstance(domain.base, StableDiffusion):
        kind = type(domain.base).__name__
        raise UserError(f"{domain.base_name} is a {kind}; only concepts on Stable Diffusion can be exported.", "domain")
    return domain.base


def _write_tensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    """A safetensors file for PyTorch."""
    write_file(path, save({name: tensor.astype(dtype) for name, tensor in tensors.items()}, {"format": "pt"}))


def constant_word(domain: Domain, concept: Concept, *, steps: int = 25, seed: int = 0) -> Float[np.ndarray, " text_width"]:
    """The mean of e* over all sampling steps of some of the domain's prompts."""
    prompts = list(templates(domain.template))[:_PROMPTS]
    run = domain.drawing(prompts, SampleSettings(seed=seed, steps=steps, sampling="ddim"))
    _, words = jax.jit(sample_latents)(run, DrawnConcept(concept.trainable, jnp.asarray(concept.folded)))
    return np.asarray(words.mean(axis=(0, 1)))


def check_token(domain: Domain, token: str) -> str:
    """Makes sure that an exported word can be told from all others.

    Errors: `UserError` when it is empty, holds white space, or is a word of the tokenizer already.
    """
    try:
        check_placeholder(domain.base.tokenizer, token)
    except UserError as error:
        raise UserError(error.message, "token") from None
    if token in domain.base.tokenizer.get_vocab():
        raise UserError(f"{token!r} is a word of the vocabulary already; choose another, such as '<venus>'.", "token")
    return token


def merged_base(
    domain: Domain, concept: Concept, word: Float[np.ndarray, " text_width"], token: str = PLACEHOLDER
) -> tuple[StableDiffusion, Params]:
    """A base of its own in which the prompt word `token` is the concept: offsets merged, token and embedding added.

    Errors: `UserError` as `check_token`, for a base other than Stable Diffusion, and for a tokenizer that does not fit its text
        encoder.
    """
    own = _stable_diffusion(domain)
    check_token(domain, token)
    # Here the placeholder is the same in upper case; PyTorch's tokenizer tells added words apart.
    spellings = list(dict.fromkeys([token, token.lower(), token.upper()]))
    tokenizer = copy.deepcopy(own.tokenizer)
    tokenizer.add_tokens(spellings)
    text = jax.tree.map(lambda leaf: leaf, domain.params["text_encoder"])  # a new tree of the same leaves
    text.pop("text_projection", None)
    embedding = text["text_model"]["embeddings"]["token_embedding"]["embedding"]
    rows = jnp.asarray(np.tile(word, (len(spellings), 1)))
    text["text_model"]["embeddings"]["token_embedding"]["embedding"] = jnp.concatenate([embedding, rows])
    size = len(embedding) + len(spellings)
    config = {**own.configs["text_encoder"], "architectures": ["CLIPTextModel"], "vocab_size": size}
    if tokenizer.convert_tokens_to_ids(spellings) != list(range(len(embedding), size)):
        raise UserError(f"The base's tokenizer does not fit its text encoder of {len(embedding)} words; copy the base again.")
    base = StableDiffusion({**own.configs, "text_encoder": config}, tokenizer)
    unet = effective_unet(concept.trainable, domain.frozen)
    return base, {"vae": domain.params["vae"], "unet": unet, "text_encoder": text}


def lora(domain: Domain, concept: Concept, rank: int | None = None, error: float = 0.05) -> Lora:
    """The best update of each attention kernel of one rank: the truncated singular value decomposition of W ⊙ Δ.

    Where no rank is given, it is the smallest that misses no more than `error`; never one that gains nothing.

    Errors: `UserError` for a concept of scope "full", whose U-Net differs everywhere, and for numbers out of range.
    """
    if concept.trainable.unet is not None:
        raise UserError(f"{concept.name} is of scope full, which no LoRA can hold; write a whole model.", "format")
    check_range("rank", rank, RANK)
    check_range("error", error, ERROR)
    sets = [factors for factors in (domain.factors, concept.trainable.factors) if factors]
    kernels = {path: np.asarray(kernel) for path, kernel in domain.base.offset_kernels(domain.params["unet"]).items()}
    changes = {
        path: kernels[path] * np.asarray(sum(delta(factors[path]) for factors in sets if path in factors))
        for path in sorted({path for factors in sets for path in factors})
    }
    if not changes:
        raise UserError(f"{concept.name} changes no weights of the U-Net: its word alone says all; write an embedding.", "format")
    parts = {path: np.linalg.svd(change, full_matrices=False) for path, change in changes.items()}
    # What every rank misses, over all kernels: readers take ONE rank for all of them and scale by it.
    largest = max(len(sizes) for _, sizes, _ in parts.values())
    padded = [np.pad(np.square(sizes, dtype=np.float64), (0, largest - len(sizes))) for _, sizes, _ in parts.values()]
    squares = np.sum(padded, axis=0)
    missed = np.sqrt(np.append(squares[::-1].cumsum()[::-1], 0) / max(squares.sum(), 1e-300))
    rank = min(rank, largest) if rank is not None else max(1, int(np.argmax(missed <= error)))
    tensors: dict[str, np.ndarray] = {}
    for path, (left, sizes, right) in parts.items():
        roots = np.sqrt(sizes[:rank])
        fill = ((0, 0), (0, rank - len(roots)))  # a kernel of a smaller rank is filled up with zeros
        name = bases.torch_name("unet", f"{path}/kernel").removesuffix(".weight")
        # Kernels are [in, out] here and [out, in] in PyTorch, so the sides change places.
        tensors[f"unet.{name}.lora.down.weight"] = np.ascontiguousarray(np.pad(left[:, :rank] * roots, fill).T)
        tensors[f"unet.{name}.lora.up.weight"] = np.ascontiguousarray(np.pad(right[:rank].T * roots, fill))
    return Lora(tensors, rank, float(missed[rank]))
