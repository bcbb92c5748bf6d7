"""The base model's training from first to last: autoencoder, then U-Net with text encoder, then image encoder.

Every stage goes on from its own checkpoints; a stage of 0 steps keeps the weights it was given.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e4t_jax.bases import Params, StableDiffusion, save_folder
from e4t_jax.bases.scheduler_config import noise_schedule
from e4t_jax.checks import BatchSize, Count, CountOrNone, Seed
from e4t_jax.creatures.learning import base_losses as losses
from e4t_jax.creatures.world.captions import write_captions
from e4t_jax.creatures.world.pictures import as_floats, draw_pictures, look_alikes, records, shuffled
from e4t_jax.errors import UserError
from e4t_jax.storage import fingerprint
from e4t_jax.training import optimizers
from e4t_jax.training.checkpoints import Checkpoints
from e4t_jax.training.loop import Loss, Run, init_state, step_of, train
from e4t_jax.training.parallel import layout_for

_CAPTION_SETS = 4  # of the same pictures, in turn: a picture is not always described in the same words
_AHEAD = 4  # batches made while a step runs
# Stage -> the setting that says how many pictures are in a batch of it.
_BATCHES = {"autoencoder": "autoencoder_batch", "denoiser": "batch_size", "contrast": "contrast_batch"}
_RATES = {"autoencoder": 2e-3, "denoiser": 1e-3, "contrast": 1e-3}


@dataclasses.dataclass(frozen=True)
class BaseSettings:
    """How the base model is trained."""

    pictures: Count = 262144
    """Pictures to draw for training."""
    autoencoder_steps: CountOrNone = 12000
    """Steps of the autoencoder."""
    autoencoder_batch: BatchSize = 64
    """Pictures a step of the autoencoder."""
    denoiser_steps: CountOrNone = 40000
    """Steps of the U-Net with its text encoder."""
    batch_size: BatchSize = 256
    """Pictures a step of the U-Net."""
    contrast_steps: CountOrNone = 4000
    """Steps of the image encoder."""
    contrast_batch: BatchSize = 256
    """Pictures a step of the image encoder."""
    seed: Seed = 0
    """Seed of the weights, the pictures and the order of training."""


def train_base(
    base: StableDiffusion, params: Params, settings: BaseSettings, out: Path, work: Path, track: Callable[..., Any], say: Callable
) -> None:
    """All stages, from `params`; writes the base to `out` after each of them. `track(items, description)` wraps long loops.

    Errors: `UserError` for fewer pictures than a batch holds and a batch that does not divide by the devices, and those of
    `training.checkpoints` and `training.loop`.
    """
    most = max(settings.autoencoder_batch, settings.batch_size)
    if settings.pictures < most:
        raise UserError(f"{settings.pictures} is less than a batch of {most}; give more.", "pictures")
    for argument in _BATCHES.values():
        layout_for(getattr(settings, argument), argument=argument)
    fit = partial(_fit, base, params, settings, work=work, track=track, say=say)
    pictures = draw_pictures(work, settings.seed, settings.pictures, partial(track, description="drawing"))

    def picture_batches(first: int) -> Iterator[np.ndarray]:
        order = shuffled(settings.pictures, settings.autoencoder_batch, settings.seed, first)
        return (as_floats(pictures[np.sort(rows)]) for rows in order)

    loss = partial(losses.autoencoder_loss, base)
    vae = fit("autoencoder", loss, {"vae": params["vae"]}, {}, batches=picture_batches, steps=settings.autoencoder_steps)
    latents = _encode_all(base, vae["vae"], pictures, track)
    if settings.autoencoder_steps:
        base = base.with_scaling_factor(float(1 / latents.std()))
        save_folder(out, base, {**params, **vae})
    latents = latents * base.scaling_factor

    identities, scenes = records(settings.seed, settings.pictures)
    empty = jnp.asarray(base.tokenizer("", padding="max_length").input_ids)

    def caption_batches(first: int) -> Iterator[losses.Batch]:
        size, count = settings.batch_size, settings.pictures
        captions = cache(lambda seed: write_captions(base.tokenizer, identities, scenes, seed))
        for step, rows in enumerate(shuffled(count, size, settings.seed, first), first):
            yield losses.Batch(latents[rows], *(part[rows] for part in captions(step * size // count % _CAPTION_SETS)))

    loss = partial(losses.denoiser_loss, base, noise_schedule(base.scheduler), empty)
    start = {"unet": params["unet"], "text_encoder": params["text_encoder"]}
    denoiser = fit("denoiser", loss, start, {}, batches=caption_batches, steps=settings.denoiser_steps)
    save_folder(out, base, {**params, **vae, **denoiser})

    def pair_batches(first: int) -> Iterator[tuple]:
        for step in itertools.count(first):
            relatives, places = look_alikes(settings.seed, step, settings.contrast_batch)
            yield relatives, places, write_captions(base.tokenizer, relatives, places, step, compounds=0.9)

    loss = partial(losses.contrastive_loss, base)
    start = {
        "image_encoder": params["image_encoder"],
        "text_projection": params["text_encoder"]["text_projection"],
        "log_temperature": jnp.asarray(2.6),
    }
    clip = fit("contrast", loss, start, denoiser, batches=pair_batches, steps=settings.contrast_steps)
    text_encoder = {**denoiser["text_encoder"], "text_projection": clip["text_projection"]}
    params = {**vae, "unet": denoiser["unet"], "text_encoder": text_encoder, "image_encoder": clip["image_encoder"]}
    save_folder(out, base, params)


def _fit(
    base: StableDiffusion,
    params: Params,
    settings: BaseSettings,
    name: str,
    loss: Loss,
    start: Params,
    frozen: Params,
    *,
    work: Path,
    track: Callable,
    say: Callable,
    batches: Callable[[int], Iterator[Any]],
    steps: int,
) -> Params:
    """One stage: from its latest checkpoint to its end; the averaged weights."""
    if not steps:
        return start
    tx = optimizers.base_model(_RATES[name], steps)
    facts = {**dataclasses.asdict(settings), "steps": steps, "start": fingerprint(params)}
    with Checkpoints(work / name, facts, resume=True, may_change=_others(name), say=say) as checkpoints:
        where = layout_for(getattr(settings, _BATCHES[name]), argument=_BATCHES[name], say=say)
        state = init_state(start, tx, average=True)
        restored = checkpoints.restore(state)
        # By way of the host: the step donates its state, and the caller's own arrays must survive that.
        state = where.place(jax.device_get(state if restored is None else restored))
        step = where.compile(step_of(loss, tx), (False, False, True, None))
        run = Run(name, steps, checkpoints, track=lambda steps: track(steps, name, total=steps.stop, initial=steps.start))
        key = jax.random.fold_in(jax.random.key(settings.seed), zlib.crc32(name.encode()) % 2**31)
        state = train(
            run,
            lambda state, frozen, batch, key: step(state, frozen, where.place_rows(batch), key),
            state,
            where.place(frozen),
            lambda first: _ahead(batches(first)),
            key=key,
        )
        return where.unplace(state).average


def _ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, which never end; the next ones are made while the caller works."""
    with ThreadPoolExecutor(1) as maker:
        waiting = deque(maker.submit(next, batches) for _ in range(_AHEAD))
        while True:
            waiting.append(maker.submit(next, batches))
            yield waiting.popleft().result()


def _others(name: str) -> list[str]:
    """Settings of the other stages, which may change while this one goes on."""
    return [f"{stage}_steps" for stage in _RATES if stage != name] + ["steps"]


def _encode_all(base: StableDiffusion, vae: Params, pictures: np.ndarray, track: Callable) -> np.ndarray:
    """Latent means of all pictures, before scaling."""
    encode = jax.jit(base.posterior)
    chunks = track(range(0, len(pictures), 256), "encoding")
    return np.concatenate([np.asarray(encode(vae, as_floats(pictures[row : row + 256]))[0]) for row in chunks])
