"""A domain from pictures, from Python: `e4t_jax.pretrain("creatures", "folder:cats", work="work/cats")`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
import optax

from e4t_jax import registry
from e4t_jax.bases import Params, load_base
from e4t_jax.checks import check_ranges
from e4t_jax.data.batches import training_batches
from e4t_jax.data.cache import CachedRows, check_made_for
from e4t_jax.data.sources import Broken, Split, folder_digest, open_pictures
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.files.domain_files import base_fingerprint
from e4t_jax.objective import Trainable, make_method
from e4t_jax.pretraining.encode_once import READ_BY_RUNS
from e4t_jax.pretraining.previews import look_at
from e4t_jax.pretraining.run_log import Watch
from e4t_jax.pretraining.step import PretrainSettings, given_of, init_trainable, pretrain_trainable
from e4t_jax.pretraining.validation import validation_loss
from e4t_jax.storage import check_writable
from e4t_jax.templates import scene_captions, templates
from e4t_jax.training.checkpoints import Checkpoints
from e4t_jax.training.parallel import layout
from e4t_jax.training.processes import is_first, largest_of_all, share_of
from e4t_jax.words import tokenize

if TYPE_CHECKING:
    import grain.python as grain

_SAMPLED = 4  # pictures that samples are drawn of
# What may change from a run to the run that goes on with it.
_MAY_CHANGE = (
    "steps",
    "batch_size",
    "parallel",
    "fsdp",
    "accumulate",
    "checkpoint_every",
    "watch_every",
    "sample_every",
    "workers",
    "devices",
)


@dataclasses.dataclass(frozen=True)
class DomainSettings:
    """What a domain is, on its base; kept in domain.json."""

    domain_token: str = "creature"
    """The word that every concept of the domain is one of; one token."""
    template: str = "creature"
    """Prompts for pictures without captions, and captions to look for in tuning: neutral, object, face, art or creature."""
    clip_features: Literal["layers", "tokens"] = "layers"
    """What of CLIP's the encoder sees: class tokens of every second layer (the paper's), or the last layer's patch tokens too."""
    guidance: float = 4.0
    """Classifier-free guidance to draw this domain with where a call names none; Stable Diffusion's is 7.5."""


def pretrain(
    base: str,
    data: str,
    domain: DomainSettings | None = None,
    settings: PretrainSettings | None = None,
    *,
    work: str | Path,
    resume: bool = False,
    image_encoder: str | None = None,
    policy: Mapping[str, Any] | None = None,
    tx: optax.GradientTransformation | None = None,
    track: Callable[..., Any] = iter,
    say: Callable[[str], None] = warnings.warn,
    profile: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Domain:
    """Encoder and offsets of a new domain, learned on a frozen base (arXiv 2302.12228, section 3).

    Every process of a run (`training.processes`) makes the same call and reads its own share of the pictures.

    Args:
        base: Name of the base, as in `load_base`.
        data: The pictures: a registered name, "folder:DIR", "tfds:NAME" or "cache:DIR" (`data.sources.open_pictures`).
        domain: What the domain is; `DomainSettings()` where not given.
        settings: How it is learned; `PretrainSettings()` where not given.
        work: Folder for prepared data and checkpoints, of one run only; the same for all processes.
        resume: Go on with the run in `work`, or start where there is none.
        image_encoder: As in `load_base`.
        policy: How the networks compute, as in `load_base`.
        tx: An optimiser in place of `training.optimizers.pretraining`.
        track: Wraps the range of steps: a progress bar.
        say: Takes lines for the reader: what was skipped, what changed since the run began.
        profile: Leave a trace of three steps in `work`/tensorboard.
        stop: Asked after every step whether to save and end there.

    Errors: `UserError` for names that lead nowhere, settings out of range, a folder that holds another run, or a loss that is not
    finite; `Stopped` when `stop` said so.
    """
    domain, settings = domain or DomainSettings(), settings or PretrainSettings()
    check_ranges(settings)
    check_ranges(domain)
    layout(settings.parallel, settings.fsdp).check_divides(settings.batch_size, settings.accumulate)
    if is_first():
        check_writable(Path(work), argument="work")
    prompts = templates(domain.template)
    scene_captions(domain.template)
    cached = data.startswith("cache:")
    model, params = load_base(base, image_encoder, **(policy or {}))
    method = make_method(model, domain.domain_token, clip_features=domain.clip_features)
    broken = Broken(say)
    read = partial(open_pictures, data, model.image_size, Path(work) / "data")
    held_out = settings.held_out
    pictures = read(broken, Split(held_out, validation=False) if held_out else None)
    held = read(Broken(say), Split(held_out, validation=True)) if held_out else None
    made_of = base_fingerprint(params)
    if cached:
        _check_cache(Path(data.removeprefix("cache:")), made_of, domain.clip_features, model.image_size)
        params = {part: params[part] for part in READ_BY_RUNS}  # the rest, which no step needs, makes room
    words = partial(tokenize, model.tokenizer, domain_token=domain.domain_token)
    rows = partial(training_batches, pictures, words, prompts, settings.batch_size, settings.seed, last=settings.steps)
    rows = partial(rows, share=(jax.process_index(), jax.process_count()), workers=settings.workers)
    rows = partial(rows, broken=broken)
    next(rows(first=settings.steps - 1, workers=0))  # says what is wrong with the pictures before anything is compiled
    facts = {**dataclasses.asdict(settings), **dataclasses.asdict(domain), "devices": jax.device_count()}
    facts |= {"data": data, "pictures": len(pictures), "files": folder_digest(data), "own_optimiser": tx is not None}
    facts |= {"base": made_of, "scheduler": dict(model.scheduler)}
    if not held_out:  # as it was before anything could be
        del facts["held_out"]

    def learned(params: Params, trainable: Trainable) -> Domain:
        assert trainable.factors is not None
        return Domain(
            base,
            domain.domain_token,
            model,
            params,
            trainable.encoder,
            trainable.factors,
            regularisation=settings.regularisation,
            image_encoder=image_encoder,
            guidance=domain.guidance,
            template=domain.template,
            clip_features=domain.clip_features,
        )

    look = registry.find("look", data) or (lambda so_far: look_at(so_far, _first_of(held or pictures)))
    dtype = (policy or {}).get("dtype", "float32")
    folder = Path(work) / "checkpoints"
    # Weights and two moments, of two checkpoints that are kept and one that is being written.
    shapes = jax.tree.leaves(jax.eval_shape(partial(init_trainable, method), jax.random.key(0)))
    if is_first():
        check_writable(folder, argument="work", needed=3 * 3 * sum(4 * leaf.size for leaf in shapes))
    with Checkpoints(folder, facts, resume=resume, may_change=_MAY_CHANGE, say=say) as checkpoints:
        # Not before the run is known to be this one.
        watch = Watch(Path(work), settings.batch_size, settings.steps, facts) if is_first() else None

        def record(step: int, figures: dict[str, float], tflop: float | None) -> dict[str, float]:
            figures = {**figures, "broken_pictures": int(largest_of_all(broken.marks(len(pictures))).sum())}
            return figures if watch is None else watch.record(step, figures, tflop)

        def sample(step: int, trainable: Trainable) -> None:
            if watch is None:
                return

            def see() -> tuple[np.ndarray | None, dict[str, float]]:
                grid, figures = (None, {}) if cached else look(learned(params, trainable))
                if held is not None:
                    batches = training_batches(held, words, prompts, len(held), settings.seed, last=1)
                    given, most = given_of(params, dtype), settings.batch_size // jax.device_count()
                    loss = validation_loss(method, domain.clip_features, trainable, given, next(batches), most)
                    figures = {**figures, "validation_loss": loss}
                return grid, figures

            try:
                watch.look(step, see)
            except UserError as error:  # a run goes on though its samples are not to be drawn
                if error.argument == "work":
                    raise
                say(f"No samples at step {step}: {error}")

        trainable = pretrain_trainable(
            method,
            domain.clip_features,
            params,
            lambda first: rows(first=first),
            settings,
            dtype=dtype,
            checkpoints=checkpoints,
            tx=tx,
            track=track,
            record=record,
            sample=None if cached and not held_out else sample,
            profile=Path(work) / "tensorboard" if profile and is_first() else None,
            stop=stop,
        )
    if count := int(largest_of_all(broken.marks(len(pictures))).sum()):
        say(f"{count} of the {len(pictures)} pictures of {data} could not be read and were skipped.")
    if cached:  # a domain draws, too: what no step needed is read now
        model, params = load_base(base, image_encoder, **(policy or {}))
    return learned(params, trainable)


def _first_of(pictures: grain.MapDataset) -> np.ndarray:
    return np.stack([pictures[row]["image"] for row in range(min(_SAMPLED, len(pictures)))])


def _check_cache(folder: Path, base: str, clip_features: str, image_size: int) -> None:
    """A cache was made with this base, and is whole: every process verifies its share of the shards."""
    rows = CachedRows(folder)
    check_made_for(folder, rows.manifest, base, clip_features, image_size)
    rows.check(share_of(range(len(rows.paths))))
