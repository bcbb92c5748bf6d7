"""Stable Diffusion 1.5 at its full size: every part computes what PyTorch computes, and reading it takes little more than its size.

Random weights of the true geometry in the files' own format; each part in a process of its own, so that its peak memory is its own.
"""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CASE = """
import json, resource, sys, threading
from pathlib import Path

import jax, jax.numpy as jnp, numpy as np, torch
from e4t_jax import bases

part, folder = sys.argv[1], Path(sys.argv[2])
base = bases.StableDiffusion(bases.geometry("sd15", "vit-l14"), None)
shapes = base.param_shapes()[part]
torch.manual_seed(0)
rng = np.random.default_rng(0)

def draw(*shape):
    return rng.standard_normal(shape).astype(np.float32)

def kept():
    rows = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["RssAnon"].split()[0]) * 1024

def load():
    most, stop = [kept()], threading.Event()
    def watch():
        while not stop.wait(0.005):
            most[0] = max(most[0], kept())
    before, watcher = kept(), threading.Thread(target=watch)
    watcher.start()
    params = bases.load_part(folder, part, shapes)
    stop.set()
    watcher.join()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return params, (most[0] - before) / size

def nchw(x):
    return torch.tensor(x).permute(0, 3, 1, 2)

def nhwc(x):
    return x.permute(0, 2, 3, 1)

def run(model):
    if part == "unet":
        z, text, t = draw(1, 64, 64, 4), draw(1, 77, 768), np.array([500])
        theirs = nhwc(model(nchw(z), torch.tensor(t), torch.tensor(text)).sample)
        yield lambda p: base.denoise(p, z, jnp.asarray(t), text)[0], theirs
    elif part == "vae":
        images, z = rng.uniform(-1, 1, (1, 512, 512, 3)).astype(np.float32), draw(1, 64, 64, 4)
        seen = nhwc(model.encode(nchw(images)).latent_dist.mean) * base.scaling_factor
        yield lambda p: base.encode(p, images), seen
        drawn = nhwc(model.decode(nchw(z / base.scaling_factor)).sample)
        yield lambda p: base.decode(p, z), drawn
    elif part == "text_encoder":
        ids = rng.integers(0, 49000, (2, 77))
        yield lambda p: base.read(p, jnp.asarray(ids)), model(torch.tensor(ids)).last_hidden_state
    else:
        images = rng.uniform(-1, 1, (2, 224, 224, 3)).astype(np.float32)
        mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
        pixels = nchw(((images + 1) / 2 - mean) / deviation).float()
        yield lambda p: base.image_encoder.embed(p, images), model(pixels).image_embeds

def make():
    import diffusers, transformers
    config = dict(base.configs[part])
    if part == "unet":
        return diffusers.UNet2DConditionModel(**config)
    if part == "vae":
        return diffusers.AutoencoderKL(**config)
    if part == "text_encoder":
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config))

model = make().eval()
model.save_pretrained(folder, safe_serialization=True)
with torch.no_grad():
    answers = [(ours, theirs.numpy()) for ours, theirs in run(model)]
del model
params, share = load()
errors = [float(np.abs(np.asarray(jax.jit(ours)(params)) - theirs).max() / np.abs(theirs).max()) for ours, theirs in answers]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"errors": errors, "peak": peak, "share": share}))
"""


@pytest.mark.parametrize("part", ["text_encoder", "image_encoder", "vae", "unet"])
def test_every_part_matches_pytorch(part, tmp_path):
    """Relative error 1e-3, peak memory 8 GB; host memory while reading at most 1.3 times the checkpoint."""
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", CASE, part, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    print(part, measured)
    assert max(measured["errors"]) <= 1e-3
    assert measured["peak"] <= 8e9
    assert measured["share"] <= 1.3
