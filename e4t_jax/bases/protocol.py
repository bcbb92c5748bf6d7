"""What the method asks of a text-to-image model.

A base is the static side of a model: configurations and modules, no weights. Every function takes the weights of ITS part.
Pictures are NHWC in [-1, 1]; latents are NHWC and scaled to about unit variance. The conditioning that `read` returns is any
pytree with a leading batch axis, so a model with two text encoders and a pooled vector fits. A base is hashable and equal by
value, so that what was compiled for one serves its equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int, PRNGKeyArray

from e4t_jax.arrays import Array

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Params = dict[str, Any]
Conditioning = Any


@runtime_checkable
class Base(Protocol):
    """Encoder and decoder of pictures, two readers (of pictures and of words), and a denoiser."""

    @property
    def tokenizer(self) -> CLIPTokenizer: ...
    @property
    def scheduler(self) -> Mapping[str, Any]: ...  # of the noise: `diffusion.noise_schedule`
    @property
    def image_size(self) -> int: ...
    @property
    def latent_shape(self) -> tuple[int, int, int]: ...
    @property
    def text_width(self) -> int: ...  # of a word embedding
    @property
    def clip_width(self) -> int: ...  # of a state of φ_clip
    @property
    def feature_width(self) -> int: ...  # of φ_unet
    @property
    def dtype(self) -> str: ...  # of the computation

    def with_policy(self, **changes: Any) -> Base: ...  # computed otherwise (dtype, remat), with the same weights
    def encode(self, vae: Params, images: Float[Array, "b h w 3"], key: PRNGKeyArray | None = None) -> Float[Array, "b y x c"]: ...
    def decode(self, vae: Params, latents: Float[Array, "b y x c"]) -> Float[Array, "b h w 3"]: ...
    def see(self, image_encoder: Params, images: Float[Array, "b h w 3"], kind: str) -> Float[Array, "b states width"]: ...
    def feature_count(self, kind: str) -> int: ...  # how many states of φ_clip
    def look_up(self, text_encoder: Params, ids: Int[Array, "*shape"]) -> Float[Array, "*shape width"]: ...
    def read(self, text_encoder: Params, ids: Int[Array, "b n"], words: Float[Array, "b n d"] | None = None) -> Conditioning: ...
    def embed_text(self, text_encoder: Params, ids: Int[Array, "b n"]) -> Float[Array, "b shared"]: ...  # CLIP's, to compare
    def embed_image(self, image_encoder: Params, images: Float[Array, "b h w 3"]) -> Float[Array, "b shared"]: ...
    def denoise(
        self, unet: Params, z_t: Float[Array, "b y x c"], t: Float[Array, " b"] | Int[Array, " b"], conditioning: Conditioning
    ) -> tuple[Float[Array, "b y x c"], Float[Array, "b features"]]: ...  # ε or v, and φ_unet of the same pass
    def features(
        self, unet: Params, z_t: Float[Array, "b y x c"], t: Float[Array, " b"] | Int[Array, " b"], conditioning: Conditioning
    ) -> Float[Array, "b features"]: ...  # φ_unet alone, at about half the cost
    def param_shapes(self) -> Params: ...
    def offset_kernels(self, unet: Params) -> dict[str, Any]: ...  # path -> kernel [in, out] of all that takes weight offsets


class LoadedBase(NamedTuple):
    """A base with its weights, each cast once, when it was read, to the dtype that the policy wants in memory."""

    base: Base
    params: Params
    samples: Params | None = None  # where weights were cast: what `storage.fingerprint` reads of them, as they were stored

    @property
    def stored(self) -> Params:
        """The weights as stored, or samples of them: either has the same fingerprint, whatever dtype the weights lie in."""
        return self.params if self.samples is None else self.samples
