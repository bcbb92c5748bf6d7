"""A concept in the forms that other tools open: a merged model, a LoRA, a word embedding.

Outside this library the word cannot be predicted anew at every step. One constant word stands for all: the mean of the words
along sampling trajectories of the domain's own prompts, which is the constant nearest to them in squares.

    diffusers   a folder for `StableDiffusionPipeline.from_pretrained`
    lora        the U-Net's change in kohya's names (`lora`), with the word beside it
    embedding   the word: [1, width] as `emb_params` for A1111, ComfyUI and InvokeAI, by its token for diffusers
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
from e4t_jax.concept import Concept
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.files.places import local_path
from e4t_jax.interop.export_readme import LORA_FILE, WORD_FILE, folder_readme, lora_readme, word_readme
from e4t_jax.interop.lora import lora
from e4t_jax.interop.model_card import ModelCard, card_of, check_not_lost, lora_metadata, word_metadata
from e4t_jax.objective import effective_unet, own_reader
from e4t_jax.sample import DrawnConcept, SampleSettings, sample_latents
from e4t_jax.storage import check_writable, write_files
from e4t_jax.templates import templates
from e4t_jax.words import PLACEHOLDER, check_placeholder

FORMATS = ("diffusers", "lora", "embedding")
_DTYPES = ("float16", "float32")
_PROMPTS = 4


class Exported(NamedTuple):
    """What was written to `folder`: the word in prompts, the files that matter; of a LoRA its rank and what it misses."""

    folder: Path
    token: str
    files: tuple[str, ...]
    rank: int | None = None
    error: float | None = None


def export_concept(
    domain: Domain,
    concept: Concept,
    out: str | Path,
    *,
    format: str = "diffusers",
    rank: int | None = None,
    error: float = 0.05,
    token: str = PLACEHOLDER,
    add_token: bool = True,
    dtype: str = "float16",
) -> Exported:
    """Writes a concept for other tools of Stable Diffusion, with a README.md that says how each of them takes it.

    Args:
        domain: The domain that the concept was tuned in.
        concept: The concept; the file of its word for A1111 and ComfyUI, and so the word there, has its name.
        out: Folder to write.
        format: "diffusers", a whole model for `StableDiffusionPipeline.from_pretrained`; "lora", the U-Net's change and the word;
            "embedding", the word alone.
        rank: Of the LoRA; where it is not given, the smallest that misses no more than `error` of the change.
        error: What a LoRA may miss: the relative error of its update, over all kernels.
        token: The concept's word in diffusers' prompts.
        add_token: Of a whole model: whether its tokenizer knows the token. Where not, tokenizer and text encoder stay the base's
            own, which converters to a single file ask for, and the word lies beside.
        dtype: Precision of the weights, "float16" or "float32".

    Errors: `UserError` for a concept of another domain, a base other than Stable Diffusion, a token that is a word already, a
        concept that the format cannot hold, and a folder that cannot be written or holds other files of these names.
    """
    out = local_path(out, "out")
    base = _check_export(domain, concept, out, format, dtype)
    check_token(domain, token)
    card = card_of(domain, base, concept, token)
    if format == "diffusers":
        word = constant_word(domain, concept)
        return _export_folder(domain, concept, out, word=word, card=card, add_token=add_token, dtype=dtype)
    files: dict[str, bytes | str] = {}
    update = lora(domain, concept, rank, error) if format == "lora" else None
    if update is not None:
        files[LORA_FILE] = _pack(update.tensors, dtype, lora_metadata(card, update.rank, update.kept))
    files |= _word_files(card, constant_word(domain, concept), dtype)
    named = tuple(files)
    files["README.md"] = word_readme(card) if update is None else lora_readme(card, update.rank, update.kept)
    write_files({out / name: content for name, content in files.items()})
    return Exported(out, token, named, *((update.rank, update.error) if update is not None else ()))


def _export_folder(
    domain: Domain, concept: Concept, out: Path, *, word: np.ndarray, card: ModelCard, add_token: bool, dtype: str
) -> Exported:
    """The whole model, its word in the tokenizer or beside it."""
    base, params = merged_base(domain, concept, word, card.token) if add_token else _with_merged_unet(domain, concept)
    added = [name for name in base.tokenizer.get_added_vocab() if name not in domain.base.tokenizer.get_vocab()]
    beside: dict[str, bytes | str] = {} if add_token else dict(_word_files(card, word, dtype))
    named = ("model_index.json", *beside)
    beside["README.md"] = folder_readme(card, added)
    bases.save_folder(out, base, params, np.dtype(dtype), beside=beside)
    return Exported(out, card.token, named)


def _word_files(card: ModelCard, word: Float[np.ndarray, " text_width"], dtype: str) -> dict[str, bytes]:
    """The word for A1111, ComfyUI and InvokeAI, whose name is the file's, and for diffusers, where it is the tensor's."""
    row = word[None]
    return {
        f"{card.name}.safetensors": _pack({"emb_params": row}, dtype, word_metadata(card, card.name)),
        WORD_FILE: _pack({card.token: row}, dtype, word_metadata(card, card.token)),
    }


def _pack(tensors: Mapping[str, np.ndarray], dtype: str, header: Mapping[str, str]) -> bytes:
    """A safetensors file for PyTorch."""
    return save({name: tensor.astype(dtype) for name, tensor in tensors.items()}, dict(header))


def _check_export(domain: Domain, concept: Concept, out: Path, format: str, dtype: str) -> StableDiffusion:
    """The domain's base. Errors: `UserError` as `export_concept`, for all that is known before anything is computed."""
    for argument, value, known in (("format", format, FORMATS), ("dtype", dtype, _DTYPES)):
        if value not in known:
            raise UserError(f"{value!r} is unknown; choose one of {', '.join(known)}.", argument)
    if concept.domain != domain.fingerprint:
        raise UserError(f"{concept.name} was tuned in another domain or on another base; give the domain it was tuned with.")
    own = _stable_diffusion(domain)
    check_writable(out)
    base = bases.local_folder(domain.base_name)
    if format == "diffusers" and base is not None and out.exists() and out.samefile(base):
        raise UserError(f"{out} holds the base that the domain was trained on; choose another folder.", "out")
    if f"{concept.name}.safetensors" in (LORA_FILE, WORD_FILE):
        raise UserError(f"{concept.name} is the name of a file of the export itself; rename the concept's file.", "concept")
    check_not_lost(out, (f"{concept.name}.safetensors", "README.md"))
    return own


def _stable_diffusion(domain: Domain) -> StableDiffusion:
    """The domain's base. Errors: `UserError` for one of another architecture."""
    if not isinstance(domain.base, StableDiffusion):
        kind = type(domain.base).__name__
        raise UserError(f"{domain.base_name} is a {kind}; only concepts on Stable Diffusion can be exported.", "domain")
    return domain.base


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
    reader = own_reader(concept.trainable, domain.frozen).text_encoder
    text = jax.tree.map(lambda leaf: leaf, reader)  # a new tree of the same leaves
    text.pop("text_projection", None)
    embedding = text["text_model"]["embeddings"]["token_embedding"]["embedding"]
    rows = jnp.asarray(np.tile(word, (len(spellings), 1)))
    text["text_model"]["embeddings"]["token_embedding"]["embedding"] = jnp.concatenate([embedding, rows])
    size = len(embedding) + len(spellings)
    config = {**own.configs["text_encoder"], "architectures": ["CLIPTextModel"], "vocab_size": size}
    if tokenizer.convert_tokens_to_ids(spellings) != list(range(len(embedding), size)):
        raise UserError(f"The base's tokenizer does not fit its text encoder of {len(embedding)} words; copy the base again.")
    base = StableDiffusion({**own.configs, "text_encoder": config}, tokenizer)
    return base, {**_with_merged_unet(domain, concept)[1], "text_encoder": text}


def _with_merged_unet(domain: Domain, concept: Concept) -> tuple[StableDiffusion, Params]:
    """The domain's base with the offsets merged, and its words as they are."""
    own = _stable_diffusion(domain)
    configs = {**own.configs, "text_encoder": {**own.configs["text_encoder"], "architectures": ["CLIPTextModel"]}}
    text = {name: part for name, part in domain.params["text_encoder"].items() if name != "text_projection"}
    unet = effective_unet(concept.trainable, domain.frozen)
    return StableDiffusion(configs, own.tokenizer), {"vae": domain.params["vae"], "unet": unet, "text_encoder": text}
