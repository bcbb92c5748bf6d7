"""A pretrained domain: a base model, the encoder and weight offsets learned on it, and what a user does with them.

    domain = load_domain("creatures")
    concepts = domain.tune(["venus.png", "ada.png"], steps=5)
    images = domain.generate(concepts, ["a photo of *s in the snow"], seed=0)

`files.domain_files` reads and writes one; `pretraining` makes one.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from e4t_jax.bases import Base, LoadedBase, Params
from e4t_jax.concept import Concept, said_of_unfamiliar
from e4t_jax.data.images import PictureLike, read_image, read_whole
from e4t_jax.errors import UserError
from e4t_jax.files.places import local_path
from e4t_jax.image_inputs import Encoders
from e4t_jax.objective import Frozen, Method, Trainable, make_method
from e4t_jax.offsets import Factors, Networks
from e4t_jax.sample import Drawing, DrawnConcept, SampleSettings, draw_concept, draw_prompt_noise
from e4t_jax.samplers import Sampler, own_method, sampler
from e4t_jax.storage import digest, fingerprint, to_json
from e4t_jax.templates import heaviest_captions, scene_captions
from e4t_jax.tuning.batching import over
from e4t_jax.tuning.familiarity import Familiarity
from e4t_jax.tuning.kept_programs import static_fields
from e4t_jax.tuning.personalise import CaptionGrid, Personalised, Personalising, PictureInput, personalise, picture_input
from e4t_jax.tuning.recipe import Prompts, Recipe
from e4t_jax.tuning.results import Outcome, Outcomes
from e4t_jax.tuning.tune import TuneSettings
from e4t_jax.words import PLACEHOLDER, TokenizedPrompts, tokenize

_AHEAD = 64  # pictures read while others are tuned
Track = Callable[[Iterable], Iterable]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Domain:
    """A domain: a base model, and the encoder and weight offsets learned on it. Arrays and settings, no state."""

    base_name: str  # as `load_base` found it
    domain_token: str  # the word that every concept of the domain is one of
    base: Base  # the model without its weights
    params: Params  # the base's weights
    encoder: Params  # weights of `encoder.ConceptEncoder`
    factors: Factors | Params  # of the domain's weight offsets; shapes in place of arrays where a program is only lowered
    scale: float = 0.1  # s of e* = e_d + s E
    regularisation: float = 0.0016  # λ of pretraining and tuning; the paper's 0.01 ‖e_d‖² where words are 0.4 long
    guidance: float = 7.5  # classifier-free, where a call names none
    template: str = "neutral"  # the kind of captions to look for (`templates.SCENES`)
    image_encoder: str | None = None  # its name, where the base brings none
    clip_squash: int | None = None  # pixels a side to which the whole picture is squashed for CLIP; None: CLIP sees the cropped one
    networks: Callable[[], Networks] | None = None  # reads the networks that the factors were made of, where an import kept them
    familiarity: Familiarity | None = None  # how far a picture is from those it was pretrained on, where that is known
    samples: Params | None = None  # where `params` were cast: what fingerprints read of them, as stored (`bases.LoadedBase`)

    def __repr__(self) -> str:
        return f"Domain({self.domain_token!r}, base={self.base_name!r}, {self.base.image_size} px, {self.fingerprint})"

    @cached_property
    def method(self) -> Method:
        """The modules, the noise schedule and the numbers of the loss, as the functions of `objective` take them."""
        return make_method(self.base, self.domain_token, self.scale)

    @property
    def frozen(self) -> Frozen:
        """What tuning and generation read and never change."""
        return Frozen(self.params["unet"], self.params["text_encoder"], self.factors, self.encoder)

    @property
    def stored(self) -> Params:
        """The base's weights as stored, or samples of them, for fingerprints."""
        return LoadedBase(self.base, self.params, self.samples).stored

    def traced_from(self, *parts: Any) -> list[Any] | None:
        """What programs on this domain are traced from beside shapes, as plain data; None for a base without `description`.

        Args:
            parts: Pytrees whose static fields the program depends on too.

        Errors: none.
        """
        description = getattr(self.base, "description", None)
        if description is None:
            return None
        schedule = [getattr(self.method.schedule, field.name) for field in static_fields(self.method.schedule)]
        own = [description, schedule, self.scale]
        return [*own, *([type(part).__name__, *(getattr(part, field.name) for field in static_fields(part))] for part in parts)]

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of base, encoder and offsets, by which a concept knows its domain."""
        unet = self.stored["unet"]
        # Stable Diffusion's first layer tells its versions apart; of another model, all is read.
        return fingerprint({"conv_in": unet["conv_in"]} if "conv_in" in unet else unet, self.encoder, self.factors)

    def tune(
        self,
        images: Sequence[PictureLike],
        settings: TuneSettings | None = None,
        *,
        caption: str | Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        track: Track = iter,
        **changes: Any,
    ) -> list[Concept]:
        """Concepts of pictures, one a picture, several tuned at once by one compiled call.

        Args:
            images: Files, PIL pictures or arrays (uint8, or floats in [0, 1]); an alpha channel, or `NAME.mask.png` beside
                `NAME.png`, limits the loss to the concept.
            settings: How concepts are tuned; `TuneSettings()` where not given.
            caption: What the pictures show around `*s` ("a photo of *s in a meadow"), one for all or one a picture; where not
                given, the base reads it off each picture (`captioning`).
            names: Names of the concepts; where not given, files lend theirs.
            track: Wraps the loop over the concepts: a progress bar.
            changes: Single fields of `settings`: `domain.tune(paths, steps=5)`.

        Errors: `UserError` for a picture that cannot be read, a missing mask, a caption without the placeholder, settings out
        of range, or a loss that is not finite. `tune_many` goes on where this stops.
        """
        outcomes = self.tune_many(images, settings, caption=caption, names=names, **changes)
        concepts = [outcome.unwrap() for outcome in track(outcomes)]
        if line := said_of_unfamiliar(concepts, self.domain_token):
            warnings.warn(line, stacklevel=2)
        return concepts

    def tune_many(
        self,
        images: Sequence[PictureLike],
        settings: TuneSettings | None = None,
        *,
        caption: str | Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        done: Callable[[str, str], bool] = lambda name, origin: False,
        **changes: Any,
    ) -> Outcomes[Concept]:
        """`tune` for any number of pictures: each concept as soon as it is there, while the next pictures are read.

        A picture that cannot be read or tuned is an outcome of its own, with its error; the others are tuned.

        Args:
            images: As in `tune`.
            settings: As in `tune`.
            caption: As in `tune`.
            names: As in `tune`.
            done: `done(name, origin)` says whether to leave a picture out, since its concept was made before; `origin` is that
                concept's (`Concept.origin`).
            changes: Single fields of `settings`.

        Errors: `UserError` as `tune`, for what concerns all pictures.
        """
        if not len(images):
            raise UserError("there is no picture; give one or more.", "images")
        tuning = self.tuning(settings, **changes)
        caption = tuning.recipe.caption if caption is None else caption
        captions = [caption] * len(images) if isinstance(caption, str) else caption
        if captions is not None and len(captions) != len(images):
            raise UserError(f"there are {len(captions)} for {len(images)} pictures; give one for all, or one for each.", "caption")
        tokens = None if captions is None else self.tokenize(captions)

        def read(row: int) -> tuple[Outcome[Concept], PictureInput | None]:
            own_caption = None if captions is None else captions[row]
            own_tokens = None if tokens is None else tuple(part[row][None] for part in tokens)
            outcome, own = tuning.read(images[row], names[row] if names else name_of(images[row], row), own_caption, own_tokens)
            return outcome, None if outcome.error is None and done(outcome.name, outcome.origin) else own

        import grain.python as grain

        rows = grain.MapDataset.range(len(images)).map(read)
        ahead = rows.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD))
        shared = tuning.shared(reads=tokens is None)
        made = over(personalise, shared, ahead, len(images), lower="batch_size", static=tuning.traced_from)
        return Outcomes(len(images), (tuning.concept(*pair) for pair in made))

    def tuning(self, settings: TuneSettings | None = None, **changes: Any) -> Tuning:
        """Tuning on this domain with these settings, before there are pictures: what `tune` and `Tuner` are made of.

        Args:
            settings: How concepts are tuned; `TuneSettings()` where not given.
            changes: Single fields of `settings`.

        Errors: `UserError` for settings out of range.
        """
        settings = _changed(settings or TuneSettings(), changes).filled()
        return Tuning(self, settings, settings.recipe_of(self.regularisation))

    def generate(
        self,
        concepts: Sequence[Concept],
        prompts: Sequence[str],
        settings: SampleSettings | None = None,
        *,
        track: Track = iter,
        **changes: Any,
    ) -> UInt8[np.ndarray, "concepts prompts h w 3"]:
        """Every concept in every prompt, uint8 RGB; noise depends on seed and prompt alone (`sample.draw_prompt_noise`).

        `to_pil` makes Pillow pictures of the result; h = w = `base.image_size` pixels.

        Args:
            concepts: Concepts of this domain.
            prompts: Prompts with the placeholder `*s`: "a photo of *s in the snow".
            settings: How pictures are drawn; `SampleSettings()` where not given.
            track: Wraps the loop over the concepts: a progress bar.
            changes: Single fields of `settings`: `domain.generate(concepts, prompts, seed=1)`.

        Errors: `UserError` for a prompt without the placeholder, an unknown sampler, settings out of range, concepts of another
        domain, or pictures that are not finite.
        """
        if not len(concepts):
            raise UserError("there is no concept; give one or more.", "concepts")
        outcomes = self.generate_many(concepts, prompts, settings, count=len(concepts), **changes)
        return np.stack([outcome.unwrap() for outcome in track(outcomes)])

    def generate_many(
        self,
        concepts: Iterable[Concept],
        prompts: Sequence[str],
        settings: SampleSettings | None = None,
        *,
        count: int,
        **changes: Any,
    ) -> Outcomes[UInt8[np.ndarray, "prompts h w 3"]]:
        """`generate` for any number of concepts, up to `count`: the pictures of each as soon as they are there.

        A concept of another domain, or whose pictures are not finite, is an outcome with its error; the others are drawn.

        Args:
            concepts: Concepts, taken as they come.
            prompts: As in `generate`.
            settings: As in `generate`.
            count: The most concepts that may come: what the calls are sized for.
            changes: Single fields of `settings`.

        Errors: `UserError` as `generate`, for what concerns all concepts.
        """
        settings = _changed(settings or SampleSettings(), changes)
        run = self.drawing(prompts, settings)

        def own(concept: Concept) -> tuple[Outcome[np.ndarray], DrawnConcept | None]:
            if concept.domain != self.fingerprint:
                error = UserError(f"{concept.name} was tuned in another domain or on another base.", "concepts")
                return Outcome(concept.name, error=error), None
            return Outcome(concept.name), DrawnConcept(concept.trainable, concept.folded)

        made = over(draw_concept, run, map(own, concepts), count, lower="prompts", static=self.traced_from(run.sampler))
        return Outcomes(count, (_pictures(*pair) for pair in made))

    def generate_class(
        self, count: int, prompts: Sequence[str], settings: SampleSettings | None = None, **changes: Any
    ) -> UInt8[np.ndarray, "count prompts h w 3"]:
        """What the base model draws, without encoder, offsets or concept, when `*s` is read as the domain's word.

        Args:
            count: How often the pictures are repeated, so that the result has the shape of `generate`'s.
            prompts: As in `generate`.
            settings: As in `generate`.
            changes: Single fields of `settings`.

        Errors: `UserError` as `generate`.
        """
        settings = _changed(settings or SampleSettings(), changes)
        run = self.drawing(prompts, settings)
        plain = self.frozen._replace(factors=None)
        run = dataclasses.replace(run, frozen=plain, placeholder=jnp.zeros_like(run.placeholder))
        own = DrawnConcept(Trainable(), np.zeros(self.base.image_encoder.width, np.float32))
        ((_, made),) = over(draw_concept, run, [(None, own)], 1, lower="prompts")
        return np.repeat(_pictures(Outcome("the class"), made).unwrap()[None], count, axis=0)

    def drawing(self, prompts: Sequence[str], settings: SampleSettings) -> Drawing:
        """What `sample.draw_concept` needs beside a concept.

        Args:
            prompts: As in `generate`.
            settings: How pictures are drawn.

        Errors: `UserError` as `generate`, for what concerns all concepts.
        """
        settings.check()
        tokens = self.tokenize(prompts)
        noise = draw_prompt_noise(settings.seed, prompts, self.base.latent_shape)
        return Drawing(
            method=self.method,
            sampler=self.sampler(settings),
            frozen=self.frozen,
            vae=self.params["vae"],
            ids=jnp.asarray(tokens.ids),
            placeholder=jnp.asarray(tokens.placeholder),
            noise=noise.start,
            keys=noise.keys,
            guidance=self.guidance if settings.guidance is None else settings.guidance,
        )

    def sampler(self, settings: SampleSettings) -> Sampler:
        """The sampler that the settings ask for, on this base.

        Args:
            settings: `sampling` and `steps` are read.

        Errors: `UserError` for one that is unknown, and for more steps than it can take.
        """
        method = own_method(self.base.scheduler) if settings.sampling is None else settings.sampling
        return sampler(self.method.schedule, method, settings.steps)

    def tokenize(self, prompts: Sequence[str]) -> TokenizedPrompts:
        """Token ids of the prompts, the domain's word in the placeholder's place, and where that is.

        Args:
            prompts: Prompts with the placeholder `*s`.

        Errors: `UserError` for a prompt without the placeholder, or longer than the tokenizer reads.
        """
        return tokenize(self.base.tokenizer, prompts, placeholder=PLACEHOLDER, domain_token=self.domain_token)


@dataclasses.dataclass(frozen=True, eq=False)
class Tuning:
    """What comes before `personalise` and after it, for pictures that one domain tunes with the same settings."""

    domain: Domain
    settings: TuneSettings
    recipe: Recipe

    def read(
        self, image: PictureLike, name: str, caption: str | None, tokens: Prompts | None
    ) -> tuple[Outcome[Concept], PictureInput | None]:
        """A picture with what its concept follows from; None with its error where it cannot be read.

        `tokens` are the caption's, [1, length]; both are None where it is to be read off the picture.
        """
        framing = self.recipe.framing(self.settings.seed)
        use_mask = self.settings.mask != "none" and self.settings.recipe != "public"
        try:
            image = local_path(image, "images") if isinstance(image, str | Path) else image
            picture, found = read_image(image, self.domain.base.image_size, use_mask=use_mask, place=framing.place)
            if found is None and self.settings.mask == "file":
                raise UserError(f"{name} has none; give it an alpha channel or a NAME.mask.png beside it, or leave it.", "mask")
            squash = self.domain.clip_squash
            whole = None if squash is None else read_whole(image, squash)
        except UserError as error:
            return Outcome(name, error=error), None
        own = picture_input(np.ascontiguousarray(picture[:, ::-1]) if framing.is_mirrored else picture, found, tokens, whole)
        source = {"caption": caption, "picture": f"{own.checksum:08x}"}
        return Outcome(name, origin=self._origin(own, caption), source=source), own

    def example(self, tokens: Prompts | None = None) -> PictureInput:
        """A picture of the shapes that `read` gives, for programs that are compiled before there is one; `tokens` as in `read`."""
        size, squash = self.domain.base.image_size, self.domain.clip_squash
        whole = None if squash is None else np.zeros((squash, squash, 3), np.float32)
        return picture_input(np.zeros((size, size, 3), np.float32), None, tokens, whole)

    def shared(self, *, reads: bool) -> Personalising:
        """What `personalise` needs beside a picture; `reads` where captions are read off the pictures."""
        domain, captions = self.domain, None
        if reads and self.recipe.steps:
            grid = scene_captions(domain.template)
            tokens = domain.tokenize([caption for row in grid for caption in row])
            captions = CaptionGrid(*(jnp.asarray(part).reshape(len(grid), len(grid[0]), -1) for part in tokens))
        return Personalising(
            method=domain.method,
            frozen=self._frozen(),
            encoders=Encoders(domain.params["vae"], domain.params["image_encoder"]),
            captions=captions,
            key=jax.random.key(self.settings.seed, impl="threefry2x32"),
            recipe=self.recipe,
            familiarity=domain.familiarity,
        )

    def _frozen(self) -> Frozen:
        """The domain's weights, with what the recipe may begin with."""
        domain, begins = self.domain, self.recipe.scope.parts
        networks = domain.networks() if "networks" in begins and domain.networks is not None else None
        return self.recipe.frozen(domain.frozen._replace(networks=networks, image_encoder=domain.params["image_encoder"]))

    @property
    def traced_from(self) -> list[Any] | None:
        """As `Domain.traced_from`, of tuning with this recipe."""
        return self.domain.traced_from(self.recipe)

    def concept(self, outcome: Outcome[Concept], made: Personalised | None) -> Outcome[Concept]:
        """The outcome with the concept that `personalise` made of it, if it did, or with the reason why it is none."""
        if made is None:
            return outcome
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(made)):
            return dataclasses.replace(
                outcome, error=UserError(f"{outcome.name} came out not finite; lower it or the steps.", "learning_rate")
            )
        given, weights = outcome.source.get("caption"), made.caption_weights
        captions = [] if weights is None else heaviest_captions(self.domain.template, np.asarray(weights))
        captions = captions if given is None else [{"caption": given, "weight": 1.0}]
        known = self.domain.familiarity
        familiar = {} if known is None or made.distance is None else {"familiar": bool(made.distance <= known.limit)}
        assert self.settings.scope is not None  # they are filled
        concept = Concept(
            name=outcome.name,
            scope=self.settings.scope,
            domain=self.domain.fingerprint,
            trainable=made.trainable,
            folded=made.folded,
            origin=outcome.origin,
            tuning={**self.settings.used(self.recipe), **outcome.source, "captions": captions, **familiar},
        )
        return dataclasses.replace(outcome, result=concept)

    def _origin(self, own: PictureInput, caption: str | None) -> str:
        """A checksum of all that a concept follows from."""
        parts = (own.picture, own.mask, *(() if own.whole is None else (own.whole,)))
        pixels = [digest(np.ascontiguousarray(part).tobytes()) for part in parts]
        recipe = self.recipe
        source = {
            "scope": self.settings.scope,
            "recipe": self.settings.recipe,
            "parts": recipe.scope.parts,
            "steps": recipe.steps,
            "batch_size": recipe.batch_size,
            "learning_rate": recipe.learning_rate,
            "word_rate": recipe.word_rate,
            **dataclasses.asdict(recipe.weights),
            "seed": self.settings.seed,
            "caption": caption,
            "domain": self.domain.fingerprint,
            "pixels": pixels,
            "template": self.domain.template,
            "dtype": self.domain.base.dtype,
        }
        return digest(to_json(source).encode())


def to_pil(images: UInt8[np.ndarray, "concepts prompts h w 3"]) -> list[list[Image.Image]]:
    """Pillow pictures of what `Domain.generate` returns: a list for each concept, with a picture for each prompt.

    Args:
        images: uint8 `[concepts, prompts, h, w, 3]`.

    Errors: `TypeError` for numbers of another kind, which Pillow does not read.
    """
    return [[Image.fromarray(image) for image in row] for row in images]


def _changed(settings: Any, changes: dict[str, Any]) -> Any:
    unknown = sorted(set(changes) - {field.name for field in dataclasses.fields(settings)})
    if unknown:
        known = ", ".join(field.name for field in dataclasses.fields(settings))
        raise UserError(f"{unknown[0]!r} is no setting; there are {known}.")
    return dataclasses.replace(settings, **changes) if changes else settings


def name_of(image: PictureLike, row: int) -> str:
    """A file lends its name to its concept; what has none is told apart by its place."""
    return Path(image).stem if isinstance(image, str | Path) else f"concept_{row}"


def _pictures(outcome: Outcome[np.ndarray], made: np.ndarray | None) -> Outcome[np.ndarray]:
    if made is None:
        return outcome
    pixels = np.round((made + 1) * 127.5)
    if not np.isfinite(pixels).all():
        said = f"the pictures of {outcome.name} came out not finite; lower the guidance, or tune at a lower rate."
        return dataclasses.replace(outcome, error=UserError(said, "concepts"))
    return dataclasses.replace(outcome, result=pixels.astype(np.uint8))
