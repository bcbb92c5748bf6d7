"""Base models on disk: the diffusers folder layout, weights in PyTorch's names and layouts, without PyTorch.

    model_index.json  scheduler/  tokenizer/  vae/  unet/  text_encoder/  image_encoder/

Every leaf of the Flax tree knows its PyTorch name and layout (`names`), so that reading walks the tree that the configuration
promises and takes each tensor by name: nothing is guessed, and what is missing is said.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save

from e4t_jax.bases.formats import STEMS, Weights, open_weights, read_json
from e4t_jax.bases.image_encoders import image_encoder_of
from e4t_jax.bases.protocol import LoadedBase, Params
from e4t_jax.bases.scheduler_config import noise_schedule
from e4t_jax.bases.stable_diffusion.base import StableDiffusion
from e4t_jax.bases.stable_diffusion.geometries import image_encoder_geometry
from e4t_jax.bases.stable_diffusion.names import from_torch, other_name, to_torch, torch_name
from e4t_jax.bases.stable_diffusion.policy import Policy
from e4t_jax.bases.stable_diffusion.random_weights import RANDOM, drawn_weights
from e4t_jax.bases.stable_diffusion.settings import check_config
from e4t_jax.bases.tokenizers import load_tokenizer, save_tokenizer
from e4t_jax.errors import UserError
from e4t_jax.machine import check_holds
from e4t_jax.storage import file_digest, move_files, sample_of, temporary_folder, write_file

INDEX = "model_index.json"
CHECKSUMS = "_checksums"  # diffusers passes over what begins so

_CLASSES = {
    "vae": ("diffusers", "AutoencoderKL"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    # The class that StableDiffusionPipeline asks of it; the projection, where there is one, lies in the same file too.
    "text_encoder": ("transformers", "CLIPTextModel"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
}


def save_folder(
    folder: Path,
    base: StableDiffusion,
    params: Params,
    dtype: Any = np.float16,
    *,
    beside: Mapping[str, bytes | str] | None = None,
) -> None:
    """Writes the parts in `params` as a diffusers folder that PyTorch's classes load too; all of it, or nothing.

    model_index.json holds the checksums of weights and words, which `load_folder` verifies. `beside` is the content of further
    files by their names, written with the others.

    Errors: `UserError` when a file cannot be written, or a weight is not finite as `dtype`.
    """
    folder = Path(folder)
    # On the same disk: one file at a time is in memory, and nothing of an older base is touched before all are written.
    with temporary_folder(folder / "unfinished") as unfinished:
        try:
            _write_folder(unfinished, base, params, dtype)
            for name, content in (beside or {}).items():
                write_file(unfinished / name, content)
        except UserError as error:
            raise UserError(error.message.replace(str(unfinished), str(folder)), error.argument) from None
        # The index, at the top, comes last: until it is there, the checksums of an older one tell that files were mixed.
        move_files(unfinished, folder)


def _write_folder(folder: Path, base: StableDiffusion, params: Params, dtype: Any) -> None:
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    for part in params:
        save_part(folder, part, params[part], dtype)
        config = dict(base.configs[part])
        library, kind = _class_of(part, config)
        if part in ("vae", "unet"):
            config = {"_class_name": kind, **config}
        else:
            config = {"model_type": "clip_text_model" if part == "text_encoder" else "clip_vision_model", **config}
            # In what a pipeline computes that is not told: transformers 5 would take the file's dtype, diffusers takes float32.
            config["dtype"] = "float32"
        index[part] = [library, kind]
        write_json(folder / part / "config.json", config)
    write_json(folder / "scheduler" / "scheduler_config.json", dict(base.scheduler))
    save_tokenizer(base.tokenizer, folder / "tokenizer")
    index |= {
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", base.scheduler.get("_class_name", "DDIMScheduler")],
    }
    words = ("vocab.json", "merges.txt", "tokenizer.json")
    sealed = [path for path in folder.rglob("*") if path.suffix == ".safetensors" or path.name in words]
    index[CHECKSUMS] = {path.relative_to(folder).as_posix(): file_digest(path) for path in sealed}
    write_json(folder / INDEX, index)


def _class_of(part: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """Library and class that load a part: the image encoder's own, where it is none of CLIP's."""
    library, kind = _CLASSES[part]
    own = part == "image_encoder" and not str(config.get("model_type", "clip")).startswith("clip")
    return library, (config.get("architectures") or ["AutoModel"])[0] if own else kind


def save_part(folder: Path, part: str, params: Params, dtype: Any = np.float16) -> None:
    """Writes the weights of one part in PyTorch's names and layouts."""
    flat = flatten_dict(params, sep="/")
    with np.errstate(over="ignore"):  # said below, by name
        tensors = {torch_name(part, path): to_torch(path, np.asarray(leaf)).astype(dtype) for path, leaf in flat.items()}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise UserError(f"{part}: {name} holds numbers that are not finite as {np.dtype(dtype)}; write float32.", "dtype")
    write_file(folder / part / f"{STEMS[part][0]}.safetensors", save(tensors, {"format": "pt"}))


def write_json(path: Path, content: dict) -> None:
    """A JSON file with sorted keys, so that equal content gives equal files."""
    write_file(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def load_folder(
    folder: Path,
    image_encoder: Path | str | Callable[[], Path] | None = None,
    clip_features: str | None = None,
    **policy: Any,
) -> tuple[StableDiffusion, Params]:
    """The base in a diffusers folder and its weights; as `open_folder`."""
    base, params, _ = open_folder(folder, image_encoder, clip_features, **policy)
    assert isinstance(base, StableDiffusion)
    return base, params


def open_folder(
    folder: Path,
    image_encoder: Path | str | Callable[[], Path] | None = None,
    clip_features: str | None = None,
    **policy: Any,
) -> LoadedBase:
    """Reads a base from a diffusers folder, tensor by tensor from file to device, each cast once as the `policy` says.

    `image_encoder` is a folder of one in transformers' format, for bases that bring none (Stable Diffusion's do not), or what
    finds one: it is not asked before all else in the folder was found to be there. "random:vit-h14" is drawn.
    `clip_features` says which of its states it gives.

    Errors: `UserError`, one line that names the file, when one is missing, damaged, changed or of another architecture.
    """
    base, weights = _open_parts(folder, image_encoder, Policy(**policy), clip_features)
    shapes = base.param_shapes()
    check_holds(shapes, jax.local_devices()[:1], f"the weights of {folder}")
    samples: dict[str, Params] | None = {} if base.dtype != "float32" else None
    params = {}
    for part in STEMS:
        params[part], part_samples = _fill_part(weights[part], part, shapes[part], sampled=samples is not None)
        if samples is not None:
            samples[part] = part_samples
    return LoadedBase(base, params, samples)


def survey_folder(folder: Path, image_encoder: Path | str | Callable[[], Path] | None = None) -> LoadedBase:
    """`open_folder` with shapes in place of weights: what fingerprints read of each tensor is kept, and nothing else of it.

    Errors: `UserError` as `open_folder`.
    """
    base, weights = _open_parts(folder, image_encoder, Policy())
    shapes = base.param_shapes()
    samples = {}
    for part in STEMS:
        flat = flatten_dict(shapes[part], sep="/")
        samples[part] = unflatten_dict({path: sample_of(_read(weights[part], part, path, flat[path])) for path in flat}, sep="/")
    return LoadedBase(base, shapes, samples)


def _open_parts(
    folder: Path,
    image_encoder: Path | str | Callable[[], Path] | None,
    policy: Policy,
    clip_features: str | None = None,
) -> tuple[StableDiffusion, dict[str, Weights]]:
    """The base in a folder, and where the weights of its parts lie."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"The base model {folder} does not exist; give a folder in the diffusers layout or a Hub id.")
    index = read_json(folder / INDEX) if (folder / INDEX).exists() else {}
    own = [part for part in STEMS if part != "image_encoder" or image_encoder is None]
    folders = {part: folder / part for part in own}
    configs = {part: read_config(part, where) for part, where in folders.items()}
    check_together(configs, folder)
    configs["scheduler"] = read_scheduler(folder, index)
    with warnings.catch_warnings():  # said once, where the schedule is put to use
        warnings.simplefilter("ignore")
        noise_schedule(configs["scheduler"])  # says what of it is not supported
    weights = {part: open_weights(where, part) for part, where in folders.items()}
    _verify(folder, index)
    text = StableDiffusion(configs, None).text
    tokenizer = load_tokenizer(folder / "tokenizer", text.max_position_embeddings, text.vocab_size)
    drawn = image_encoder if isinstance(image_encoder, str) and image_encoder.startswith(RANDOM) else None
    if drawn is not None:
        configs["image_encoder"] = image_encoder_geometry(drawn.removeprefix(RANDOM))
    elif image_encoder is not None:
        where = Path(image_encoder() if callable(image_encoder) else image_encoder)
        configs["image_encoder"] = read_config("image_encoder", where)
        weights["image_encoder"] = open_weights(where, "image_encoder")
    base = StableDiffusion({part: configs[part] for part in (*STEMS, "scheduler")}, tokenizer, policy, clip_features)
    if drawn is not None:
        weights["image_encoder"] = drawn_weights(drawn, base.param_shapes()["image_encoder"])
    return base, weights


def _verify(folder: Path, index: Mapping[str, Any]) -> None:
    """Compares the files with the checksums that `save_folder` left, where it did."""
    checksums = index.get(CHECKSUMS, {})
    if not isinstance(checksums, dict):
        raise UserError(f"{folder / INDEX} is damaged ({CHECKSUMS} holds no names); copy it again.")
    for name, digest in checksums.items():
        path = folder / name
        if not path.exists():
            raise UserError(f"{path} does not exist though {INDEX} names it; copy it again.")
        if file_digest(path) != digest:
            raise UserError(f"{path} was changed since it was written (its checksum in {INDEX} differs); copy it again.")


def read_scheduler(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's configuration, of the class that model_index.json names where it does: that is the one diffusers makes."""
    config = without_replaced_defaults(read_json(folder / "scheduler" / "scheduler_config.json"))
    named = index.get("scheduler")
    if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str):
        config["_class_name"] = named[1]
    return config


def without_replaced_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of diffusers without the keys that it lists as never given: its classes take their defaults for those."""
    unused = config.get("_use_default_values") or []
    return {name: value for name, value in config.items() if name not in unused and name != "_use_default_values"}


def check_together(configs: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Refuses parts that do not fit each other.

    Errors: `UserError` that names the files and the numbers.
    """
    base = StableDiffusion(configs, None)
    for ours, theirs, key in (
        (base.unet.in_channels, base.vae.latent_channels, "in_channels = {} of unet/config.json and latent_channels = {} of vae"),
        (
            base.unet.cross_attention_dim,
            base.text.hidden_size,
            "cross_attention_dim = {} of unet and hidden_size = {} of text_encoder",
        ),
    ):
        if ours != theirs:
            raise UserError(f"{folder}: {key.format(ours, theirs)} differ; give the parts of one model for text alone.")


def read_config(part: str, folder: Path) -> dict[str, Any]:
    """A part's config.json; of a whole CLIP model, the half that sees.

    Errors: `UserError` for another architecture than Stable Diffusion 1 and 2 have, naming the key that says so, and for an image
        encoder of a kind that is not known.
    """
    path = folder / "config.json"
    config = read_json(path)
    if part == "image_encoder":
        return dict(image_encoder_of(config, file=path).config)
    if part in ("vae", "unet"):
        config = without_replaced_defaults(config)
    if part == "unet" and _is_before_0_9(config) and isinstance(config.get("sample_size"), int) and config["sample_size"] < 64:
        config["sample_size"] = 64  # as StableDiffusionPipeline does: files of that time said 32 of models of 512 pixels
    check_config(part, config, path)
    return config


def _is_before_0_9(config: Mapping[str, Any]) -> bool:
    version = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version", "")))
    return version is not None and (int(version[1]), int(version[2])) < (0, 9)


def load_part(folder: Path, part: str, shapes: Params) -> Params:
    """Reads the weights of one part into the tree that `shapes` promises, in its dtypes."""
    return fill_part(open_weights(folder, part), part, shapes)


def fill_part(weights: Weights, part: str, shapes: Params) -> Params:
    """`load_part` of weights that are open already."""
    return _fill_part(weights, part, shapes, sampled=False)[0]


def _fill_part(weights: Weights, part: str, shapes: Params, *, sampled: bool) -> tuple[Params, Params]:
    """The weights and, where asked for, samples of them as they were stored (`storage.sample_of`)."""
    loaded, samples = {}, {}
    for path, promised in flatten_dict(shapes, sep="/").items():
        tensor = _read(weights, part, path, promised)
        if sampled:
            samples[path] = sample_of(np.asarray(tensor))
        # Copied at once, one tensor at a time: the device never waits for, nor the host holds, more than that.
        loaded[path] = jax.block_until_ready(jnp.array(tensor, promised.dtype))
    return unflatten_dict(loaded, sep="/"), unflatten_dict(samples, sep="/")


def _read(weights: Weights, part: str, path: str, promised: jax.ShapeDtypeStruct) -> np.ndarray:
    """One weight in Flax's layout, as it is stored.

    Errors: `UserError` for one that is missing, of another shape than promised, or not finite.
    """
    name = path if weights.flax else torch_name(part, path)
    if name not in weights.read and other_name(name) in weights.read:
        name = other_name(name)
    if name not in weights.read:
        raise UserError(f"{weights.file} lacks the tensor {name} that config.json beside it promises; copy both again.")
    try:
        stored = weights.read[name]()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights.file}: {name} cannot be read ({error}); copy the file again.") from None
    tensor = stored if weights.flax else from_torch(path, stored, promised.shape)
    if tensor.shape != promised.shape:
        raise UserError(
            f"{weights.file}: {name} has shape {tuple(tensor.shape)} where config.json beside it promises "
            f"{promised.shape} (in Flax's layout); give weights and configuration of one model."
        )
    if not np.isfinite(np.asarray(tensor, np.float32)).all():
        raise UserError(f"{weights.file}: {name} holds numbers that are not finite; copy the file again.")
    return tensor
