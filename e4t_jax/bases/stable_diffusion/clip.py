"""CLIP's two towers (Radford et al. 2021, arXiv 2103.00020): transformers that read texts and see pictures."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Int

from e4t_jax.arrays import Array
from e4t_jax.bases.stable_diffusion.attention import attend, project
from e4t_jax.bases.stable_diffusion.layers import ACTIVATIONS
from e4t_jax.bases.stable_diffusion.policy import DEFAULT, Policy, gather

# Keys of a tower's configuration that have one value here, or several of one meaning; others change what is computed.
ONLY: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "model_type": ("clip_text_model", "clip_vision_model", "clip"),
    "num_channels": (3,),
    "pruned_heads": ({}, None),
    "use_attention_mask": (False, None),  # StableDiffusionPipeline would hide the padding from the text encoder
}
# Keys that change nothing: where files came from, how training began, its dropout, and how other models write texts.
INERT = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dropout",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "problem_type",
        "projection_dim",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tie_word_embeddings",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "use_bfloat16",
        "use_cache",
    }
)
# Texts of the first checkpoints say 2 where they mean the last id of the vocabulary.
_OLD_END = 2

Tokens = Float[Array, "batch _ _"]
Images = Float[Array, "batch _ _ 3"]


class Shape(NamedTuple):
    """What the layers of both towers are told."""

    width: int
    inner: int
    layers: int
    heads: int
    activation: str
    epsilon: float
    policy: Policy


class CLIPText(nn.Module):
    """Word embeddings to the states that the U-Net attends to. Fields are the configuration's keys, with its defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    policy: Policy = DEFAULT

    @nn.nowrap
    def fault(self) -> str | None:
        """What the fields cannot be."""
        return _fault(self)

    def setup(self) -> None:
        self.text_model = TextTower(self.vocab_size, self.max_position_embeddings, _shape(self))

    def look_up(self, ids: Int[Array, "batch tokens"]) -> Tokens:
        """Word embeddings of token ids."""
        return self.text_model.embeddings.token_embedding(ids)

    def __call__(self, words: Tokens) -> Tokens:
        """States after the last layer and norm, of word embeddings from anywhere; a word sees itself and what is before it."""
        return self.text_model(words)

    def read(self, ids: Int[Array, "batch tokens"]) -> Tokens:
        """States of token ids."""
        return self(self.look_up(ids))

    @nn.nowrap
    def pool(self, states: Tokens, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch width"]:
        """The state at the first end token, which has seen the whole text; CLIP projects it."""
        ends = ids.argmax(axis=1) if self.eos_token_id == _OLD_END else (ids == self.eos_token_id).argmax(axis=1)
        return jnp.take_along_axis(states, ends[:, None, None], axis=1)[:, 0]


class CLIPVision(nn.Module):
    """Pictures to states of patches and of a class token before them. Fields are the configuration's keys, with its defaults."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    policy: Policy = DEFAULT

    @nn.nowrap
    def fault(self) -> str | None:
        """What the fields cannot be."""
        return _fault(self)

    def setup(self) -> None:
        self.vision_model = VisionTower(self.patch_size, _shape(self))

    def __call__(self, images: Images) -> list[Tokens]:
        """States before the first layer and after each, of normalised pictures."""
        return self.vision_model(images)

    def norm(self, states: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """The norm after the last layer, which CLIP puts on the class token before it projects it."""
        return self.vision_model.post_layernorm(states)

    def pool(self, images: Images) -> Float[Array, "batch width"]:
        """The class token's last state, normed; CLIP projects it."""
        return self.norm(self(images)[-1][:, 0])


def _shape(clip: CLIPText | CLIPVision) -> Shape:
    return Shape(
        width=clip.hidden_size,
        inner=clip.intermediate_size,
        layers=clip.num_hidden_layers,
        heads=clip.num_attention_heads,
        activation=clip.hidden_act,
        epsilon=clip.layer_norm_eps,
        policy=clip.policy,
    )


def _fault(clip: CLIPText | CLIPVision) -> str | None:
    if clip.hidden_act not in ACTIVATIONS:
        return f"hidden_act = {clip.hidden_act!r} is not supported; known are {', '.join(ACTIVATIONS)}."
    if clip.hidden_size % clip.num_attention_heads:
        return f"num_attention_heads = {clip.num_attention_heads} do not divide hidden_size = {clip.hidden_size}."
    return None


class TextTower(nn.Module):
    """Words and their places, layers, a norm."""

    vocabulary: int
    length: int
    shape: Shape

    def setup(self) -> None:
        self.embeddings = TextEmbeddings(self.vocabulary, self.length, self.shape)
        self.encoder = Encoder(self.shape, causal=True)
        self.final_layer_norm = _norm(self.shape)

    def __call__(self, words: Tokens) -> Tokens:
        return self.final_layer_norm(self.encoder(self.embeddings(words))[-1]).astype(jnp.float32)


class TextEmbeddings(nn.Module):
    """word + place."""

    vocabulary: int
    length: int
    shape: Shape

    def setup(self) -> None:
        # Words stay in the dtype of their weights: what takes their place may be trained.
        self.token_embedding = nn.Embed(self.vocabulary, self.shape.width)
        self.position_embedding = nn.Embed(self.length, self.shape.width)

    def __call__(self, words: Tokens) -> Tokens:
        return words + gather(self.position_embedding.embedding)[: words.shape[1]]


class VisionTower(nn.Module):
    """Patches, a class token and their places; a norm; layers; a norm for callers that need it."""

    patch: int
    shape: Shape

    def setup(self) -> None:
        self.embeddings = self.shape.policy.block(VisionEmbeddings)(self.patch, self.shape)
        self.pre_layrnorm = _norm(self.shape)  # spelled so in the checkpoints
        self.encoder = Encoder(self.shape, causal=False)
        self.post_layernorm = _norm(self.shape)

    def __call__(self, images: Images) -> list[Tokens]:
        return [state.astype(jnp.float32) for state in self.encoder(self.pre_layrnorm(self.embeddings(images)))]


class VisionEmbeddings(nn.Module):
    """The class token and W patch, plus their places."""

    patch: int
    shape: Shape

    @nn.compact
    def __call__(self, images: Images) -> Tokens:
        token = self.param("class_embedding", nn.initializers.normal(0.02), (self.shape.width,))
        patches = PatchEmbedding(self.patch, self.shape, name="patch_embedding")(images)
        tokens = jnp.concatenate([jnp.broadcast_to(token, (len(images), 1, self.shape.width)), patches], axis=1)
        places = nn.Embed(tokens.shape[1], self.shape.width, name="position_embedding")
        return tokens + places(jnp.arange(tokens.shape[1]))


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its size: one matrix product of the pixels of every patch."""

    patch: int
    shape: Shape

    @nn.compact
    def __call__(self, images: Images) -> Tokens:
        batch, height, width, channels = images.shape
        size, policy = self.patch, self.shape.policy
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (size, size, channels, self.shape.width))
        patches = images[:, : height // size * size, : width // size * size]
        patches = patches.reshape(batch, height // size, size, width // size, size, channels).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(batch, -1, size * size * channels)
        return (policy.cast(patches) @ policy.cast(kernel.reshape(-1, self.shape.width))).astype(jnp.float32)


class Encoder(nn.Module):
    """The layers; all states, the given ones first."""

    shape: Shape
    causal: bool

    @nn.compact
    def __call__(self, x: Tokens) -> list[Tokens]:
        return Layers(self.shape, self.causal, name="layers")(self.shape.policy.cast(x))


class Layers(nn.Module):
    """The layers, numbered as in the checkpoints: "encoder/layers/0"."""

    shape: Shape
    causal: bool

    @nn.compact
    def __call__(self, x: Tokens) -> list[Tokens]:
        states, layer = [x], self.shape.policy.block(Layer)
        for i in range(self.shape.layers):
            states.append(layer(self.shape, self.causal, name=str(i))(states[-1]))
        return states


class Layer(nn.Module):
    """Attention and a network of one hidden layer; each added to its input, after a layer norm of it."""

    shape: Shape
    causal: bool

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        x += Attention(self.shape, self.causal, name="self_attn")(_norm(self.shape, name="layer_norm1")(x))
        return x + Network(self.shape, name="mlp")(_norm(self.shape, name="layer_norm2")(x))


class Attention(nn.Module):
    """W_out attend(x W_q, x W_k, x W_v), with biases."""

    shape: Shape
    causal: bool

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        shape = self.shape
        names = ("q_proj", "k_proj", "v_proj")
        query, key, value = project(x, names, shape.heads, shape.width // shape.heads, use_bias=True, policy=shape.policy)
        attended = attend(query, key, value, shape.policy, self.causal).reshape(x.shape)
        return nn.Dense(shape.width, dtype=shape.policy.dtype, name="out_proj")(attended)


class Network(nn.Module):
    """W₂ act(W₁ x)."""

    shape: Shape

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        linear = partial(nn.Dense, dtype=self.shape.policy.dtype)
        hidden = ACTIVATIONS[self.shape.activation](linear(self.shape.inner, name="fc1")(x))
        return linear(self.shape.width, name="fc2")(hidden)


def _norm(shape: Shape, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=shape.epsilon, dtype=shape.policy.dtype, name=name)
