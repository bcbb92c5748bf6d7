"""E4T on networks of PyTorch with random weights, for `gpu_pytorch.py`: the loss, a step of AdamW, drawing.

The offsets are multiplied out to factors of rank 3 as ours are (the public code's own form is of a higher order, and slower), and
what learns is float32. Drawing takes a constant word: two passes of the U-Net a step, as ours.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch.nn.functional import interpolate, leaky_relu
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

PROMPTS = 4
_STEPS, _GUIDANCE = 25, 7.5
_OFFSET = tuple(f"attn{i}.to_{name}.weight" for i in (1, 2) for name in "qkv")


class Denoiser(torch.nn.Module):
    """diffusers' U-Net, which gives φ_unet alone where `text` is the empty prompt's and nothing else is asked for."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(self, z_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor, only_features: bool = False) -> torch.Tensor:
        if not only_features:
            return self.unet(z_t, t, text).sample
        unet = self.unet
        time_embedding = unet.time_embedding(unet.time_proj(t).to(z_t.dtype))
        x = unet.conv_in(z_t)
        kept = [x]
        for block in unet.down_blocks:
            more = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
            x, residuals = block(x, time_embedding, **more)
            kept.extend(residuals)
        kept.append(unet.mid_block(x, time_embedding, encoder_hidden_states=text))
        return torch.cat([one.mean(dim=(2, 3)) for one in kept], dim=1)


class Model:
    """All networks with random weights in `dtype`, and what E4T learns in float32."""

    def __init__(self, base: Any, device: str, dtype: torch.dtype):
        configs = base.configs
        self.device, self.dtype, self.base = device, dtype, base

        def place(module: torch.nn.Module) -> torch.nn.Module:
            return module.eval().requires_grad_(False).to(device, dtype)

        self.denoiser = place(Denoiser(UNet2DConditionModel.from_config(configs["unet"])))
        self.vae = place(AutoencoderKL.from_config(configs["vae"]))
        self.text = place(CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])))
        self.vision = place(CLIPVisionModel(CLIPVisionConfig(**dict(base.image_encoder.config))))
        self.scheduler = DDIMScheduler.from_config(configs["scheduler"])
        self.ids = torch.arange(self.text.config.max_position_embeddings, device=device)[None] % 100
        self.kernels = {name: weight for name, weight in self.denoiser.named_parameters() if name.endswith(_OFFSET)}
        clip, text = base.image_encoder.width, base.text_width
        shapes = {"hidden": (base.feature_width, clip), "g": (clip, clip), "shared": (2 * clip, clip), "final": (clip, text)}
        self.learned = {name: 0.02 * torch.randn(shape, device=device) for name, shape in shapes.items()}
        self.learned["layers"] = 0.02 * torch.randn((base.image_encoder.count, clip, clip), device=device)
        for name, weight in self.kernels.items():
            self.learned[f"{name} rows"] = torch.zeros((weight.shape[0], 3), device=device)
            self.learned[f"{name} columns"] = torch.randn((3, weight.shape[1]), device=device)
        for value in self.learned.values():
            value.requires_grad_()
        self.optimiser = torch.optim.AdamW(list(self.learned.values()), 1.6e-5, fused=device == "cuda")

    def offset(self) -> dict[str, torch.Tensor]:
        """W ⊙ (1 + rows columns) of every q, k and v."""
        learned = self.learned
        deltas = {name: learned[f"{name} rows"] @ learned[f"{name} columns"] for name in self.kernels}
        return {name: (weight * (1 + deltas[name])).to(weight.dtype) for name, weight in self.kernels.items()}

    def encode(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z_0 and φ_clip of pictures [b, 3, h, w] in [-1, 1]."""
        latents = self.vae.encode(pictures).latent_dist.mean * self.base.scaling_factor
        size = self.vision.config.image_size
        states = self.vision(interpolate(pictures, (size, size), mode="bicubic"), output_hidden_states=True).hidden_states
        inner = getattr(self.vision, "vision_model", self.vision)
        return latents, inner.post_layernorm(torch.stack([state[:, 0] for state in states[2::2]], dim=1))

    def word(self, clip: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """E of φ_clip and φ_unet."""
        learned = self.learned
        g = leaky_relu(features.float() @ learned["hidden"]) @ learned["g"]
        joined = torch.cat([clip.float(), g[:, None].expand(-1, clip.shape[1], -1)], dim=2) @ learned["shared"]
        mean = torch.einsum("bld,lde->be", joined, learned["layers"]) / clip.shape[1]
        return leaky_relu(mean) @ learned["final"]

    def loss(self, latents: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
        """The E4T loss at fresh timesteps and noise."""
        count = len(latents)
        noise, t = torch.randn_like(latents), torch.randint(0, 1000, (count,), device=self.device)
        z_t, weights = self.scheduler.add_noise(latents, noise, t), self.offset()
        empty = self.text(self.ids).last_hidden_state.expand(count, -1, -1)
        features = torch.func.functional_call(self.denoiser, weights, (z_t, t, empty, True))
        offset = 0.1 * self.word(clip, features)
        embeddings = self.text.get_input_embeddings()
        handle = embeddings.register_forward_hook(lambda module, ids, made: made + offset[:, None].to(made.dtype))
        text = self.text(self.ids.expand(count, -1)).last_hidden_state
        handle.remove()
        made = torch.func.functional_call(self.denoiser, weights, (z_t, t, text))
        return (made.float() - noise.float()).square().mean() + 0.01 * offset.square().sum(dim=1).mean()

    def step(self, latents: torch.Tensor, clip: torch.Tensor) -> None:
        """One step of AdamW."""
        self.optimiser.zero_grad()
        self.loss(latents, clip).backward()
        self.optimiser.step()

    @torch.no_grad()
    def draw(self) -> torch.Tensor:
        """Pictures in four prompts: DDIM, guidance, VAE."""
        self.scheduler.set_timesteps(_STEPS)
        height, width, channels = self.base.latent_shape
        z = torch.randn((PROMPTS, channels, height, width), device=self.device, dtype=self.dtype)
        text = self.text(self.ids).last_hidden_state.expand(2 * PROMPTS, -1, -1)
        for t in self.scheduler.timesteps:
            without, conditional = self.denoiser(torch.cat([z, z]), t.to(self.device), text).chunk(2)
            z = self.scheduler.step(without + _GUIDANCE * (conditional - without), t, z).prev_sample
        return self.vae.decode(z / self.base.scaling_factor).sample
