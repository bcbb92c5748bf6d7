"""E4T's tuning written plainly in PyTorch: diffusers' U-Net, transformers' text encoder, literal offset networks, autograd, AdamW.

It shares no code with the package but the names of weights, so that it can stand as a witness (`tests/test_gradients.py`) and as a
rival (`benchmarks/versus_pytorch.py`). Arguments are NumPy arrays in the package's layouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch.nn.functional import leaky_relu, linear
from transformers import CLIPTextModel

from e4t_jax import bases

Tensors = Mapping[str, Any]


class _Enough(Exception):
    """The middle of the U-Net is reached, and φ_unet is complete."""


class Plain:
    """The loss of one base; weights that learn are arguments.

    folder        of `bases.save_folder`
    empty_ids     [1, length], the empty prompt
    domain_id     the domain's token
    """

    def __init__(self, folder: Path, empty_ids: np.ndarray, domain_id: int, scale: float):
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval().requires_grad_(False)
        self.text = CLIPTextModel.from_pretrained(folder / "text_encoder").eval().requires_grad_(False)
        self.scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        self.empty, self.domain_id, self.scale = tensor(empty_ids).long(), domain_id, scale
        self._kept: list[torch.Tensor] = []
        self._only_features = False
        self.unet.conv_in.register_forward_hook(lambda module, given, made: self._kept.append(made))
        for block in self.unet.down_blocks:
            block.register_forward_hook(lambda module, given, made: self._kept.extend(made[1]))
        self.unet.mid_block.register_forward_hook(self._at_the_middle)

    def _at_the_middle(self, module: Any, given: Any, made: torch.Tensor) -> None:
        self._kept.append(made)
        if self._only_features:
            raise _Enough

    def unet_weights(self) -> dict[str, torch.Tensor]:
        """The U-Net's own weights by PyTorch's names."""
        return dict(self.unet.named_parameters())

    def _denoise(self, weights: Tensors, z_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(self.unet, dict(weights), (z_t, t, text)).sample

    def _features(self, weights: Tensors, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        text = self.text(self.empty).last_hidden_state.expand(len(z_t), -1, -1)
        self._kept.clear()
        self._only_features = True
        try:
            self._denoise(weights, z_t, t, text)
        except _Enough:
            return torch.cat([one.mean(dim=(2, 3)) for one in self._kept], dim=1)
        finally:
            self._only_features = False
        raise AssertionError("the U-Net has no middle")

    def loss(
        self, weights: Tensors, encoder: Any, batch: Any, t: np.ndarray, noise: np.ndarray, regularisation: float
    ) -> torch.Tensor:
        """The E4T loss with a U-Net of `weights` (offsets applied) and the encoder's tree of tensors."""
        latents, eps = (tensor(x).permute(0, 3, 1, 2) for x in (batch.latents, noise))
        steps = tensor(t).long()
        z_t = self.scheduler.add_noise(latents, eps, steps)
        target = self.scheduler.get_velocity(latents, eps, steps) if self._predicts_v else eps
        offset = self.scale * self._encode(encoder, batch.clip, self._features(weights, z_t, steps))
        embeddings = self.text.get_input_embeddings()
        word = embeddings.weight[self.domain_id] + offset
        # The word takes its place by a hook: position embeddings are added afterwards, by the model itself.
        marks = tensor(batch.placeholder)[..., None]
        handle = embeddings.register_forward_hook(lambda module, given, made: torch.where(marks, word[:, None], made))
        text = self.text(tensor(batch.ids).long()).last_hidden_state
        handle.remove()
        error = (self._denoise(weights, z_t, steps, text) - target) ** 2
        mask = tensor(batch.mask)[:, None]
        share = (offset**2).sum(dim=1).mean() / (embeddings.weight[self.domain_id] ** 2).sum()
        return (error * mask).sum() / (mask.sum() * error.shape[1]) + regularisation * share

    @property
    def _predicts_v(self) -> bool:
        return self.scheduler.config.prediction_type == "v_prediction"

    def _encode(self, encoder: Any, clip: np.ndarray, features: torch.Tensor) -> torch.Tensor:
        """E, layer by layer, as the paper writes it."""
        hidden = leaky_relu(linear(features, encoder["unet_hidden"]["kernel"].T, encoder["unet_hidden"]["bias"]))
        g = linear(hidden, encoder["unet_output"]["kernel"].T, encoder["unet_output"]["bias"])
        states = []
        for layer in range(clip.shape[1]):
            joined = torch.cat([tensor(clip[:, layer]), g], dim=1)
            shared = joined @ encoder["shared_kernel"] + encoder["shared_bias"]
            states.append(shared @ encoder["layer_kernels"][layer] + encoder["layer_biases"][layer])
        return linear(leaky_relu(torch.stack(states).mean(dim=0)), encoder["final"]["kernel"].T, encoder["final"]["bias"])


def tensor(x: Any) -> torch.Tensor:
    """A tensor of its own memory."""
    return torch.tensor(np.asarray(x))


def offset_by_factors(weights: Tensors, *sets: Mapping[str, Tensors]) -> dict[str, torch.Tensor]:
    """W ⊙ (1 + Σ rows columnsᵀ), over sets of factors keyed by the package's names of kernels."""
    changed = dict(weights)
    for path in sets[0]:
        name = bases.torch_name("unet", f"{path}/kernel")
        delta = sum(factors[path]["rows"] @ factors[path]["columns"].T for factors in sets)
        changed[name] = weights[name] * (1 + delta).T
    return changed


class OffsetNetwork(torch.nn.Module):
    """The paper's own network for the offsets of one weight [out, in], layer by layer at O(n³); Δ = 0 at the start."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.v = torch.nn.Parameter(torch.ones(1))
        self.linear1, self.linear2 = torch.nn.Linear(1, rows), torch.nn.Linear(1, columns)
        self.linear_column, self.linear_row = torch.nn.Linear(rows, rows), torch.nn.Linear(columns, columns)
        torch.nn.init.zeros_(self.linear_row.weight)
        torch.nn.init.zeros_(self.linear_row.bias)

    def forward(self) -> torch.Tensor:
        outer = torch.outer(self.linear1(self.v), self.linear2(self.v))
        return self.linear_row(self.linear_column(outer.T).T).T


def offset_by_networks(weights: Tensors, networks: Mapping[str, OffsetNetwork]) -> dict[str, torch.Tensor]:
    """W ⊙ (1 + Δ), Δ through the literal networks, keyed by PyTorch's names of the weights."""
    return {**weights, **{name: weights[name] * (1 + network()) for name, network in networks.items()}}
