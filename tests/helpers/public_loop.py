"""The public PyTorch code's tuning loop, restated from its description: literal offset networks, the encoder token by token, AdamW.

Networks are diffusers' U-Net and transformers' text encoder; the rest is written out. What is random is handed in.
"""

from __future__ import annotations

import torch
from public_checkpoints import GRID, LAYERS, PATCH, WIDTH
from torch.nn import functional

from benchmarks.plain_pytorch import Plain, tensor

_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
_DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


class PublicLoop(Plain):
    """The loop on a base's folder, from the tensors of encoder.pt and weight_offsets.pt; `trains` names more of the base."""

    def __init__(self, folder, domain, encoder, offsets, trains=()):
        torch.set_num_threads(1)  # of layers this small
        super().__init__(folder, domain.method.empty_ids, int(domain.method.domain_id), domain.scale)
        self._words = self.text.get_input_embeddings().weight
        still = {name: one for name, one in encoder.items() if name.startswith("clip_vision.") and "clip_vision" not in trains}
        self.still = {name: one.clone() for name, one in still.items()}
        self.learned = {
            "unet": self._leaves(self.unet.state_dict()),
            "networks": self._leaves(offsets),
            "encoder": self._leaves({name: one for name, one in encoder.items() if name not in still}),
            "text": self._leaves(dict(self.text.named_parameters()) if "text" in trains else {}),
        }

    @staticmethod
    def _leaves(tensors):
        return {name: one.detach().clone().requires_grad_() for name, one in tensors.items()}

    def run(self, latents, picture, ids, placeholder, draws, *, rate=1.6e-5, strength=0.1):
        """The losses before each step of `draws`, [(t, ε), …]; `learned` holds what came of it."""
        leaves = [leaf for part in self.learned.values() for leaf in part.values()]
        optimiser, losses = torch.optim.AdamW(leaves, lr=rate), []
        latents = tensor(latents).permute(0, 3, 1, 2)
        pixels = tensor(picture).permute(2, 0, 1).expand(len(latents), -1, -1, -1)
        for t, noise in draws:
            loss = self._public_loss(latents, pixels, (tensor(ids).long(), tensor(placeholder)), t, noise, strength)
            losses.append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(leaves, 1.0)
            optimiser.step()
        return losses

    def _public_loss(self, latents, pixels, prompt, t, noise, strength):
        eps, steps = tensor(noise).permute(0, 3, 1, 2), tensor(t).long()
        z_t = self.scheduler.add_noise(latents, eps, steps)
        target = self.scheduler.get_velocity(latents, eps, steps) if self._predicts_v else eps
        weights = self._offset_weights()
        table = next((leaf for name, leaf in self.learned["text"].items() if "token_embedding" in name), self._words)
        offset = self.scale * self._public_encoder(pixels, self._features(weights, z_t, steps))
        word = table[self.domain_id].detach() + offset
        ids, marks = prompt
        handle = self.text.get_input_embeddings().register_forward_hook(
            lambda module, given, made: torch.where(marks[..., None], word[:, None], made)
        )
        text = torch.func.functional_call(self.text, self.learned["text"], (ids,)).last_hidden_state
        handle.remove()
        error = functional.mse_loss(self._denoise(weights, z_t, steps, text), target)
        return error + strength * word.pow(2).sum()

    def _features(self, weights, z_t, t):
        """φ under τ("") of the text encoder as it stands, through which no gradient passes."""
        held = self.text
        self.text = lambda ids: torch.func.functional_call(held, {n: p.detach() for n, p in self.learned["text"].items()}, (ids,))
        try:
            return super()._features(weights, z_t, t)
        finally:
            self.text = held

    def _offset_weights(self):
        """Every weight of the U-Net, those of attention times 1 + Δ, Δ through the literal network."""
        changed, networks = dict(self.learned["unet"]), self.learned["networks"]

        def layer(owner, name, x):
            return functional.linear(x, networks[f"{owner}.{name}.weight"], networks[f"{owner}.{name}.bias"])

        for owner in [name.removesuffix(".v") for name in networks if name.endswith(".v")]:
            v = networks[f"{owner}.v"]
            outer = torch.outer(layer(owner, "linear1", v), layer(owner, "linear2", v))
            shift = layer(owner, "linear_row", layer(owner, "linear_column", outer.T).T)  # [in, out]
            name = f"{owner.replace('.wo_', '.to_')}.weight"
            changed[name] = changed[name] * (1 + shift.T)
        return changed

    def _public_encoder(self, pixels, features):
        """E of pictures in [-1, 1] and φ: a layer for each token."""
        own = {**self.still, **self.learned["encoder"]}

        def linear(x, name):
            return functional.linear(x, own[f"{name}.weight"], own[f"{name}.bias"])

        size = GRID * PATCH
        seen = functional.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=True)
        vision = {name.removeprefix("clip_vision."): one for name, one in own.items()}
        tokens = self._see(vision, ((seen + 1) / 2 - _MEAN) / _DEVIATION)
        g = linear(functional.leaky_relu(linear(features, "unet_feature_embedder.0")), "unet_feature_embedder.2")
        joined = [linear(torch.cat([tokens[:, index], g], dim=1), "feature_linear") for index in range(tokens.shape[1])]
        mean = torch.stack([linear(one, f"first_linears.{index}") for index, one in enumerate(joined)]).mean(dim=0)
        return linear(functional.leaky_relu(mean), "final_linear")

    @staticmethod
    def _see(vision, pixels):
        """The class token, normed, and every second patch token of OpenCLIP's tower (before 2.23)."""

        def norm(x, name):
            return functional.layer_norm(x, (WIDTH,), vision[f"{name}.weight"], vision[f"{name}.bias"])

        def linear(x, name):
            return functional.linear(x, vision[f"{name}.weight"], vision[f"{name}.bias"])

        patches = functional.conv2d(pixels, vision["conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
        tokens = torch.cat([vision["class_embedding"].expand(len(pixels), 1, -1), patches], dim=1)
        x = norm(tokens + vision["positional_embedding"], "ln_pre")
        for index in range(LAYERS):
            block = f"transformer.resblocks.{index}"
            normed = norm(x, f"{block}.ln_1")
            projected = functional.linear(normed, vision[f"{block}.attn.in_proj_weight"], vision[f"{block}.attn.in_proj_bias"])
            attended = functional.scaled_dot_product_attention(*projected.chunk(3, dim=-1))  # one head
            x = x + linear(attended, f"{block}.attn.out_proj")
            x = x + linear(functional.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
        return torch.cat([norm(x[:, :1], "ln_post"), x[:, 1:][:, 1::2]], dim=1)
