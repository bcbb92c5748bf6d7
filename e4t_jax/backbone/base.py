"""A text-to-image base model: Stable Diffusion's five parts as Flax modules, and what the method asks of them.

`Base` is the static side (modules, configurations, tokenizer); all weights live in one pytree, keyed
"vae", "unet", "text_encoder", "image_encoder", and are always passed in. Pictures are NHWC in [-1, 1], latents are
NHWC and scaled to about unit variance.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, PRNGKeyArray

from e4t_jax.bases.stable_diffusion import DEFAULT_POLICY, VAE, CLIPText, CLIPVision, Policy, UNet, module_of

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Params = dict[str, Any]
# Channel statistics of the pictures that CLIP was trained on (Radford et al. 2021).
_CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_CLIP_DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """The static side of a base model; `configs` are the folder's own JSON files, keyed by part.

    Two bases of equal configurations, words and policy are equal, so that what was compiled for one serves the other.
    """

    configs: Mapping[str, Mapping[str, Any]]
    tokenizer: CLIPTokenizer
    policy: Policy = DEFAULT_POLICY

    @cached_property
    def _value(self) -> tuple[str, frozenset[tuple[str, int]], Policy]:
        words = frozenset(self.tokenizer.get_vocab().items()) if self.tokenizer is not None else frozenset()
        return json.dumps(self.configs, sort_keys=True), words, self.policy

    @cached_property
    def _hash(self) -> int:
        return hash(self._value)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Base) and self._hash == other._hash and self._value == other._value)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def vae(self) -> VAE:
        return module_of("vae", self.configs["vae"], self.policy)

    @cached_property
    def unet(self) -> UNet:
        return module_of("unet", self.configs["unet"], self.policy)

    @cached_property
    def text(self) -> CLIPText:
        return module_of("text_encoder", self.configs["text_encoder"], self.policy)

    @cached_property
    def vision(self) -> CLIPVision:
        return module_of("image_encoder", self.configs["image_encoder"], self.policy)

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """The scheduler's configuration, for `diffusion.noise_schedule`."""
        return self.configs["scheduler"]

    @property
    def scaling_factor(self) -> float:
        """What takes the VAE's latents to about unit variance."""
        return self.configs["vae"].get("scaling_factor", 0.18215)

    @property
    def image_size(self) -> int:
        """Pixels a side of the pictures that the U-Net was trained on."""
        return self.latent_size * self.downsampling

    @property
    def latent_size(self) -> int:
        return self.unet.sample_size

    @property
    def downsampling(self) -> int:
        """Pixels a side for each latent."""
        return 2 ** (len(self.vae.block_out_channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.latent_size, self.latent_size, self.unet.in_channels)

    @property
    def text_width(self) -> int:
        return self.text.hidden_size

    @property
    def clip_width(self) -> int:
        return self.vision.hidden_size


def with_scaling_factor(base: Base, scaling_factor: float) -> Base:
    """The same base with another latent scale."""
    configs = {**base.configs, "vae": {**base.configs["vae"], "scaling_factor": scaling_factor}}
    return dataclasses.replace(base, configs=configs)


def random_params(base: Base, key: PRNGKeyArray) -> Params:
    """Random weights of every part: kernels ~ N(0, 1/fan_in), embeddings ~ N(0, 0.02²), scales 1, biases 0.

    Drawn leaf by leaf with NumPy: compiling the modules' own initialisers takes longer than a short training.
    """
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def draw(path: str, shape: tuple[int, ...]) -> Array:
        match path.rpartition("/")[2]:
            case "kernel":
                values = generator.standard_normal(shape, np.float32) * np.float32(np.prod(shape[:-1]) ** -0.5)
            case "scale":
                values = np.ones(shape, np.float32)
            case "bias":
                values = np.zeros(shape, np.float32)
            case _:
                values = np.float32(0.02) * generator.standard_normal(shape, np.float32)
        return jnp.asarray(values, jnp.float32)

    shapes = flatten_dict(param_shapes(base), sep="/")
    return unflatten_dict({path: draw(path, shapes[path].shape) for path in sorted(shapes)}, sep="/")


def has_projection(base: Base, part: str) -> bool:
    """Whether the part's files hold CLIP's projection into the space shared by pictures and texts."""
    architectures = base.configs[part].get("architectures") or [""]
    return architectures[0].endswith("WithProjection")


def param_shapes(base: Base) -> Params:
    """Shapes and dtypes of all weights, with nothing allocated."""
    ids = jnp.zeros((1, base.text.max_position_embeddings), jnp.int32)
    size = base.image_size
    pixels = base.vision.image_size

    def init() -> Params:
        key = jax.random.key(0)
        latents, text = jnp.zeros((1, *base.latent_shape)), jnp.zeros((1, 1, base.unet.cross_attention_dim))
        params = {
            "vae": base.vae.init(key, jnp.zeros((1, size, size, 3)))["params"],
            "unet": base.unet.init(key, latents, jnp.zeros((1,), jnp.int32), text)["params"],
            "text_encoder": base.text.init(key, ids, method="read")["params"],
            "image_encoder": base.vision.init(key, jnp.zeros((1, pixels, pixels, 3)), method="pool")["params"],
        }
        for part, name, width in (
            ("text_encoder", "text_projection", base.text_width),
            ("image_encoder", "visual_projection", base.clip_width),
        ):
            if has_projection(base, part):
                params[part][name] = {"kernel": jnp.zeros((width, base.configs[part]["projection_dim"]))}
        return params

    return jax.eval_shape(init)


def attention_weights(unet: Params) -> dict[str, Any]:
    """Path -> q, k or v kernel [in, out] of every attention layer of the U-Net."""
    suffixes = tuple(f"attn{i}/to_{name}/kernel" for i in (1, 2) for name in "qkv")
    flat = flatten_dict(unet, sep="/")
    return {path.removesuffix("/kernel"): leaf for path, leaf in flat.items() if path.endswith(suffixes)}


def attention_kernels(base: Base) -> dict[str, tuple[int, int]]:
    """Path -> (in, out) of the q, k and v kernels of every attention layer of the U-Net."""
    return {path: kernel.shape for path, kernel in attention_weights(param_shapes(base)["unet"]).items()}


def feature_width(base: Base) -> int:
    """F, the width of φ_unet."""
    params = param_shapes(base)["unet"]
    inputs = (jnp.zeros((1, *base.latent_shape)), jnp.zeros((1,), jnp.int32), jnp.zeros((1, 1, base.unet.cross_attention_dim)))
    return jax.eval_shape(lambda p: unet_features(base, p, *inputs), params).shape[-1]


# pictures and latents -----------------------------------------------------------------------------------------------


def latent_distribution(base: Base, params: Params, images: Float[Array, "b h w 3"]) -> tuple[Array, Array]:
    """(mean, log variance) of the VAE's posterior, before scaling."""
    return base.vae.apply({"params": params["vae"]}, images, method="encode")


def encode_images(
    base: Base, params: Params, images: Float[Array, "b h w 3"], key: PRNGKeyArray | None = None
) -> Float[Array, "b height width channels"]:
    """z_0 = scaling · VAE.encode(I): a draw from the posterior, or its mean without a key."""
    mean, log_variance = latent_distribution(base, params, images)
    if key is not None:
        mean = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape, mean.dtype)
    return mean * base.scaling_factor


def decode_latents(base: Base, params: Params, latents: Float[Array, "b height width channels"]) -> Float[Array, "b h w 3"]:
    """Pictures of scaled latents."""
    return base.vae.apply({"params": params["vae"]}, latents / base.scaling_factor, method="decode")


# text -----------------------------------------------------------------------------------------------------------------


def look_up_words(params: Params, ids: Int[Array, "*shape"]) -> Float[Array, "*shape width"]:
    """Word embeddings of token ids."""
    return params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"][ids]


def encode_text(
    base: Base, params: Params, ids: Int[Array, "b n"], words: Float[Array, "b n d"] | None = None
) -> Float[Array, "b n d"]:
    """τ: the states that the U-Net attends to; `words`, where given, take the place of the ids' own embeddings."""
    variables = {"params": {"text_model": params["text_encoder"]["text_model"]}}
    return base.text.apply(variables, look_up_words(params, ids) if words is None else words)


def embed_text(
    base: Base, params: Params, ids: Int[Array, "b n"], words: Float[Array, "b n d"] | None = None
) -> Float[Array, "b shared"]:
    """CLIP's projected text embedding; `words` as in `encode_text`."""
    pooled = base.text.pool(encode_text(base, params, ids, words), ids)
    return pooled @ params["text_encoder"]["text_projection"]["kernel"]


# CLIP image encoder --------------------------------------------------------------------------------------------------


def _see(base: Base, params: Params, images: Array, method: str) -> Any:
    size = base.vision.image_size
    if images.shape[1:3] != (size, size):
        images = jax.image.resize(images, (images.shape[0], size, size, 3), "cubic", antialias=True)
    pixels = (jnp.clip(images, -1, 1) * 0.5 + 0.5 - _CLIP_MEAN) / _CLIP_DEVIATION
    return base.vision.apply(_vision_weights(params), pixels, method=method)


def _vision_weights(params: Params) -> Params:
    return {"params": {"vision_model": params["image_encoder"]["vision_model"]}}


def image_features(
    base: Base, params: Params, images: Float[Array, "b h w 3"], kind: str = "layers"
) -> Float[Array, "b features width"]:
    """φ_clip, in one of two kinds.

    layers   class-token states of every second layer, after the post layer norm: the paper's
    tokens   states of the last layer: the class token, normed, and every second patch, not normed: the public PyTorch code's
    """
    states = _see(base, params, images, "__call__")

    def norm(states: Array) -> Array:
        return base.vision.apply(_vision_weights(params), states, method="norm")

    if kind == "tokens":
        return jnp.concatenate([norm(states[-1][:, :1]), states[-1][:, 2::2]], axis=1)
    return norm(jnp.stack([state[:, 0] for state in states[2::2]], axis=1))


def feature_count(base: Base, kind: str = "layers") -> int:
    """How many states `image_features` returns."""
    patches = (base.vision.image_size // base.vision.patch_size) ** 2
    return 1 + patches // 2 if kind == "tokens" else base.vision.num_hidden_layers // 2


def embed_image(base: Base, params: Params, images: Float[Array, "b h w 3"]) -> Float[Array, "b shared"]:
    """CLIP's projected image embedding."""
    return _see(base, params, images, "pool") @ params["image_encoder"]["visual_projection"]["kernel"]


# U-Net ----------------------------------------------------------------------------------------------------------------


def denoise(
    base: Base,
    unet: Params,
    z_t: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    text: Float[Array, "b n d"],
) -> Float[Array, "b h w c"]:
    """The U-Net's prediction, ε or v."""
    return denoise_with_features(base, unet, z_t, t, text)[0]


def denoise_with_features(
    base: Base, unet: Params, z_t: Float[Array, "b h w c"], t: Int[Array, " b"], text: Float[Array, "b n d"]
) -> tuple[Float[Array, "b h w c"], Float[Array, "b features"]]:
    """The prediction and φ_unet of the same pass."""
    return base.unet.apply({"params": unet}, z_t, t, text)


def unet_features(
    base: Base, unet: Params, z_t: Float[Array, "b h w c"], t: Int[Array, " b"], text: Float[Array, "b n d"]
) -> Float[Array, "b features"]:
    """φ_unet(z_t, t), at about half the cost of a prediction."""
    return base.unet.apply({"params": unet}, z_t, t, text, method="features")
