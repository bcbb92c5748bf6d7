"""The concept encoder: from one image, seen by CLIP and by the U-Net, to the offset of a word embedding.

With φ_clip [L, D] the class-token states of L layers of a frozen CLIP image encoder, and φ_unet [F] the
pooled features of the U-Net at (z_t, t), the encoder of E4T (Gal et al. 2023, arXiv 2302.12228) reads

    g   = Linear(LeakyReLU(Linear(φ_unet)))           in R^D
    u_l = Linear([φ_clip_l ; g])                      one layer for all l
    h_l = Linear_l(u_l)                               one layer for each l
    E   = Linear(LeakyReLU(mean_l h_l))               in R^text_width

and the concept's word is e* = e_d + s E. The image enters once, but φ_unet changes with every sampling step.
Up to the last LeakyReLU all is linear in φ_clip and g, so, with the shared layer x ↦ x [W_clip ; W_g] + b and
the l-th layer x ↦ x W_l + b_l,

    mean_l h_l = mean_l((φ_clip_l W_clip + b) W_l + b_l)  +  g W_g (mean_l W_l)
                 └──────────── fold(φ_clip) ───────────┘     └─ every step ─┘

The fold is ONE vector of size D an image, computed once; a step pays for g alone.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from e4t_jax.arrays import Array

leaky_relu = partial(nn.leaky_relu, negative_slope=0.01)


class ConceptEncoder(nn.Module):
    """φ_clip, φ_unet ↦ E, the learned part of e* = e_d + s E (arXiv 2302.12228).

        encoder = ConceptEncoder(clip_layers=16, clip_width=1280, text_width=768)  # ViT-H/14 and SD 1.x
        folded = encoder.apply(variables, phi_clip, method="fold")                 # once per image
        offset = encoder.apply(variables, folded, phi_unet)                        # at every step

    L = `clip_layers` states of width D = `clip_width`; E has `text_width` numbers.
    """

    clip_layers: int
    clip_width: int
    text_width: int

    def setup(self):
        layers, width = self.clip_layers, self.clip_width
        self.unet_hidden = nn.Dense(width)
        self.unet_output = nn.Dense(width)
        # Plain parameters, not Dense layers: `fold` and `__call__` each need a half of what Dense would hide.
        self.shared_kernel = self.param("shared_kernel", nn.initializers.lecun_normal(), (2 * width, width))
        self.shared_bias = self.param("shared_bias", nn.initializers.zeros, (width,))
        each = nn.initializers.lecun_normal(batch_axis=0)
        self.layer_kernels = self.param("layer_kernels", each, (layers, width, width))
        self.layer_biases = self.param("layer_biases", nn.initializers.zeros, (layers, width))
        # A hundredth of the usual deviation: e* starts at the domain's word, with a gradient in every layer.
        small = nn.initializers.variance_scaling(1e-4, "fan_in", "truncated_normal")
        self.final = nn.Dense(self.text_width, kernel_init=small)

    def fold(self, phi_clip: Float[Array, "batch layers width"]) -> Float[Array, "batch width"]:
        """All that E owes to the image alone: mean_l((φ_clip_l W_clip + b) W_l + b_l)."""
        u = phi_clip @ self.shared_kernel[: self.clip_width] + self.shared_bias
        h = jnp.einsum("bld,lde->be", u, self.layer_kernels)
        return h / self.clip_layers + self.layer_biases.mean(axis=0)

    def __call__(
        self, folded: Float[Array, "batch width"], phi_unet: Float[Array, "batch features"]
    ) -> Float[Array, "batch text_width"]:
        """E from the folded image and φ_unet(z_t, t): Linear(LeakyReLU(fold + g W_g mean_l W_l))."""
        of_step = self._embed(phi_unet) @ self.shared_kernel[self.clip_width :]
        return self.final(leaky_relu(folded + of_step @ self.layer_kernels.mean(axis=0)))

    def unfolded(
        self, phi_clip: Float[Array, "batch layers width"], phi_unet: Float[Array, "batch features"]
    ) -> Float[Array, "batch text_width"]:
        """E as the paper writes it, layer by layer: the same numbers at L times the cost of a step."""
        g = jnp.broadcast_to(self._embed(phi_unet)[:, None], phi_clip.shape)
        u = jnp.concatenate([phi_clip, g], axis=-1) @ self.shared_kernel + self.shared_bias
        h = jnp.einsum("bld,lde->ble", u, self.layer_kernels) + self.layer_biases
        return self.final(leaky_relu(h.mean(axis=1)))

    def _embed(self, phi_unet: Float[Array, "batch features"]) -> Float[Array, "batch width"]:
        """g = Linear(LeakyReLU(Linear(φ_unet)))."""
        return self.unet_output(leaky_relu(self.unet_hidden(phi_unet)))
