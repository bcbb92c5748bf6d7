"""Checkpoints of the public PyTorch implementation, in its file formats, with random weights of a tiny geometry."""

import importlib.util
import json
from pathlib import Path

from e4t_jax import bases
from e4t_jax.bases import StableDiffusion

HAS_TORCH = importlib.util.find_spec("torch") is not None
WIDTH, PATCH, GRID, LAYERS = 64, 4, 4, 2


def random_tensor(generator, *shape, scale=0.1):
    import torch

    return scale * torch.randn(*shape, generator=generator)


def linear_state(generator, prefix, columns, rows):
    return {
        f"{prefix}.weight": random_tensor(generator, rows, columns, scale=columns**-0.5),
        f"{prefix}.bias": random_tensor(generator, rows),
    }


def vision_state(generator, width=WIDTH, patch=PATCH, grid=GRID, layers=LAYERS, mlp=2):
    """An OpenCLIP visual tower's tensors, its projection dropped."""
    state = {
        "conv1.weight": random_tensor(generator, width, 3, patch, patch),
        "class_embedding": random_tensor(generator, width),
        "positional_embedding": random_tensor(generator, grid**2 + 1, width),
    }
    norms = ["ln_pre", "ln_post", *(f"transformer.resblocks.{i}.ln_{j}" for i in range(layers) for j in (1, 2))]
    for name in norms:
        state |= {f"{name}.weight": 1 + random_tensor(generator, width), f"{name}.bias": random_tensor(generator, width)}
    for index in range(layers):
        block = f"transformer.resblocks.{index}"
        state[f"{block}.attn.in_proj_weight"] = random_tensor(generator, 3 * width, width, scale=width**-0.5)
        state[f"{block}.attn.in_proj_bias"] = random_tensor(generator, 3 * width)
        state |= linear_state(generator, f"{block}.attn.out_proj", width, width)
        state |= linear_state(generator, f"{block}.mlp.c_fc", width, mlp * width)
        state |= linear_state(generator, f"{block}.mlp.c_proj", mlp * width, width)
    return {f"clip_vision.{name}": tensor for name, tensor in state.items()}


def encoder_state(generator, base, width=WIDTH, patch=PATCH, grid=GRID, layers=LAYERS, mlp=2):
    """The tensors of encoder.pt on a base."""
    encoder = vision_state(generator, width, patch, grid, layers, mlp)
    encoder |= linear_state(generator, "unet_feature_embedder.0", base.feature_width, width)
    encoder |= linear_state(generator, "unet_feature_embedder.2", width, width)
    encoder |= linear_state(generator, "feature_linear", 2 * width, width)
    for index in range(grid**2 // 2 + 1):
        encoder |= linear_state(generator, f"first_linears.{index}", width, width)
    return encoder | linear_state(generator, "final_linear", width, base.text_width)


def offset_state(generator, kernels):
    state = {}
    for path, (rows, columns) in kernels.items():
        owner = bases.torch_name("unet", f"{path}/kernel").removesuffix(".weight").replace(".to_", ".wo_")
        state[f"{owner}.v"] = random_tensor(generator, 1) * 0 + 1
        for name, inputs, outputs in (
            ("linear1", 1, rows),
            ("linear2", 1, columns),
            ("linear_column", rows, rows),
            ("linear_row", columns, columns),
        ):
            state |= linear_state(generator, f"{owner}.{name}", inputs, outputs)
    return state


def write_checkpoints(folder: Path, base: StableDiffusion, unet_file: Path):
    """Folders pretrained and tuned, and newer-pretrained and newer-tuned without image encoder and U-Net; (encoder, offsets).

    `unet_file` holds the base's U-Net, which the tuned one started from.
    """
    import torch
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(0)
    encoder = encoder_state(generator, base)
    kernels = base.offset_kernels(base.param_shapes()["unet"])
    offsets = offset_state(generator, {path: kernel.shape for path, kernel in kernels.items()})
    tuned = {
        name: tensor + random_tensor(generator, *tensor.shape, scale=0.01) for name, tensor in sorted(load_file(unet_file).items())
    }
    settings = {
        "pretrained_model_name_or_path": "base",
        "clip_model_name_or_path": "ViT-H-14::laion2b_s32b_b79k",
        "domain_class_token": "creature",
        "placeholder_token": "*s",
        "prompt_template": "a photo of {placeholder_token}",
        "domain_embed_scale": 0.1,
        "reg_lambda": 0.01,
    }
    blind = {name: tensor for name, tensor in encoder.items() if not name.startswith("clip_vision.")}
    after_tuning = {"pretrained_args": settings, "learning_rate": 1e-3, "max_train_steps": 15}
    for name, files, config in (
        ("pretrained", {"weight_offsets.pt": offsets, "encoder.pt": encoder}, settings),
        ("tuned", {"unet.pt": {**tuned, **offsets}, "encoder.pt": encoder}, after_tuning),
        ("newer-pretrained", {"weight_offsets.pt": offsets, "encoder.pt": blind}, settings),
        ("newer-tuned", {"weight_offsets.pt": offsets, "encoder.pt": blind}, after_tuning),
    ):
        (folder / name).mkdir()
        for file, state in files.items():
            torch.save(state, folder / name / file)
        (folder / name / "config.json").write_text(json.dumps(config))
    return encoder, offsets
