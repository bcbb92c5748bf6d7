"""The ladder: what the base model must be able to do before any personalisation can work, rung by rung.

1. the autoencoder restores pictures (PSNR);
2. words are obeyed: hue, number of eyes, context and style, as the judges see them in generated pictures; and all the words of
   validation identities at once, added to the noun as the training captions add them: how many of their attributes are drawn;
3. identity is within reach: a word and offsets found slowly, by hundreds of tuning steps, draw validation identities.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e4t_jax import bases
from e4t_jax.bases import Base, Params, StableDiffusion
from e4t_jax.creatures.judging.judges import judge, load_judges
from e4t_jax.creatures.judging.personalisation_trial import held_out, judge_pictures, tune_trial
from e4t_jax.creatures.presets import creatures
from e4t_jax.creatures.world.attributes import BODY_HUES, CONTEXTS, EYES, STYLES
from e4t_jax.creatures.world.captions import EYE_WORDS, describe, sentence
from e4t_jax.creatures.world.pictures import as_floats, records
from e4t_jax.creatures.world.renderer import render
from e4t_jax.domain import Domain
from e4t_jax.objective import make_method
from e4t_jax.pretraining.step import init_trainable
from e4t_jax.tuning.tune import TuneSettings
from e4t_jax.words import PLACEHOLDER

# Steps add up over hundreds, and offsets that go far draw the picture given instead of its creature.
_REACH = TuneSettings(word_rate=0.009, learning_rate=0.0003)


def climb(folder: Path, *, track: Callable, prompts: int = 320, reach: int = 8, reach_steps: int = 200) -> dict[str, float]:
    """Rungs 1 to 3 for the base in `folder`; `track(items, description)` wraps long loops."""
    base, params = bases.load_folder(folder)
    return {
        "psnr_db": restoration(base, params),
        **words_obeyed(base, params, prompts, track),
        "described_attributes_mean": described_attributes(base, params, 4 * reach)["attributes_mean"],
        "reachable_identity_top1": reachable_identity(base, params, reach, reach_steps, track),
    }


def restoration(base: Base, params: Params, count: int = 256) -> float:
    """Mean PSNR in dB of validation pictures after encoding and decoding; peak to peak 2."""
    pictures = as_floats(render(*records(0, count, split="validation"))[0])
    restore = jax.jit(lambda part, images: base.decode(part["vae"], base.encode(part["vae"], images)))
    restored = np.clip(np.asarray(restore({"vae": params["vae"]}, pictures)), -1, 1)
    return float(np.mean(10 * np.log10(4 / np.mean((restored - pictures) ** 2, axis=(1, 2, 3)))))


def untrained_domain(base: Base, params: Params) -> Domain:
    """The base with an encoder that says nothing and offsets of zero: what is reached is the base's own."""
    trainable = init_trainable(make_method(base, "creature"), jax.random.key(0))
    assert trainable.factors is not None
    encoder = {**trainable.encoder, "final": jax.tree.map(jnp.zeros_like, trainable.encoder["final"])}
    of = creatures().domain
    return Domain(
        "", of.domain_token, base, params, encoder=encoder, factors=trainable.factors, regularisation=0.0, guidance=of.guidance
    )


def words_obeyed(base: Base, params: Params, count: int, track: Callable) -> dict[str, float]:
    """Share of generated pictures that show what their prompt says, for each kind of word."""
    generator = np.random.default_rng(0)
    asked = {
        name: np.resize(generator.permutation(size), count)
        for name, size in (("hue", len(BODY_HUES)), ("eyes", len(EYES)), ("context", len(CONTEXTS)), ("style", len(STYLES)))
    }
    for name in ("hue", "eyes", "style"):
        asked[name] = generator.permutation(asked[name])
    rows = zip(*(asked[name].tolist() for name in ("hue", "eyes", "context", "style")), strict=True)
    prompts = [
        sentence(style, PLACEHOLDER, context, [BODY_HUES[hue], f"{EYE_WORDS[eyes]}-eyed"]) for hue, eyes, context, style in rows
    ]
    domain = untrained_domain(base, params)
    starts = track(range(0, count, 32), description="words")
    drawn = np.concatenate([domain.generate_class(1, prompts[start : start + 32], seed=start)[0] for start in starts])
    judges = load_judges()
    seen = {
        name: verdict for kind in ("scene", "attributes") for name, verdict in judge(kind, judges[kind], as_floats(drawn)).items()
    }
    return {f"{name}_top1": float(np.mean(np.argmax(seen[name], -1) == asked[name])) for name in asked}


def described_attributes(base: StableDiffusion, params: Params, count: int) -> dict[str, Any]:
    """What the judges say of `count` validation identities drawn from the word that holds their whole description.

    e* = e_noun + Σ_j w_j e_part_j over the parts of `captions.describe`, without encoder and offsets.
    """
    domain, trial = untrained_domain(base, params), held_out(3, count, split="validation")
    with tempfile.TemporaryDirectory() as folder:
        concepts, _ = tune_trial(domain, trial, Path(folder), TuneSettings(steps=0), inputs="caption")
    told = describe(trial.identities)
    ids = [[base.tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in row] for row in told.parts.tolist()]
    parts = base.look_up(params["text_encoder"], jnp.asarray(ids))
    residuals = jnp.einsum("np,npd->nd", told.weights, parts) / domain.scale
    spoken = [
        concept._replace(trainable=concept.trainable._replace(residual=residual))
        for concept, residual in zip(concepts, residuals, strict=True)
    ]
    return judge_pictures(domain, load_judges(), trial, domain.generate(spoken, trial.prompts))


def reachable_identity(base: Base, params: Params, count: int, steps: int, track: Callable) -> float:
    """`identity_top1` among 64 validation identities when word and offsets of `count` of them are found slowly."""
    domain, trial = untrained_domain(base, params), held_out(0, count, split="validation")
    wrap = partial(track, description="reach")
    with tempfile.TemporaryDirectory() as folder:
        settings = dataclasses.replace(_REACH, steps=steps)
        concepts, _ = tune_trial(domain, trial, Path(folder), settings, inputs="caption", track=wrap)
    return judge_pictures(domain, load_judges(), trial, domain.generate(concepts, trial.prompts))["identity_top1"]
