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
class ImageEncoder(Protocol):
    """How the concept encoder sees pictures: the static side of a frozen network that gives L states of width D for each, φ_clip.

    Which states those are was chosen when it was made. It is a base's `image_encoder`, and no other part of one knows its kind.
    """

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of its config.json, of which `bases.image_encoders.image_encoder_of` makes its equal."""
        ...

    @property
    def features(self) -> str:
        """Which states `see` gives, by a name that its maker takes: "layers", "tokens"."""
        ...

    @property
    def count(self) -> int:
        """L, how many states `see` gives."""
        ...

    @property
    def width(self) -> int:
        """D, the numbers of one state."""
        ...

    def see(self, weights: Params, images: Float[Array, "b h w 3"]) -> Float[Array, "b states width"]:
        """φ_clip of pictures in [-1, 1] of any size."""
        ...

    def embed(self, weights: Params, images: Float[Array, "b h w 3"]) -> Float[Array, "b shared"]:
        """Pictures in [-1, 1] in the space of `Base.embed_text`, for measures; not normalised."""
        ...

    def param_shapes(self) -> Params:
        """The weights' shapes, by the names they have in files; nothing is allocated."""
        ...


@runtime_checkable
class Base(Protocol):
    """Encoder and decoder of pictures, a reader of words, a denoiser, and the image encoder that goes with them.

    Axes: b pictures or prompts; h × w pixels; y × x latents of c channels; n tokens of a prompt; d the width of a word embedding.
    """

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """From text to token ids, padded to `model_max_length` = n."""
        ...

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """The noise as `scheduler_config.json` describes it, for `bases.scheduler_config.noise_schedule`."""
        ...

    @property
    def image_size(self) -> int:
        """h = w, pixels a side of a picture."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(y, x, c) of a picture's latents."""
        ...

    @property
    def text_width(self) -> int:
        """d, the numbers of a word embedding."""
        ...

    @property
    def image_encoder(self) -> ImageEncoder:
        """What gives φ_clip, and which states of it."""
        ...

    @property
    def feature_width(self) -> int:
        """F, the numbers of φ_unet."""
        ...

    @property
    def dtype(self) -> str:
        """What the networks compute in: "float32" or "bfloat16"."""
        ...

    def with_policy(self, **changes: Any) -> Base:
        """The same model computed otherwise (`dtype`, `remat`, `attention`), for the same weights."""
        ...

    def encode(self, vae: Params, images: Float[Array, "b h w 3"], key: PRNGKeyArray | None = None) -> Float[Array, "b y x c"]:
        """Latents z_0 of pictures in [-1, 1]: the mean of the posterior, or a sample of it with `key`; of about unit variance."""
        ...

    def decode(self, vae: Params, latents: Float[Array, "b y x c"]) -> Float[Array, "b h w 3"]:
        """Pictures of latents as `encode` gives them; about [-1, 1], not clipped."""
        ...

    def look_up(self, text_encoder: Params, ids: Int[Array, "*shape"]) -> Float[Array, "*shape width"]:
        """The word embeddings of token ids, before positions are added."""
        ...

    def read(self, text_encoder: Params, ids: Int[Array, "b n"], words: Float[Array, "b n d"] | None = None) -> Conditioning:
        """τ: what the denoiser is told by prompts. `words` take the place of what `look_up` gives of `ids`."""
        ...

    def embed_text(self, text_encoder: Params, ids: Int[Array, "b n"]) -> Float[Array, "b shared"]:
        """Prompts in CLIP's space of texts and pictures, for measures; not normalised."""
        ...

    def denoise(
        self, unet: Params, z_t: Float[Array, "b y x c"], t: Float[Array, " b"] | Int[Array, " b"], conditioning: Conditioning
    ) -> tuple[Float[Array, "b y x c"], Float[Array, "b features"]]:
        """The model's output at z_t and timestep t, raw (ε or v, as `scheduler` says), and φ_unet of the same pass."""
        ...

    def features(
        self, unet: Params, z_t: Float[Array, "b y x c"], t: Float[Array, " b"] | Int[Array, " b"], conditioning: Conditioning
    ) -> Float[Array, "b features"]:
        """φ_unet alone, at about half the cost of `denoise`."""
        ...

    def param_shapes(self) -> Params:
        """The weights' shapes and dtypes, keyed "vae", "unet", "text_encoder", "image_encoder"; nothing is allocated."""
        ...

    def offset_kernels(self, unet: Params) -> dict[str, Any]:
        """Path -> kernel [*stack, in, out] of every projection that takes weight offsets: q, k and v of all attention layers."""
        ...


class LoadedBase(NamedTuple):
    """A base with its weights, each cast once, when it was read, to the dtype that the policy wants in memory."""

    base: Base
    params: Params
    samples: Params | None = None  # where weights were cast: what `storage.fingerprint` reads of them, as they were stored

    @property
    def stored(self) -> Params:
        """The weights as stored, or samples of them: either has the same fingerprint, whatever dtype the weights lie in."""
        return self.params if self.samples is None else self.samples
