"""A preview of a domain of the drawn world while it is learned: how like *validation* identities the encoder alone draws."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from e4t_jax.creatures.judging.judge_losses import identity_prototypes, share_right
from e4t_jax.creatures.judging.judges import WHO_IS_IT, judge, load_judges
from e4t_jax.creatures.judging.personalisation_trial import GALLERY, held_out
from e4t_jax.creatures.world.pictures import as_floats
from e4t_jax.creatures.world.renderer import IMAGE_SIZE
from e4t_jax.data.grids import picture_grid
from e4t_jax.domain import Domain
from e4t_jax.pretraining.previews import Preview, draw_samples

_SEED, _IDENTITIES, _PROMPTS = 0, 8, 2


def look_at_validation(domain: Domain) -> Preview:
    """A grid, and of its samples the mean likeness to their own identity, as the judge sees it, the share that is likest to it
    among `GALLERY` of the split, and the share whose context is the prompt's.

    Errors: as `pretraining.previews.draw_samples`.
    """
    trial, judges = held_out(_SEED, _IDENTITIES, _PROMPTS, split="validation", kind=domain.domain_token), load_judges()
    drawn = _as_large(draw_samples(domain, list(trial.pictures), trial.prompts))
    flat, who = as_floats(drawn.reshape(-1, *drawn.shape[2:])), np.repeat(np.arange(_IDENTITIES), _PROMPTS)
    prototypes = identity_prototypes(judges, _SEED, GALLERY, split="validation", kind=trial.kind)
    likeness = judge(WHO_IS_IT[trial.kind], judges[WHO_IS_IT[trial.kind]], flat) @ prototypes.T
    figures = {
        "validation_identity_similarity": float(np.mean(likeness[np.arange(len(who)), who])),
        "validation_identity_top1": share_right(likeness, who),
        "validation_context_top1": share_right(
            judge("scene", judges["scene"], flat)["context"], np.tile(trial.contexts, _IDENTITIES)
        ),
    }
    rows = [[picture, *row] for picture, row in zip(trial.pictures, drawn, strict=True)]
    return Preview(picture_grid(rows, side=2 * drawn.shape[2]), figures)


def _as_large(drawn: UInt8[np.ndarray, "pictures prompts h w 3"]) -> UInt8[np.ndarray, "pictures prompts 32 32 3"]:
    """At the size that the judges see, whatever the base's."""
    if drawn.shape[2] == IMAGE_SIZE:
        return drawn
    resized = [[Image.fromarray(one).resize((IMAGE_SIZE, IMAGE_SIZE)) for one in row] for row in drawn]
    return np.asarray([[np.asarray(one) for one in row] for row in resized])
