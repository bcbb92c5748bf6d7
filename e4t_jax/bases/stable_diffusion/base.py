"""Stable Diffusion 1.x and 2.x as a base (`bases.protocol`): five parts in the diffusers layout.

`StableDiffusion` is the static side (configurations, modules, tokenizer); all weights live in one pytree, keyed
"vae", "unet", "text_encoder", "image_encoder", and each function is handed those of its part.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Int, PRNGKeyArray

from e4t_jax.arrays import Array
from e4t_jax.bases.image_encoders import image_encoder_of
from e4t_jax.bases.protocol import ImageEncoder, Params
from e4t_jax.bases.stable_diffusion.clip import CLIPText
from e4t_jax.bases.stable_diffusion.policy import DEFAULT, Policy, gather
from e4t_jax.bases.stable_diffusion.random_weights import draw_leaf
from e4t_jax.bases.stable_diffusion.settings import module_of
from e4t_jax.bases.stable_diffusion.unet import UNet
from e4t_jax.bases.stable_diffusion.vae import VAE
from e4t_jax.process import draw_noise

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_PROJECTION = 512  # the default of CLIP's configurations
# Kernels of the U-Net that take weight offsets: q, k and v of self- and cross-attention.
_OFFSET = tuple(f"attn{i}/to_{name}/kernel" for i in (1, 2) for name in "qkv")


@dataclasses.dataclass(frozen=True, eq=False)
class StableDiffusion:
    """The static side of the model; `configs` are the folder's own JSON files, keyed by part.

    Two bases of equal configurations, words, policy and features are equal: what was compiled for one serves the other.
    """

    configs: Mapping[str, Mapping[str, Any]]
    tokenizer: CLIPTokenizer
    policy: Policy = DEFAULT
    clip_features: str | None = None  # which states the image encoder gives; its own default where None

    @cached_property
    def _value(self) -> tuple[str, frozenset[tuple[str, int]], Policy, str]:
        words = frozenset(self.tokenizer.get_vocab().items()) if self.tokenizer is not None else frozenset()
        return json.dumps(self.configs, sort_keys=True), words, self.policy, self.image_encoder.features

    @property
    def description(self) -> dict[str, Any]:
        """What programs of this base are traced from, as plain data."""
        return {"configs": self.configs, "policy": self.policy, "clip_features": self.image_encoder.features}

    @cached_property
    def _hash(self) -> int:
        return hash(self._value)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, StableDiffusion) and self._hash == other._hash and self._value == other._value)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def vae(self) -> VAE:
        """The autoencoder's module."""
        return module_of("vae", self.configs["vae"], self.policy)

    @cached_property
    def unet(self) -> UNet:
        """The denoiser's module."""
        return module_of("unet", self.configs["unet"], self.policy)

    @cached_property
    def text(self) -> CLIPText:
        """The text encoder's module."""
        return module_of("text_encoder", self.configs["text_encoder"], self.policy)

    @cached_property
    def image_encoder(self) -> ImageEncoder:
        """The image encoder of the kind that its configuration names."""
        config = self.configs["image_encoder"]
        return image_encoder_of(config, self.clip_features, **dataclasses.asdict(self.policy))

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """The scheduler's configuration, for `bases.scheduler_config.noise_schedule`."""
        return self.configs["scheduler"]

    @property
    def scaling_factor(self) -> float:
        """What takes the VAE's latents to about unit variance."""
        return self.configs["vae"].get("scaling_factor", 0.18215)

    @property
    def image_size(self) -> int:
        """Pixels a side of the pictures that the U-Net was trained on."""
        return self.unet.sample_size * self.downsampling

    @property
    def downsampling(self) -> int:
        """Pixels a side for each latent."""
        return 2 ** (len(self.vae.block_out_channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a picture's latents."""
        return (self.unet.sample_size, self.unet.sample_size, self.unet.in_channels)

    @property
    def text_width(self) -> int:
        """Numbers of a word embedding."""
        return self.text.hidden_size

    @cached_property
    def feature_width(self) -> int:
        """F, the width of φ_unet."""
        text = jax.ShapeDtypeStruct((1, 1, self.unet.cross_attention_dim), jnp.float32)
        z_t, t = jax.ShapeDtypeStruct((1, *self.latent_shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
        return jax.eval_shape(self.features, self.param_shapes()["unet"], z_t, t, text).shape[-1]

    @property
    def dtype(self) -> str:
        """What the networks compute in."""
        return self.policy.dtype

    def with_policy(self, **changes: Any) -> StableDiffusion:
        """The same model computed otherwise: single fields of `Policy`."""
        return dataclasses.replace(self, policy=dataclasses.replace(self.policy, **changes))

    def with_features(self, clip_features: str) -> StableDiffusion:
        """The same model, of whose image encoder the states of that name are taken."""
        return dataclasses.replace(self, clip_features=clip_features)

    def with_scaling_factor(self, scaling_factor: float) -> StableDiffusion:
        """The same base with another latent scale."""
        configs = {**self.configs, "vae": {**self.configs["vae"], "scaling_factor": scaling_factor}}
        return dataclasses.replace(self, configs=configs)

    # weights ------------------------------------------------------------------------------------------------------------

    @lru_cache(maxsize=4)  # noqa: B019 - equal bases share it; tracing all initialisers takes a second
    def param_shapes(self) -> Params:
        """Shapes and dtypes of all weights, as the policy wants them in memory, with nothing allocated."""
        ids = jnp.zeros((1, self.text.max_position_embeddings), jnp.int32)
        size = self.image_size

        def init() -> Params:
            key = jax.random.key(0)
            latents, text = jnp.zeros((1, *self.latent_shape)), jnp.zeros((1, 1, self.unet.cross_attention_dim))
            return {
                "vae": self.vae.init(key, jnp.zeros((1, size, size, 3)))["params"],
                "unet": self.unet.init(key, latents, jnp.zeros((1,), jnp.int32), text)["params"],
                "text_encoder": self.text.init(key, ids, method="read")["params"],
            }

        params: Params = {**jax.eval_shape(init), "image_encoder": self.image_encoder.param_shapes()}
        text = self.configs["text_encoder"]
        if (text.get("architectures") or [""])[0].endswith("WithProjection"):
            shape = (self.text_width, text.get("projection_dim", _PROJECTION))
            params["text_encoder"]["text_projection"] = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
        shapes = flatten_dict(params, sep="/")
        return unflatten_dict(
            {path: jax.ShapeDtypeStruct(leaf.shape, self.policy.weight_dtype(path)) for path, leaf in shapes.items()}, sep="/"
        )

    def random_params(self, key: PRNGKeyArray) -> Params:
        """Random weights of every part (`random_weights.draw_leaf`)."""
        generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        shapes = flatten_dict(self.param_shapes(), sep="/")
        drawn = {path: jnp.asarray(draw_leaf(generator, path, shapes[path].shape), shapes[path].dtype) for path in sorted(shapes)}
        return unflatten_dict(drawn, sep="/")

    def offset_kernels(self, unet: Params) -> dict[str, Any]:
        """Path -> q, k or v kernel [in, out] of every attention layer of the U-Net: what weight offsets multiply."""
        flat = flatten_dict(unet, sep="/")
        return {path.removesuffix("/kernel"): leaf for path, leaf in flat.items() if path.endswith(_OFFSET)}

    # pictures and latents -----------------------------------------------------------------------------------------------

    def posterior(self, vae: Params, images: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b y x c"], Float[Array, "b y x c"]]:
        """(mean, log variance) of the VAE's posterior, before scaling."""
        return self.vae.apply({"params": vae}, images, method="encode")

    def encode(self, vae: Params, images: Float[Array, "b h w 3"], key: PRNGKeyArray | None = None) -> Float[Array, "b y x c"]:
        """z_0 = scaling · VAE.encode(I): a draw from the posterior, or its mean without a key."""
        mean, log_variance = self.posterior(vae, images)
        if key is not None:
            mean = mean + jnp.exp(0.5 * log_variance) * draw_noise(key, mean.shape)
        return mean * self.scaling_factor

    def decode(self, vae: Params, latents: Float[Array, "b y x c"]) -> Float[Array, "b h w 3"]:
        """Pictures of scaled latents."""
        return self.vae.apply({"params": vae}, latents / self.scaling_factor, method="decode")

    # words --------------------------------------------------------------------------------------------------------------

    def look_up(self, text_encoder: Params, ids: Int[Array, "*shape"]) -> Float[Array, "*shape d"]:
        """Word embeddings of token ids."""
        return gather(text_encoder["text_model"]["embeddings"]["token_embedding"]["embedding"])[ids]

    def read(
        self, text_encoder: Params, ids: Int[Array, "b n"], words: Float[Array, "b n d"] | None = None
    ) -> Float[Array, "b n d"]:
        """τ: the states that the U-Net attends to; `words`, where given, take the place of the ids' own embeddings."""
        variables = {"params": {"text_model": text_encoder["text_model"]}}
        return self.text.apply(variables, self.look_up(text_encoder, ids) if words is None else words)

    def embed_text(
        self, text_encoder: Params, ids: Int[Array, "b n"], words: Float[Array, "b n d"] | None = None
    ) -> Float[Array, "b shared"]:
        """CLIP's projected text embedding; `words` as in `read`."""
        pooled = self.text.pool(self.read(text_encoder, ids, words), ids)
        return pooled @ text_encoder["text_projection"]["kernel"]

    # U-Net --------------------------------------------------------------------------------------------------------------

    def denoise(
        self,
        unet: Params,
        z_t: Float[Array, "b y x c"],
        t: Int[Array, " b"] | Float[Array, " b"],
        conditioning: Float[Array, "b n d"],
    ) -> tuple[Float[Array, "b y x c"], Float[Array, "b features"]]:
        """The U-Net's prediction, ε or v, and φ_unet of the same pass."""
        return self.unet.apply({"params": unet}, z_t, t, conditioning)

    def features(
        self,
        unet: Params,
        z_t: Float[Array, "b y x c"],
        t: Int[Array, " b"] | Float[Array, " b"],
        conditioning: Float[Array, "b n d"],
    ) -> Float[Array, "b features"]:
        """φ_unet(z_t, t), at about half the cost of a prediction."""
        return self.unet.apply({"params": unet}, z_t, t, conditioning, method="features")
