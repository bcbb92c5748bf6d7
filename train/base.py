"""Trains the embedded world's base model from scratch: autoencoder, then U-Net with text encoder, then image encoder.

python -m train.base --out DIR            train (continues a stopped run) and write a diffusers folder
python -m train.base --check              climb the ladder with the base at --out and print JSON
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from e4t_jax import backbone
from e4t_jax.diffusion import noise_schedule
from e4t_jax.world import base_training as training
from e4t_jax.world.base_config import new_base
from e4t_jax.world.captions import write_captions
from e4t_jax.world.pictures import as_floats, draw_pictures, look_alikes, records, shuffled
from e4t_jax.world.renderer import render
from train.command import Command, progress, run, use_all_cores


@dataclass(frozen=True)
class Config(Command):
    """Train the base model of the embedded world "creatures", or check it."""

    out: Path = Path("e4t_jax/world/assets/base")
    """Folder to write (diffusers layout, float16 safetensors)."""
    work: Path = Path("outputs/base")
    """Folder for pictures and checkpoints; a stopped run continues from it."""
    pictures: int = 40960
    """Pictures to draw for training."""
    autoencoder_steps: int = 2200
    """Steps of the autoencoder, at 16 pictures a step."""
    denoiser_steps: int = 10500
    """Steps of the U-Net with its text encoder."""
    contrast_steps: int = 3000
    """Steps of the image encoder, at 64 pictures a step."""
    batch_size: int = 32
    """Pictures a step of the U-Net."""
    start: Path | None = None
    """Base to start from instead of random weights; stages with 0 steps keep its weights."""
    seed: int = 0
    """Seed of the weights, the pictures and the order of training."""
    check: bool = False
    """Do not train: measure rungs 1 to 3 of the ladder on the base at --out and print them as JSON."""


def fit(name: str, config: Config, loss, params, frozen, batches, steps: int, rate: float):
    """One stage: restores the latest checkpoint, steps, saves every 500 steps; returns the averaged weights."""
    tx = training.optimizer(rate, steps)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((), ("data",)))
    # By way of the host: the step donates its state, and the caller's own arrays must survive that.
    state = jax.device_put(jax.device_get(training.init_fit(tx, params)), whole)
    frozen = jax.device_put(frozen, whole)
    step = training.make_step(loss, tx)
    key = jax.random.fold_in(jax.random.key(config.seed), hash_of(name))
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager((config.work / name).absolute(), options=options) as checkpoints:
        if checkpoints.latest_step() is not None:
            state = checkpoints.restore(checkpoints.latest_step(), args=ocp.args.StandardRestore(state))
        first = int(state.step)
        bar = progress(range(first, steps), name, total=steps, initial=first)
        for index, batch in zip(bar, batches(first), strict=False):
            state, metrics = step(state, frozen, jax.device_put(batch, split), key)
            if index % 50 == 49:
                bar.set_postfix({label: f"{float(value):.4f}" for label, value in metrics.items()})
            if (index + 1) % 500 == 0 or index + 1 == steps:
                checkpoints.save(index + 1, args=ocp.args.StandardSave(state))
        checkpoints.wait_until_finished()
    return jax.device_get(state.average)


def hash_of(name: str) -> int:
    """A small number that stays the same from run to run, unlike Python's own hash."""
    return int.from_bytes(name.encode()[:4], "big") % (2**31)


def main(config: Config) -> None:
    use_all_cores()
    if config.check:
        from e4t_jax.evaluation.ladder import climb

        print(json.dumps(climb(config.out, track=progress), indent=2))
        return
    base, params = backbone.load_base(config.start) if config.start else new_base(jax.random.key(config.seed))
    pictures = draw_pictures(config.work, config.seed, config.pictures, partial(progress, description="drawing"))

    # autoencoder -------------------------------------------------------------------------------------------------
    def picture_batches(first: int):
        return (as_floats(pictures[np.sort(rows)]) for rows in shuffled(config.pictures, 16, config.seed, first))

    loss = partial(training.autoencoder_loss, base)
    vae = fit("autoencoder", config, loss, {"vae": params["vae"]}, {}, picture_batches, config.autoencoder_steps, 2e-3)
    latents = encode_all(base, vae, pictures)
    if config.autoencoder_steps:
        base = backbone.with_scaling_factor(base, float(1 / latents.std()))
        backbone.save_base(config.out, base, {**params, **vae})
    latents = latents * base.scaling_factor

    # denoiser and text encoder -------------------------------------------------------------------------------------
    identities, scenes = records(config.seed, config.pictures)
    schedule = noise_schedule(base.scheduler)
    empty = jnp.asarray(base.tokenizer("", padding="max_length").input_ids)

    def caption_batches(first: int):
        # Four sets of captions in turn: a picture is not always described in the same words.
        sets = [write_captions(base.tokenizer, identities, scenes, seed) for seed in range(4)]
        for step, rows in enumerate(shuffled(config.pictures, config.batch_size, config.seed, first), first):
            yield training.Batch(latents[rows], *(part[rows] for part in sets[step * config.batch_size // config.pictures % 4]))

    loss = partial(training.denoiser_loss, base, schedule, empty)
    start = {"unet": params["unet"], "text_encoder": params["text_encoder"]}
    denoiser = fit("denoiser", config, loss, start, {}, caption_batches, config.denoiser_steps, 1e-3)

    backbone.save_base(config.out, base, {**params, **vae, **denoiser})

    # image encoder -------------------------------------------------------------------------------------------------
    def pair_batches(first: int):
        for step in itertools.count(first):
            relatives, places = look_alikes(config.seed, step, 64)
            captions = write_captions(base.tokenizer, relatives, places, step, compounds=0.9)
            yield as_floats(render(relatives, places)[0]), captions

    start = {
        "image_encoder": params["image_encoder"],
        "text_projection": params["text_encoder"]["text_projection"],
        "log_temperature": jnp.asarray(2.6),
    }
    loss = partial(training.contrastive_loss, base)
    clip = fit("contrast", config, loss, start, denoiser, pair_batches, config.contrast_steps, 1e-3)
    text_encoder = {**denoiser["text_encoder"], "text_projection": clip["text_projection"]}
    params = {**vae, "unet": denoiser["unet"], "text_encoder": text_encoder, "image_encoder": clip["image_encoder"]}
    backbone.save_base(config.out, base, params)
    print(f"Wrote {config.out}")


def encode_all(base, vae, pictures: np.ndarray) -> np.ndarray:
    """Latent means of all pictures, before scaling."""
    encode = jax.jit(partial(backbone.latent_distribution, base))
    chunks = progress(range(0, len(pictures), 256), "encoding")
    return np.concatenate([np.asarray(encode(vae, as_floats(pictures[s : s + 256]))[0]) for s in chunks])


if __name__ == "__main__":
    run(main)
