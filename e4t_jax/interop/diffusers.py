"""A concept in the forms that diffusers' PyTorch pipelines load: a merged model, a LoRA, a word embedding.

Outside this library the word cannot be predicted anew at every step. One constant word stands for all: the mean of the words
that were used along sampling trajectories of the domain's own prompts, the constant that is nearest to them in squares.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from e4t_jax import bases
from e4t_jax.bases import Params, StableDiffusion
from e4t_jax.concept import Concept
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.objective import effective_unet
from e4t_jax.offsets import delta
from e4t_jax.prompts import PLACEHOLDER, templates
from e4t_jax.sample import sample_latents
from e4t_jax.samplers import sampler

_PROMPTS = 4


class Lora(NamedTuple):
    """Low-rank updates of the U-Net's attention in diffusers' names, and what they miss: ‖W ⊙ Δ - up down‖ / ‖W ⊙ Δ‖."""

    tensors: dict[str, np.ndarray]
    error: float


def constant_word(domain: Domain, concept: Concept, *, steps: int = 25, seed: int = 0) -> Float[np.ndarray, " text_width"]:
    """The mean of e* over all sampling steps of some of the domain's prompts."""
    prompts = list(templates(domain.template))[:_PROMPTS]
    ids, placeholder = domain.tokenize(prompts)
    noise_key, step_key = jax.random.split(jax.random.key(seed))
    noise = jax.random.normal(noise_key, (len(prompts), *domain.base.latent_shape))
    walk = sampler(domain.method.schedule, "ddim", steps)
    folded = jnp.asarray(concept.folded)
    draw = jax.jit(sample_latents)
    _, words = draw(
        domain.method, walk, concept.trainable, domain.frozen, folded, ids, placeholder, noise, domain.guidance, step_key
    )
    return np.asarray(words.mean(axis=(0, 1)))


def merged_base(domain: Domain, concept: Concept, word: Float[np.ndarray, " text_width"]) -> tuple[StableDiffusion, Params]:
    """A base of its own in which the prompt word `*s` is the concept: offsets merged, token and embedding added."""
    assert isinstance(domain.base, StableDiffusion)  # the only pipelines to write for
    tokenizer = copy.deepcopy(domain.base.tokenizer)
    tokenizer.add_tokens([PLACEHOLDER])
    text = jax.tree.map(lambda leaf: leaf, domain.params["text_encoder"])  # a new tree of the same leaves
    text.pop("text_projection", None)
    embedding = text["text_model"]["embeddings"]["token_embedding"]["embedding"]
    text["text_model"]["embeddings"]["token_embedding"]["embedding"] = jnp.concatenate([embedding, word[None]])
    config = {**domain.base.configs["text_encoder"], "architectures": ["CLIPTextModel"], "vocab_size": len(embedding) + 1}
    if tokenizer.convert_tokens_to_ids(PLACEHOLDER) != len(embedding):
        raise UserError(f"The base's tokenizer does not fit its text encoder of {len(embedding)} words; copy the base again.")
    base = StableDiffusion({**domain.base.configs, "text_encoder": config}, tokenizer)
    unet = effective_unet(concept.trainable, domain.frozen)
    return base, {"vae": domain.params["vae"], "unet": unet, "text_encoder": text}


def lora(domain: Domain, concept: Concept, rank: int) -> Lora:
    """The best update of each attention kernel of that rank: the truncated singular value decomposition of W ⊙ Δ.

    Errors: `UserError` for a concept of scope "full", whose U-Net differs everywhere, and for a rank below 1.
    """
    if concept.trainable.unet is not None:
        raise UserError(f"{concept.name} is of scope full, which no LoRA can hold; write a whole model.", "format")
    if rank < 1:
        raise UserError(f"{rank} is below 1; give 1 or more.", "rank")
    sets = [factors for factors in (domain.factors, concept.trainable.factors) if factors]
    kernels = {path: np.asarray(kernel) for path, kernel in domain.base.offset_kernels(domain.params["unet"]).items()}
    tensors: dict[str, np.ndarray] = {}
    missed = total = 0.0
    for path in sorted({path for factors in sets for path in factors}):
        change = kernels[path] * np.asarray(sum(delta(factors[path]) for factors in sets if path in factors))
        left, sizes, right = np.linalg.svd(change, full_matrices=False)
        roots = np.sqrt(sizes[:rank])
        # Readers take ONE rank for all kernels and scale by it: a kernel of a smaller rank is filled up with zeros.
        fill = ((0, 0), (0, rank - len(roots)))
        name = bases.torch_name("unet", f"{path}/kernel").removesuffix(".weight")
        # Kernels are [in, out] here and [out, in] in PyTorch, so the sides change places.
        tensors[f"unet.{name}.lora.down.weight"] = np.ascontiguousarray(np.pad(left[:, :rank] * roots, fill).T)
        tensors[f"unet.{name}.lora.up.weight"] = np.ascontiguousarray(np.pad(right[:rank].T * roots, fill))
        missed += float(np.sum(sizes[rank:] ** 2))
        total += float(np.sum(sizes**2))
    return Lora(tensors, (missed / total) ** 0.5 if total else 0.0)
