"""A domain from pictures, from Python: `e4t_jax.pretrain("creatures", "folder:cats", work="work/cats")`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import optax

from e4t_jax import registry
from e4t_jax.bases import Base, LoadedBase
from e4t_jax.checks import check_ranges
from e4t_jax.data.batches import training_batches
from e4t_jax.data.cache import CachedRows, check_made_for
from e4t_jax.data.sources import Broken, Split, folder_digest, open_pictures
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.files.domain_files import base_fingerprint
from e4t_jax.files.places import local_data, local_name, local_path
from e4t_jax.objective import Method, Trainable, make_method
from e4t_jax.pretraining.encode_once import READ_BY_RUNS
from e4t_jax.pretraining.familiar import familiarity_of
from e4t_jax.pretraining.previews import Preview, preview
from e4t_jax.pretraining.run_log import RunLog
from e4t_jax.pretraining.settings import DomainSettings, Seen, or_preset
from e4t_jax.pretraining.step import Observers, PretrainSettings, frozen_weights, init_trainable, pretrain_trainable
from e4t_jax.pretraining.validation import validation_loss
from e4t_jax.storage import check_writable
from e4t_jax.templates import scene_captions, templates
from e4t_jax.training.checkpoints import Checkpoints
from e4t_jax.training.parallel import Layout, layout_for
from e4t_jax.training.processes import count_on_all, is_first, share_of
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


def pretrain(
    base: str,
    data: str,
    domain: DomainSettings | None = None,
    settings: PretrainSettings | None = None,
    *,
    work: str | Path,
    resume: bool = False,
    image_encoder: str | None = None,
    preset: str | None = None,
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
        domain: What the domain is; where not given, that of the preset of `data`, or else of `base` (`settings.preset_of`).
        settings: How it is learned; where not given, the preset's, or `PretrainSettings()` where there is none.
        work: Folder for prepared data and checkpoints, of one run only; the same for all processes.
        resume: Go on with the run in `work`, or start where there is none.
        image_encoder: As in `load_base`.
        preset: Name to note in run.json where the settings given were made from a preset's.
        policy: How the networks compute, as in `load_base`.
        tx: An optimiser in place of `training.optimizers.pretraining`.
        track: Wraps the range of steps: a progress bar.
        say: Takes lines for the reader.
        profile: Leave a trace of three steps in `work`/tensorboard.
        stop: Asked after every step whether to save and end there.

    Errors: `UserError` for names that lead nowhere, settings out of range, another run's folder, a loss not finite; `Stopped`.
    """
    domain, settings, taken = or_preset(base, data, domain, settings)
    check_ranges(settings)
    check_ranges(domain)
    where = layout_for(settings.batch_size, settings.accumulate, settings.parallel, settings.fsdp, say=say)
    work = local_path(work, "work")
    inputs = _open_inputs(Source(base, data, image_encoder, policy, domain).at_home(), domain, settings, work=work, say=say)
    record = _run_record(inputs, domain, settings, where, own_optimiser=tx is not None)
    with _checkpoints(work, record, inputs.method, resume=resume, say=say) as checkpoints:
        # Not before the run is known to be this one.
        noted = {**record, "preset": preset or taken}
        log = RunLog(work, settings.batch_size, settings.steps, noted) if is_first() else None
        observing = _Observing(inputs, domain, settings, settings.batch_size // where.mesh.size, log=log, say=say)
        observers = observing.observers(track=track, profile=work / "tensorboard" if profile and is_first() else None, stop=stop)
        weights, batches = frozen_weights(inputs.loaded.params), lambda first: inputs.batches(first=first)
        trainable = pretrain_trainable(
            inputs.method, weights, batches, settings, checkpoints=checkpoints, tx=tx, observers=observers
        )
    inputs.count_broken(say)
    # A domain draws, too: what no step on a cache needed is read now.
    loaded = inputs.source.open() if inputs.cached else inputs.loaded
    return _with_familiarity(_domain_of(inputs.source, loaded, domain, settings, trainable), inputs, settings.workers)


def _with_familiarity(domain: Domain, inputs: _Inputs, workers: int) -> Domain:
    """The domain with what its own pictures look like; of a cache, which holds none, nothing is known."""
    if inputs.cached or not is_first():
        return domain
    known = familiarity_of(domain.base, domain.params["image_encoder"], inputs.pictures, workers)
    return dataclasses.replace(domain, familiarity=known)


def _checkpoints(work: Path, record: dict[str, Any], method: Method, *, resume: bool, say: Callable[[str], None]) -> Checkpoints:
    """The checkpoints of a run, where there is room for them."""
    folder = work / "checkpoints"
    if is_first():
        check_writable(folder, argument="work", needed=_checkpoint_bytes(method))
    return Checkpoints(folder, record, resume=resume, may_change=_MAY_CHANGE, say=say)


class Source(NamedTuple):
    """What a domain is learned on, as the caller named it."""

    base: str
    data: str
    image_encoder: str | None
    policy: Mapping[str, Any] | None
    seen: Seen

    def at_home(self) -> Source:
        """The same, with the paths that its names lead to (`files.places`)."""
        eyes = self.image_encoder and local_name(self.image_encoder, "image_encoder")
        return self._replace(base=local_name(self.base, "base"), data=local_data(self.data), image_encoder=eyes)

    def open(self) -> LoadedBase:
        """The base with all of its weights."""
        return self.seen.open(self.base, self.image_encoder, self.policy)


class _Inputs(NamedTuple):
    """What a run reads, opened and checked."""

    source: Source
    loaded: LoadedBase  # without what a run on a cache does not need
    fingerprint: str  # of the whole base
    method: Method
    pictures: grain.MapDataset
    held_out: grain.MapDataset | None
    broken: Broken
    batches: Callable[..., Iterator[dict[str, np.ndarray]]]  # of this process's share, from a step `first` on
    held_out_batch: Callable[[], dict[str, np.ndarray]]

    @property
    def cached(self) -> bool:
        """Whether the pictures come encoded."""
        return self.source.data.startswith("cache:")

    def count_broken(self, say: Callable[[str], None]) -> None:
        """Says how many pictures were skipped, where any were."""
        if count := count_on_all(self.broken.rows):
            say(f"{count} of the {len(self.pictures)} pictures of {self.source.data} could not be read and were skipped.")


def _open_inputs(
    source: Source, domain: DomainSettings, settings: PretrainSettings, *, work: Path, say: Callable[[str], None]
) -> _Inputs:
    """Opens base and pictures; says all that can be wrong with them before anything is compiled."""
    if is_first():
        check_writable(work, argument="work")
    prompts = templates(domain.template)
    scene_captions(domain.template)
    loaded = source.open()
    base, fingerprint = loaded.base, base_fingerprint(loaded.stored)
    method = make_method(base, domain.domain_token)
    broken, held = Broken(say), settings.held_out
    read = partial(open_pictures, source.data, base.image_size, work / "data")
    pictures = read(broken, Split(held, validation=False) if held else None)
    held_out = read(Broken(say), Split(held, validation=True)) if held else None
    if source.data.startswith("cache:"):
        _check_cache(Path(source.data.removeprefix("cache:")), base, fingerprint)
        loaded = loaded._replace(params={part: loaded.params[part] for part in READ_BY_RUNS})  # the rest makes room
    words = partial(tokenize, base.tokenizer, domain_token=domain.domain_token)
    of_data = partial(training_batches, tokenize=words, prompts=prompts, seed=settings.seed)
    batches = partial(
        of_data,
        pictures,
        batch_size=settings.batch_size,
        last=settings.steps,
        share=(jax.process_index(), jax.process_count()),
        broken=broken,
    )
    next(batches(first=settings.steps - 1))
    return _Inputs(
        source=source,
        loaded=loaded,
        fingerprint=fingerprint,
        method=method,
        pictures=pictures,
        held_out=held_out,
        broken=broken,
        batches=partial(batches, workers=settings.workers),
        held_out_batch=lambda: next(of_data(held_out, batch_size=held, last=1)),
    )


def _run_record(
    inputs: _Inputs, domain: DomainSettings, settings: PretrainSettings, where: Layout, *, own_optimiser: bool
) -> dict[str, Any]:
    """What a run is, for its checkpoints and run.json: settings, data and base."""
    record = {**dataclasses.asdict(settings), **dataclasses.asdict(domain), "devices": where.mesh.size}
    data = inputs.source.data
    record |= {"data": data, "pictures": len(inputs.pictures), "files": folder_digest(data), "own_optimiser": own_optimiser}
    record |= {"base": inputs.fingerprint, "scheduler": dict(inputs.loaded.base.scheduler)}
    record["regularisation_unit"] = "domain word"  # a run from before weighs another term by the same number
    if not settings.held_out:  # as it was before anything could be held out
        del record["held_out"]
    return record


def _checkpoint_bytes(method: Method) -> int:
    """Weights and two moments, of two checkpoints that are kept and one that is being written."""
    shapes = jax.tree.leaves(jax.eval_shape(partial(init_trainable, method), jax.random.key(0)))
    return 3 * 3 * sum(4 * leaf.size for leaf in shapes)


class _Observing(NamedTuple):
    """Writes the figures and the samples of a run; on the processes that do not, keeps pace with the one that does."""

    inputs: _Inputs
    domain: DomainSettings
    settings: PretrainSettings
    at_once: int  # pictures that one device computes with
    log: RunLog | None
    say: Callable[[str], None]

    def observers(self, *, track: Callable[..., Any], profile: Path | None, stop: Callable[[], bool]) -> Observers:
        """These, and what the caller watches with; a cache without held-out pictures has no samples."""
        sample = None if self.inputs.cached and self.inputs.held_out is None else self.sample
        return Observers(track=track, record=self.record, sample=sample, profile=profile, stop=stop)

    def record(self, step: int, figures: dict[str, float], tflop: float | None) -> dict[str, float]:
        """Notes the figures of a step; gives what the progress bar shows."""
        figures = {**figures, "broken_pictures": count_on_all(self.inputs.broken.rows)}
        return figures if self.log is None else self.log.record(step, figures, tflop)

    def sample(self, step: int, trainable: Trainable) -> None:
        """Notes a grid of samples and the loss on what is held out; a run goes on though its samples cannot be drawn."""
        if self.log is None:
            return
        try:
            self.log.look(step, lambda: self._look(trainable))
        except UserError as error:
            if error.argument == "work":
                raise
            self.say(f"No samples at step {step}: {error}")

    def _look(self, trainable: Trainable) -> tuple[np.ndarray | None, dict[str, float]]:
        inputs = self.inputs
        grid, figures = None, {}
        if not inputs.cached:
            look = registry.find("preview", inputs.source.data) or self._first_pictures
            grid, figures = look(_domain_of(inputs.source, inputs.loaded, self.domain, self.settings, trainable))
        if inputs.held_out is not None:
            loss = validation_loss(
                inputs.method,
                trainable,
                frozen_weights(inputs.loaded.params),
                inputs.held_out_batch(),
                at_once=self.at_once,
            )
            figures = {**figures, "validation_loss": loss}
        return grid, figures

    def _first_pictures(self, domain: Domain) -> Preview:
        pictures = self.inputs.held_out or self.inputs.pictures
        shown = [pictures[row]["image"] for row in range(min(_SAMPLED, len(pictures)))]
        return preview(domain, np.stack(shown))


def _domain_of(
    source: Source, loaded: LoadedBase, domain: DomainSettings, settings: PretrainSettings, trainable: Trainable
) -> Domain:
    """The domain that was learned, so far or in the end."""
    assert trainable.factors is not None
    return Domain(
        source.base,
        domain.domain_token,
        loaded.base,
        loaded.params,
        encoder=trainable.encoder,
        factors=trainable.factors,
        regularisation=settings.regularisation,
        image_encoder=source.image_encoder,
        guidance=domain.guidance,
        template=domain.template,
        samples=loaded.samples,
    )


def _check_cache(folder: Path, base: Base, fingerprint: str) -> None:
    """A cache was made with this base, and is whole: every process verifies its share of the shards."""
    rows = CachedRows(folder)
    check_made_for(folder, rows.manifest, base, fingerprint)
    rows.check(share_of(range(len(rows.paths))))
