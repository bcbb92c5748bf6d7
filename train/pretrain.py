"""Pretrains a domain: the encoder and the weight offsets learn one domain of pictures on a frozen base model.

python -m train.pretrain --base creatures --data creatures --domain-token creature --out DIR --steps 3000 --batch-size 16
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from e4t_jax import backbone
from e4t_jax.data.augment import shrink_mask
from e4t_jax.data.pipelines import open_pictures, training_batches
from e4t_jax.domain import Domain, load_base, make_method, save_domain
from e4t_jax.errors import UserError
from e4t_jax.objective import ConceptBatch, Frozen
from e4t_jax.pretrain import compile_step, init_state, init_trainable, place, unplace
from e4t_jax.prompts import templates, tokenize
from e4t_jax.writing import check_writable
from train.command import Command, progress, run, use_all_cores


@dataclass(frozen=True)
class Config(Command):
    """Pretrain encoder and weight offsets on one domain of pictures."""

    out: Path
    """Folder of the domain: domain.json, encoder.safetensors, offsets.safetensors."""
    base: str = "creatures"
    """Base model: "creatures", a Hub id, a diffusers folder, random:sd15 or random:sd21."""
    image_encoder: str | None = None
    """CLIP's, where the base brings none: Hub id or folder, random:vit-l14 or random:vit-h14; else the paper's ViT-H/14."""
    data: str = "creatures"
    """Pictures: creatures, tfds:NAME or folder:DIR."""
    domain_token: str = "creature"
    """The word that every concept of the domain is one of; one token."""
    template: str = "creature"
    """Prompts for pictures without captions, and for tuning later: neutral, object, face, art or creature."""
    clip_features: Literal["layers", "tokens"] = "layers"
    """What of CLIP's the encoder sees: class tokens of every second layer (the paper's), or the last layer's patch tokens too."""
    steps: int = 2400
    """Update steps."""
    batch_size: int = 16
    """Pictures a step, over all devices."""
    learning_rate: float = 1.5e-3
    """Peak of the learning rate (warm-up, then cosine)."""
    regularisation: float = 0.001
    """λ: weight of the squared length of the word's offset."""
    guidance: float = 4.0
    """Classifier-free guidance to draw this domain with where a call names none; Stable Diffusion's is 7.5."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How the step is spread over the devices."""
    checkpoint_every: int = 500
    """Steps from one checkpoint to the next."""
    resume: bool = False
    """Go on from the latest checkpoint in --work."""
    work: Path = Path("outputs/pretrain")
    """Folder for data sets and checkpoints."""
    seed: int = 0
    """Seed of the weights, the order of the pictures and the noise."""


def main(config: Config) -> None:
    use_all_cores()
    check_writable(config.out)
    base, params = load_base(config.base, config.image_encoder)
    method = make_method(base, config.domain_token, clip_features=config.clip_features)
    words = partial(tokenize, base.tokenizer, domain_token=config.domain_token)
    rate = optax.warmup_cosine_decay_schedule(0, config.learning_rate, min(100, config.steps // 5), config.steps, 0)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=0.01))
    state = init_state(init_trainable(method, jax.random.key(config.seed)), tx)
    pictures = open_pictures(config.data, base.image_size, config.work / "data")

    @jax.jit
    def prepare(vae, image_encoder, batch) -> ConceptBatch:
        latents = backbone.encode_images(base, {"vae": vae}, batch["image"])
        clip = backbone.image_features(base, {"image_encoder": image_encoder}, batch["image"], config.clip_features)
        return ConceptBatch(latents, clip, batch["ids"], batch["placeholder"], shrink_mask(batch["mask"], latents.shape[1]))

    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager((config.work / "checkpoints").absolute(), options=options) as checkpoints:
        latest = checkpoints.latest_step()
        if config.resume and latest is None:
            raise UserError(f"--resume: there is no checkpoint in {config.work / 'checkpoints'}; leave --resume away.")
        if config.resume:
            state = checkpoints.restore(latest, args=ocp.args.StandardRestore(jax.tree.map(jnp.asarray, state)))
        else:
            for step in checkpoints.all_steps():
                checkpoints.delete(step)
        first = int(state.step)
        state = place(state, config.parallel, split=False)
        frozen = place(Frozen(params["unet"], params["text_encoder"]), config.parallel, split=False)
        step = compile_step(method, tx, config.regularisation, config.parallel)
        key = jax.random.key(config.seed + 1)
        batches = training_batches(pictures, words, templates(config.template), config.batch_size, config.seed, first=first)
        bar = progress(range(first, config.steps), "pretraining", total=config.steps, initial=first)
        for index, rows in zip(bar, batches, strict=False):
            batch = prepare(params["vae"], params["image_encoder"], rows)
            state, metrics = step(state, frozen, place(batch, config.parallel, split=True), key)
            if index % 25 == 24 or index + 1 == config.steps:
                values = {name: float(jnp.mean(value)) for name, value in metrics.items()}
                bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()})
                if not math.isfinite(values["loss"]):
                    raise UserError(f"The loss is not finite at step {index + 1}; lower --learning-rate and --resume.")
            if (index + 1) % config.checkpoint_every == 0 or index + 1 == config.steps:
                checkpoints.save(index + 1, args=ocp.args.StandardSave(unplace(state, config.parallel)))
        checkpoints.wait_until_finished()
    trainable = unplace(state, config.parallel).trainable
    domain = Domain(
        config.base,
        config.domain_token,
        base,
        params,
        trainable.encoder,
        trainable.factors,
        regularisation=config.regularisation,
        guidance=config.guidance,
        template=config.template,
        image_encoder=config.image_encoder,
        clip_features=config.clip_features,
    )
    save_domain(config.out, domain)
    print(f"Wrote {config.out}")


if __name__ == "__main__":
    run(main)
