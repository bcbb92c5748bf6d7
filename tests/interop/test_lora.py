"""A LoRA's names and numbers as each tool reads them, by the tool's own rule, at the true geometries of SD 1.5 and 2.1."""

import re

import jax
import numpy as np
import pytest

from e4t_jax import bases
from e4t_jax.concept import Concept
from e4t_jax.domain import Domain
from e4t_jax.interop.lora import kohya_name, lora
from e4t_jax.objective import Trainable, effective_unet, make_method
from e4t_jax.offsets import init_factors
from e4t_jax.pretraining.step import init_trainable
from e4t_jax.testing import tiny_base

GEOMETRIES = ("sd15", "sd21")
LEVELS, LAYERS, PROJECTIONS = 4, 2, [f"attn{i}.to_{letter}" for i in (1, 2) for letter in "qkv"]


def kernels_of(name):
    base = bases.StableDiffusion(bases.geometry(name, "vit-h14"), None)
    return sorted(base.offset_kernels(base.param_shapes()["unet"]))


def attention_modules():
    """Every attention in diffusers' and in CompVis' names, in the order that the U-Net computes them.

    CompVis' ldm/modules/diffusionmodules/openaimodel.py: each level appends its residual blocks, an attention as their second part
    where the resolution has one, and a module that halves or doubles the resolution; the first input block is the convolution.
    """
    ours = [f"down_blocks.{level}.attentions.{i}" for level in range(LEVELS - 1) for i in range(LAYERS)]
    ours += ["mid_block.attentions.0"]
    ours += [f"up_blocks.{level}.attentions.{i}" for level in range(1, LEVELS) for i in range(LAYERS + 1)]
    theirs, index = [], 0
    for level in range(LEVELS):
        for _ in range(LAYERS):
            index += 1
            theirs += [f"input_blocks.{index}.1"] if level < LEVELS - 1 else []
        index += 1  # the module that halves
    theirs += ["middle_block.1"]
    index = -1
    for level in reversed(range(LEVELS)):
        for _ in range(LAYERS + 1):
            index += 1
            theirs += [f"output_blocks.{index}.1"] if level < LEVELS - 1 else []
    return dict(zip(ours, theirs, strict=True))


def projection_names():
    """Every q, k and v projection: diffusers' name -> CompVis' name."""
    return {
        f"{ours}.transformer_blocks.0.{name}": f"{theirs}.transformer_blocks.0.{name}"
        for ours, theirs in attention_modules().items()
        for name in PROJECTIONS
    }


def comfy_keys():
    """LoRA key -> module: `model_lora_keys_unet` of ComfyUI's comfy/lora.py over `unet_to_diffusers` of its comfy/utils.py."""
    keys = {}
    for level in range(LEVELS):
        for i in range(LAYERS):
            keys[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{1 + (LAYERS + 1) * level + i}.1"
        for i in range(LAYERS + 1):
            keys[f"up_blocks.{level}.attentions.{i}"] = f"output_blocks.{(LAYERS + 1) * level + i}.1"
    keys["mid_block.attentions.0"] = "middle_block.1"
    blocks = [(f"{ours}.transformer_blocks.0", f"{theirs}.transformer_blocks.0") for ours, theirs in keys.items()]
    return {
        "lora_unet_" + f"{ours}.{name}".replace(".", "_"): f"{theirs}.{name}" for ours, theirs in blocks for name in PROJECTIONS
    }


def a1111_module(key):
    """`convert_diffusers_name_to_compvis` of A1111's extensions-builtin/Lora/networks.py, for the U-Net's attention."""
    if found := re.match(r"lora_unet_down_blocks_(\d+)_attentions_(\d+)_(.+)", key):
        return f"diffusion_model_input_blocks_{1 + int(found[1]) * 3 + int(found[2])}_1_{found[3]}"
    if found := re.match(r"lora_unet_mid_block_attentions_(\d+)_(.+)", key):
        return f"diffusion_model_middle_block_1_{found[2]}"
    if found := re.match(r"lora_unet_up_blocks_(\d+)_attentions_(\d+)_(.+)", key):
        return f"diffusion_model_output_blocks_{int(found[1]) * 3 + int(found[2])}_1_{found[3]}"
    return key


@pytest.mark.parametrize("name", GEOMETRIES)
def test_comfyui_and_a1111_find_every_module(name):
    """All 96 of them, each the right one."""
    expected, comfy = projection_names(), comfy_keys()
    assert len(expected) == 96 == len(kernels_of(name))
    for path in kernels_of(name):
        key, module = kohya_name(path), expected[bases.torch_name("unet", f"{path}/kernel").removesuffix(".weight")]
        assert comfy[key] == module
        # A1111 splits a tensor's name at its first dot, and maps modules by their names with underscores.
        assert a1111_module(f"{key}.lora_down.weight".split(".", 1)[0]) == f"diffusion_model_{module.replace('.', '_')}"


@pytest.mark.parametrize("name", GEOMETRIES)
def test_kohya_sdnext_and_invokeai_find_every_module(name):
    """Kohya's networks/lora.py, SD.Next's modules/lora and InvokeAI's layer patcher name PyTorch's own modules with underscores."""
    torch = pytest.importorskip("torch")
    import diffusers

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**bases.geometry(name, "vit-h14")["unet"])
    modules = {"lora_unet_" + module.replace(".", "_"): part for module, part in unet.named_modules()}
    assert len(modules) == len(list(unet.named_modules()))
    found = {kohya_name(path) for path in kernels_of(name)}
    assert all(isinstance(modules[key], torch.nn.Linear) for key in found)
    assert found == {key for key in modules if re.search(r"_attn[12]_to_[qkv]$", key)}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_diffusers_converts_every_key(name):
    """Its own conversion: nothing is left over, and each name is that of a module."""
    torch = pytest.importorskip("torch")
    import diffusers

    state = {}
    for path in kernels_of(name):
        key = kohya_name(path)
        down, up = torch.zeros(2, 3), torch.zeros(3, 2)
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    converted, alphas = diffusers.StableDiffusionPipeline.lora_state_dict(state)
    modules = {re.sub(r"\.processor\.(to_[qkv])_lora\.(down|up)\.weight$", r".\1", name) for name in converted}
    assert modules == {f"unet.{module}" for module in projection_names()} and len(converted) == 192
    assert len(alphas) == 96 and set(alphas.values()) == {2.0}


def tiny_concept(**unet_options):
    """A tiny domain and a concept, both with random offsets that are not small."""
    base, params = tiny_base(**unet_options)
    trainable = init_trainable(make_method(base, "creature"), jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), 3)

    def filled(key, factors):
        return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape), factors)

    domain = Domain("creatures", "creature", base, params, trainable.encoder, filled(keys[0], trainable.factors))
    factors = filled(keys[1], init_factors(keys[2], base.offset_kernels(params["unet"]), rank=1))
    return domain, Concept(
        "venus", "compact", domain.fingerprint, Trainable(factors), np.zeros(base.image_encoder.width, np.float32)
    )


@pytest.mark.parametrize("options", [{}, {"use_linear_projection": True, "attention_head_dim": [2, 4]}], ids=["sd1", "sd2"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_change_is_ours_to_1e_3_in_every_reader(options, dtype):
    """W ← W + (alpha / rank) up down: ComfyUI's, A1111's, InvokeAI's and kohya's merge, kernel by kernel."""
    domain, concept = tiny_concept(**options)
    update = lora(domain, concept, error=0)
    merged = domain.base.offset_kernels(effective_unet(concept.trainable, domain.frozen))
    for path, kernel in domain.base.offset_kernels(domain.params["unet"]).items():
        stored = (update.tensors[f"{kohya_name(path)}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        up, down, alpha = (tensor.astype(dtype).astype(np.float32) for tensor in stored)
        theirs = alpha.item() / len(down) * up @ down
        ours = np.asarray(merged[path] - kernel).T
        assert np.linalg.norm(theirs - ours) <= 1e-3 * np.linalg.norm(ours) and np.linalg.norm(ours) > 0.01


@pytest.mark.compiles
@pytest.mark.parametrize("options", [{}, {"use_linear_projection": True, "attention_head_dim": [2, 4]}], ids=["sd1", "sd2"])
def test_diffusers_fuses_the_merged_unet(options, tmp_path):
    """`load_lora_weights` and `fuse_lora`: every kernel's change is ours to 1e-3, and no other weight differs."""
    pytest.importorskip("peft")
    pytest.importorskip("torch")
    import diffusers
    from safetensors.numpy import save_file

    domain, concept = tiny_concept(**options)
    text = {"text_model": domain.params["text_encoder"]["text_model"]}
    bases.save_folder(tmp_path, domain.base, {**domain.params, "text_encoder": text}, np.float32)
    save_file(lora(domain, concept, error=0).tensors, tmp_path / "pytorch_lora_weights.safetensors")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    plain = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    pipeline.load_lora_weights(tmp_path)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused = pipeline.unet.state_dict()
    merged = domain.base.offset_kernels(effective_unet(concept.trainable, domain.frozen))
    changed = set()
    for path, kernel in domain.base.offset_kernels(domain.params["unet"]).items():
        name = bases.torch_name("unet", f"{path}/kernel")
        ours = np.asarray(merged[path] - kernel).T
        assert np.linalg.norm((fused[name] - plain[name]).numpy() - ours) <= 1e-3 * np.linalg.norm(ours)
        changed.add(name)
    assert set(fused) == set(plain)
    assert all((fused[name] == plain[name]).all() for name in set(plain) - changed)
