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
from e4t_jax.checks import Between, Whole, check_range
from e4t_jax.concept import Concept
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.objective import effective_unet
from e4t_jax.offsets import delta
from e4t_jax.process import draw_noise
from e4t_jax.sample import sample_latents
from e4t_jax.samplers import sampler
from e4t_jax.templates import templates
from e4t_jax.words import PLACEHOLDER, check_placeholder

RANK = Whole(1, 10**9)  # beyond a kernel's smaller side it gains nothing, and is not taken
ERROR = Between(0, 1)
_PROMPTS = 4


class Lora(NamedTuple):
    """Low-rank updates of the U-Net's attention in diffusers' names, and what they miss: ‖W ⊙ Δ - up down‖ / ‖W ⊙ Δ‖."""

    tensors: dict[str, np.ndarray]
    rank: int
    error: float


def constant_word(domain: Domain, concept: Concept, *, steps: int = 25, seed: int = 0) -> Float[np.ndarray, " text_width"]:
    """The mean of e* over all sampling steps of some of the domain's prompts."""
    prompts = list(templates(domain.template))[:_PROMPTS]
    ids, placeholder = domain.tokenize(prompts)
    noise_key, step_key = jax.random.split(jax.random.key(seed))
    noise = draw_noise(noise_key, (len(prompts), *domain.base.latent_shape))
    walk = sampler(domain.method.schedule, "ddim", steps)
    folded = jnp.asarray(concept.folded)
    draw = jax.jit(sample_latents)
    _, words = draw(
        domain.method, walk, concept.trainable, domain.frozen, folded, ids, placeholder, noise, domain.guidance, step_key
    )
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

    Errors: `UserError` as `check_token`, and for a tokenizer that does not fit its text encoder.
    """
    assert isinstance(domain.base, StableDiffusion)  # the only pipelines to write for
    check_token(domain, token)
    # Here the placeholder is the same in upper case; PyTorch's tokenizer tells added words apart.
    spellings = list(dict.fromkeys([token, token.lower(), token.upper()]))
    tokenizer = copy.deepcopy(domain.base.tokenizer)
    tokenizer.add_tokens(spellings)
    text = jax.tree.map(lambda leaf: leaf, domain.params["text_encoder"])  # a new tree of the same leaves
    text.pop("text_projection", None)
    embedding = text["text_model"]["embeddings"]["token_embedding"]["embedding"]
    rows = jnp.asarray(np.tile(word, (len(spellings), 1)))
    text["text_model"]["embeddings"]["token_embedding"]["embedding"] = jnp.concatenate([embedding, rows])
    size = len(embedding) + len(spellings)
    config = {**domain.base.configs["text_encoder"], "architectures": ["CLIPTextModel"], "vocab_size": size}
    if tokenizer.convert_tokens_to_ids(spellings) != list(range(len(embedding), size)):
        raise UserError(f"The base's tokenizer does not fit its text encoder of {len(embedding)} words; copy the base again.")
    base = StableDiffusion({**domain.base.configs, "text_encoder": config}, tokenizer)
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
