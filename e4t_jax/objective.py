"""The E4T loss, the one function that pretraining, tuning and tests share (arXiv 2302.12228, section 3).

    z_t   = α_t z_0 + σ_t ε                                    noised latents
    θ'    = W ⊙ (1 + Δ) for every q, k, v kernel W             weight offsets
    φ     = features of U-Net_θ'(z_t, t, τ(""))                seen through the offsets, with the empty prompt
    E     = encoder(fold(φ_clip), φ)
    e*    = e_d + s (E + r)                                    word embedding; r is a concept's own residual
    loss  = mean m ⊙ (target - U-Net_θ'(z_t, t, τ(prompt(e*))))² / mean m  +  λ mean_batch ‖s (E + r)‖² / ‖e_d‖²

The target is ε, or v for v-prediction models. The mask m in [0, 1] is optional. The regulariser is the paper's λ' ‖s E‖² with
λ = λ' ‖e_d‖²: a share of the word's own length, so that λ means the same whatever the length of a base's words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from e4t_jax.arrays import Array
from e4t_jax.bases.protocol import Base, Conditioning, Params
from e4t_jax.bases.scheduler_config import noise_schedule
from e4t_jax.encoder import ConceptEncoder
from e4t_jax.offsets import Factors, Networks, factors_of_networks, init_factors, init_networks, merge
from e4t_jax.process import NoiseSchedule, add_noise, draw_noise, training_target
from e4t_jax.tuning.scopes import Scope
from e4t_jax.words import domain_token_id, inject


@struct.dataclass
class Method:
    """The static side of a domain: the modules, the schedule and the numbers of the loss."""

    base: Base = struct.field(pytree_node=False)
    encoder: ConceptEncoder = struct.field(pytree_node=False)
    schedule: NoiseSchedule
    empty_ids: Int[Array, "1 length"]  # the empty prompt
    domain_id: Int[Array, ""]  # the domain token
    scale: float = struct.field(pytree_node=False, default=0.1)  # s


def make_method(base: Base, domain_token: str, scale: float = 0.1) -> Method:
    """The static side of a domain on this base.

    Errors: `UserError` when the domain token is not one token.
    """
    empty = base.tokenizer("", padding="max_length", max_length=base.tokenizer.model_max_length).input_ids
    return Method(
        base=base,
        encoder=ConceptEncoder(base.image_encoder.count, base.image_encoder.width, base.text_width),
        schedule=noise_schedule(base.scheduler),
        empty_ids=jnp.asarray([empty]),
        domain_id=jnp.asarray(domain_token_id(base.tokenizer, domain_token)),
        scale=scale,
    )


class ConceptWord(NamedTuple):
    """A concept's word beside the domain's."""

    embedding: Float[Array, "batch text_width"]  # e*
    offset: Float[Array, "batch text_width"]  # s (E + r)
    domain: Float[Array, "text_width"]  # e_d


@struct.dataclass
class LossWeights:
    """What each term of the loss weighs beside the denoising error. Another term is a field here and a summand in `total`."""

    regularisation: float | Float[Array, ""]  # λ, of the squared length of the word's offset over that of the domain's word

    def total(self, denoising: Float[Array, ""], word: ConceptWord) -> Float[Array, ""]:
        """The loss: denoising + λ mean_batch ‖s (E + r)‖² / ‖e_d‖²."""
        return denoising + self.regularisation * jnp.mean(jnp.sum(word.offset**2, axis=-1)) / jnp.sum(word.domain**2)


class Trainable(NamedTuple):
    """What learning may change; `None` where a scope leaves a part alone.

    `unet` is set only by the literal scope "full", which trains the U-Net's own weights too; what comes after it, by the recipe
    "public" alone.
    """

    factors: Factors | None = None
    encoder: Any = None
    residual: Float[Array, "text_width"] | None = None
    unet: Any = None
    networks: Networks | None = None  # whose offsets add up with those of all factors
    image_encoder: Any = None
    text_encoder: Any = None


jax.export.register_namedtuple_serialization(Trainable, serialized_name="e4t_jax.Trainable")


class Frozen(NamedTuple):
    """What the loss reads but never changes; `factors` and `encoder` are a domain's, under a concept's own.

    `networks` and `image_encoder` are what learning may begin with: the loss reads a concept's own alone.
    """

    unet: Any
    text_encoder: Any
    factors: Factors | None = None
    encoder: Any = None
    networks: Networks | None = None
    image_encoder: Any = None


# What each part of a concept's `Trainable` is before the first step, from (method, frozen, scope, key): Δ = 0, no residual, the
# domain's encoder, the base's U-Net. What learns is float32, whatever dtype the networks compute in.
INITIAL_PARTS: dict[str, Callable[[Method, Frozen, Scope, PRNGKeyArray], Any]] = {
    "factors": lambda method, frozen, scope, key: init_factors(
        key, method.base.offset_kernels(frozen.unet), rank=scope.rank, form=scope.form
    ),
    "encoder": lambda method, frozen, scope, key: frozen.encoder,
    "residual": lambda method, frozen, scope, key: jnp.zeros((method.base.text_width,)),
    "unet": lambda method, frozen, scope, key: _float32(frozen.unet),
    "networks": lambda method, frozen, scope, key: (
        init_networks(key, method.base.offset_kernels(frozen.unet)) if frozen.networks is None else frozen.networks
    ),
    "image_encoder": lambda method, frozen, scope, key: _float32(frozen.image_encoder),
    "text_encoder": lambda method, frozen, scope, key: _float32(frozen.text_encoder),
}


def _float32(params: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


class Draws(NamedTuple):
    """What is random in the loss of a batch."""

    t: Int[Array, "batch"]
    noise: Float[Array, "batch height width channels"]  # ε


class ConceptBatch(NamedTuple):
    """A batch of pictures as the loss sees them."""

    latents: Float[Array, "batch height width channels"]
    clip: Float[Array, "batch layers clip_width"]  # φ_clip of the same pictures
    ids: Int[Array, "prompts length"]
    placeholder: Bool[Array, "prompts length"]
    mask: Float[Array, "batch height width"] | None = None  # at the latents' resolution
    prompt: Int[Array, "batch"] | None = None  # which prompt is a picture's; each has its own where not given


def effective_unet(trainable: Trainable, frozen: Frozen) -> Params:
    """U-Net parameters θ' with the domain's and the concept's offsets merged."""
    own = None if trainable.networks is None else factors_of_networks(trainable.networks)
    sets = [factors for factors in (frozen.factors, trainable.factors, own) if factors is not None]
    unet = frozen.unet if trainable.unet is None else trainable.unet
    return merge(unet, *sets) if sets else unet


def own_encoder(trainable: Trainable, frozen: Frozen) -> Params:
    """The encoder's parameters: the concept's where its scope lets them learn, else the domain's."""
    return frozen.encoder if trainable.encoder is None else trainable.encoder


def own_reader(trainable: Trainable, frozen: Frozen) -> Frozen:
    """`frozen` with the concept's text encoder, where it has one of its own."""
    return frozen if trainable.text_encoder is None else frozen._replace(text_encoder=trainable.text_encoder)


def fold(
    method: Method, trainable: Trainable, frozen: Frozen, clip: Float[Array, "batch states clip_width"]
) -> Float[Array, "batch clip_width"]:
    """All that the encoder's prediction owes to the pictures alone (`ConceptEncoder.fold`)."""
    return method.encoder.apply({"params": own_encoder(trainable, frozen)}, clip, method="fold")


def concept_word(
    method: Method,
    trainable: Trainable,
    frozen: Frozen,
    folded: Float[Array, "batch clip_width"],
    features: Float[Array, "batch features"],
) -> ConceptWord:
    """The word embedding e* = e_d + s (E + r), its offset from the domain's word, and that word."""
    return add_to_domain_word(method, trainable, frozen, predict(method, trainable, frozen, folded, features))


def predict(
    method: Method,
    trainable: Trainable,
    frozen: Frozen,
    folded: Float[Array, "batch clip_width"],
    features: Float[Array, "batch features"],
) -> Float[Array, "batch text_width"]:
    """E of the folded pictures and φ."""
    return method.encoder.apply({"params": own_encoder(trainable, frozen)}, folded, features)


def add_to_domain_word(
    method: Method, trainable: Trainable, frozen: Frozen, predicted: Float[Array, "batch text_width"]
) -> ConceptWord:
    """`concept_word` from E."""
    if trainable.residual is not None:
        predicted = predicted + trainable.residual
    offset, own = method.scale * predicted, domain_word(method, frozen.text_encoder)
    return ConceptWord(own + offset, offset, own)


def domain_word(method: Method, text_encoder: Params) -> Float[Array, "text_width"]:
    """e_d, the word embedding of the domain's token."""
    return method.base.look_up(text_encoder, method.domain_id[None, None])[0, 0].astype(jnp.float32)


def prompt_states(
    method: Method, frozen: Frozen, ids: Int[Array, "b n"], placeholder: Bool[Array, "b n"], word: Float[Array, "b d"]
) -> Conditioning:
    """τ(prompt(e*)): the text encoder's states with e* in the placeholder's place."""
    words = inject(method.base.look_up(frozen.text_encoder, ids), placeholder, word)
    return method.base.read(frozen.text_encoder, ids, words)


def empty_states(method: Method, frozen: Frozen, batch: int) -> Conditioning:
    """τ(""), the same for every row of a batch."""
    states = method.base.read(frozen.text_encoder, method.empty_ids)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch, *leaf.shape[1:])), states)


def e4t_loss(
    method: Method,
    trainable: Trainable,
    frozen: Frozen,
    batch: ConceptBatch,
    key: PRNGKeyArray,
    *,
    weights: LossWeights,
    predicted: Float[Array, "text_width"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of the module's head, with timesteps and noise drawn from `key`; returns (loss, its terms)."""
    draws = draw_timesteps_and_noise(method, len(batch.latents), key)
    return e4t_loss_at(method, trainable, frozen, batch, draws, weights=weights, predicted=predicted)


def draw_timesteps_and_noise(method: Method, count: int, key: PRNGKeyArray) -> Draws:
    """Timesteps and noise for a batch of `count` pictures.

    Every timestep is uniform, but the batch has one from each of `count` equal slices of the schedule, in random order:
    the same mean, a quieter gradient.
    """
    time_key, order_key, noise_key = jax.random.split(key, 3)
    slices = jax.random.permutation(order_key, count) + jax.random.uniform(time_key, (count,))
    t = jnp.floor(slices / count * method.schedule.num_train_timesteps).astype(jnp.int32)
    return Draws(t, draw_noise(noise_key, (count, *method.base.latent_shape)))


def draw_independently(method: Method, count: int, key: PRNGKeyArray) -> Draws:
    """Timesteps and noise for a batch of `count` pictures, every timestep uniform and of its own."""
    time_key, noise_key = jax.random.split(key)
    t = jax.random.randint(time_key, (count,), 0, method.schedule.num_train_timesteps)
    return Draws(t, draw_noise(noise_key, (count, *method.base.latent_shape)))


def predict_of_one(
    method: Method,
    frozen: Frozen,
    unet: Params,
    z_t: Float[Array, "draws height width channels"],
    t: Int[Array, "draws"],
    clip: Float[Array, "states clip_width"],
) -> Float[Array, "draws text_width"]:
    """A domain's E of one picture at several timesteps; `unet` has the offsets merged."""
    features = method.base.features(unet, z_t, t, empty_states(method, frozen, len(z_t)))
    folded = fold(method, Trainable(), frozen, clip[None])
    return predict(method, Trainable(), frozen, jnp.broadcast_to(folded, (len(z_t), folded.shape[-1])), features)


def mean_prediction(
    method: Method,
    frozen: Frozen,
    latents: Float[Array, "views height width channels"],
    clip: Float[Array, "states clip_width"],
    key: PRNGKeyArray,
) -> Float[Array, "text_width"]:
    """A domain's E of one picture, the mean over a draw of timestep and noise from `key` for each of its views."""
    t, noise = draw_timesteps_and_noise(method, len(latents), key)
    unet, z_t = effective_unet(Trainable(), frozen), add_noise(method.schedule, latents, noise, t)
    return predict_of_one(method, frozen, unet, z_t, t=t, clip=clip).mean(axis=0)


def e4t_loss_at(
    method: Method,
    trainable: Trainable,
    frozen: Frozen,
    batch: ConceptBatch,
    draws: Draws,
    *,
    weights: LossWeights,
    mean_mask: Float[Array, ""] | None = None,
    predicted: Float[Array, "text_width"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The E4T loss at given timesteps and noise.

    For a batch that is taken in equal shares, `mean_mask` is mean m over all of it: the mean of the shares' losses is its loss.
    E may be given as `predicted`, one for all pictures: then it is no function of offsets and timestep, the U-Net's pass that φ
    comes from is not run, and every prompt is read once. Where the text encoder learns, it does so by the prompts: e_d and τ("")
    follow it, but pass no gradient on (as in the public PyTorch code).
    """
    t, noise = draws
    unet, reader = effective_unet(trainable, frozen), own_reader(trainable, frozen)
    frozen = frozen if reader is frozen else jax.lax.stop_gradient(reader)
    z_t = add_noise(method.schedule, batch.latents, noise, t)
    if predicted is None:
        features = method.base.features(unet, z_t, t, empty_states(method, frozen, len(z_t)))
        folded = fold(method, trainable, frozen, batch.clip)
        word = concept_word(method, trainable, frozen, folded, features)
        ids, placeholder = _rows_of(batch.prompt, (batch.ids, batch.placeholder))
        text = prompt_states(method, reader, ids, placeholder, word.embedding)
    else:
        word = add_to_domain_word(method, trainable, frozen, predicted[None])
        words = jnp.broadcast_to(word.embedding, (len(batch.ids), word.embedding.shape[1]))
        text = _rows_of(batch.prompt, prompt_states(method, reader, batch.ids, batch.placeholder, words))
    output = method.base.denoise(unet, z_t, t, text)[0]
    error = (output - training_target(method.schedule, batch.latents, noise, t)) ** 2
    mask = jnp.ones(error.shape[:3]) if batch.mask is None else batch.mask
    # Of a mask that covers nothing the loss is 0, not NaN.
    covered = (jnp.mean(mask) if mean_mask is None else mean_mask) + 1e-6 / error.size
    denoising = jnp.mean(error * mask[..., None]) / covered
    loss = weights.total(denoising, word)
    return loss, {"loss": loss, "denoising": denoising, "offset_norm": jnp.mean(jnp.linalg.norm(word.offset, axis=-1))}


def _rows_of(prompt: Int[Array, "batch"] | None, of_prompts: Any) -> Any:
    """From one row per prompt to one row per picture."""
    return of_prompts if prompt is None else jax.tree.map(lambda leaf: leaf[prompt], of_prompts)
