"""A domain on disk: domain.json, encoder.safetensors, offsets.safetensors, written and read as one thing.

domain.json names the base, and holds the checksums of the others, the base's fingerprint and a checksum of its own: files of
two domains do not mix. Where the offsets were made of the public code's networks, these lie beside them (networks.safetensors,
which is read where they are trained and nowhere else).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from e4t_jax import offsets, registry
from e4t_jax.bases import LoadedBase, Params, open_base
from e4t_jax.checks import GUIDANCE, SCALE, WEIGHT, Whole, check_range
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError, shortened
from e4t_jax.files.places import local_path
from e4t_jax.objective import domain_word
from e4t_jax.offsets import Networks, OffsetNetwork, factors_of_networks
from e4t_jax.storage import (
    check_signed,
    digest,
    file_digest,
    fingerprint,
    locked,
    pack,
    read_json,
    to_signed_json,
    unpack,
    user_cache,
    write_files,
)
from e4t_jax.templates import TEMPLATES
from e4t_jax.tuning.familiarity import Familiarity

_KIND = "e4t domain"
_FORMAT = 4  # 1 had no checksum; up to 3, λ weighed ‖s E‖² and not its share of ‖e_d‖²
_TENSORS = ("encoder", "offsets")
_NETWORKS = "networks"
_BOUNDS = {"scale": SCALE, "regularisation": WEIGHT, "guidance": GUIDANCE, "clip_squash": Whole(1, 4096)}
_OPTIONS: dict[str, type | tuple[type, ...]] = {
    "scale": (int, float),
    "regularisation": (int, float),
    "guidance": (int, float),
    "template": str,
    "image_encoder": (str, type(None)),
}
_FIELDS: dict[str, type | tuple[type, ...]] = {
    **_OPTIONS,
    "clip_features": str,  # the states that `base.image_encoder` gives
    "format": int,
    "base": str,
    "domain_token": str,
    "base_fingerprint": str,
}
# Not in every file.
_OPTIONAL_FIELDS: dict[str, type | tuple[type, ...]] = {
    "base_beside": str,
    "digests": dict,
    "checksum": str,
    "clip_squash": int,  # of a domain that was imported
    "origin": dict,  # where it was imported from, for who reads the file
}
_MEND = "make or copy the domain again"
_FAMILIARITY = "familiarity.safetensors"  # not in every domain; it names the encoder that it was written with
_FAMILIAR = [field.name for field in dataclasses.fields(Familiarity)]
_PARTS = ("vae", "unet", "text_encoder", "image_encoder")
_HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
_INSIDE = r"[\w-]+/[\w-][\w.-]*"  # a file in a folder of the domain


def save_domain(
    folder: str | Path,
    domain: Domain,
    dtype: Any = np.float16,
    *,
    beside: Mapping[str, bytes | str | Path] | None = None,
    origin: Mapping[str, str] | None = None,
) -> None:
    """Writes domain.json, encoder.safetensors, offsets.safetensors and, where there are any, networks.safetensors: all, or none.

    Args:
        folder: Where they are written; made if it is not there.
        domain: The domain. Of its base only the name and a fingerprint are written.
        dtype: Of the numbers in the files.
        beside: Content of further files by their names, written with the three; a path is that of a file on the same disk, which
            is moved. Those of the domain's image encoder are verified when the domain is loaded, as the three are.
        origin: Where the domain was imported from, to be read in domain.json.

    Errors: `UserError` when they cannot be written, for numbers that `dtype` cannot hold and for a name that is one of the three.
    """
    folder, beside = local_path(folder, "folder"), beside or {}
    check_names(folder, beside)
    parts: dict[str, bytes] = {}
    trees = {"encoder": domain.encoder, "offsets": domain.factors}
    if domain.networks is not None:
        trees[_NETWORKS] = {kernel: network._asdict() for kernel, network in domain.networks().items()}
    for name, tree in trees.items():
        with np.errstate(over="ignore"):
            flat = {key: np.asarray(leaf, dtype) for key, leaf in flatten_dict(tree, sep="|").items()}
        lost = next((key for key, leaf in flat.items() if not np.isfinite(leaf).all()), None)
        if lost is not None:
            raise UserError(f"the {name}'s {lost} holds numbers beyond {np.dtype(dtype)}; train at a lower learning rate.")
        parts[f"{name}.safetensors"] = pack(flat, {"kind": _KIND})
    if domain.familiarity is not None:
        numbers = {name: np.asarray(getattr(domain.familiarity, name)) for name in _FAMILIAR}
        beside = {**beside, _FAMILIARITY: pack(numbers, {"kind": _KIND, "encoder": digest(parts["encoder.safetensors"])})}
    record: dict[str, Any] = {name: getattr(domain, name) for name in _OPTIONS}
    record["clip_features"] = domain.base.image_encoder.features
    record |= {"format": _FORMAT, "base": domain.base_name, "domain_token": domain.domain_token}
    record["base_fingerprint"] = base_fingerprint(domain.stored)
    clip = domain.image_encoder
    sealed = {**parts, **{name: content for name, content in beside.items() if clip and name.startswith(f"{clip}/")}}
    record["digests"] = {name: _digest_of(content) for name, content in sealed.items()}
    record |= {"clip_squash": domain.clip_squash} if domain.clip_squash is not None else {}
    record |= {"origin": dict(origin)} if origin else {}
    if clip and os.path.isdir(clip) and not any(name.startswith(f"{clip}/") for name in beside) and not (folder / clip).is_dir():
        record["image_encoder"] = str(Path(clip).absolute())
    if os.path.isdir(domain.base_name) and not registry.find("base", domain.base_name):
        # Found from any folder, and after both were moved together.
        record["base"] = str(Path(domain.base_name).absolute())
        record["base_beside"] = os.path.relpath(record["base"], folder.absolute())
    contents = {**beside, **parts, "domain.json": to_signed_json(record)}
    write_files({folder / name: content for name, content in contents.items()})


def _digest_of(content: bytes | str | Path) -> str:
    if isinstance(content, Path):
        return file_digest(content)
    return digest(content.encode() if isinstance(content, str) else content)


def check_names(folder: Path, names: Iterable[str]) -> None:
    """Errors: `UserError` for a name of a file to be written into the folder of a domain that is one of the domain's own."""
    taken = sorted({"domain.json", *(f"{name}.safetensors" for name in (*_TENSORS, _NETWORKS)), _FAMILIARITY} & set(names))
    if taken:
        raise UserError(f"{folder / taken[0]} is a file of the domain itself; give what is written beside it another name.")


def base_fingerprint(params: Params) -> str:
    """The fingerprint of all four parts of a base, of the weights as stored or samples of them (`bases.LoadedBase.stored`)."""
    return fingerprint(*(params[part] for part in _PARTS))


def load_domain(name: str | Path = "creatures", **policy: Any) -> Domain:
    """A domain by name or folder, with the weights of its base, every file verified.

    Args:
        name: "creatures", shipped with the package; "faces", the public one, fetched and imported when it is first asked for; or a
            folder that `save_domain`, and so `e4t pretrain`, wrote.
        policy: How the networks compute, as in `load_base`: `dtype="bfloat16"`.

    Errors: `UserError` for a folder that is missing, damaged, of a newer format, or whose base has other weights.
    """
    shipped = registry.find("domain", str(name))
    folder = shipped() if shipped else local_path(name, "domain")
    path = folder / "domain.json"
    if not os.path.exists(path):
        known = ", ".join(registry.names("domain"))
        raise UserError(f"{path} does not exist; give a folder that pretraining wrote, or {known}.", "domain")
    with _mend_of(folder), locked(folder, shared=True):
        record = _read_record(path)
        encoder, factors = (_read_part(path, part, record) for part in _TENSORS)
        familiarity = _read_familiarity(folder)
        _check_beside(path, record)
    options = {name: record[name] for name in _OPTIONS} | {"clip_squash": record.get("clip_squash")}
    base_name = _base_of(folder, record)
    loaded = _open_base(path, base_name, record, policy)
    stored = loaded.stored
    found = base_fingerprint(stored) if record["format"] > 1 else fingerprint(stored["unet"], stored["text_encoder"])
    if record["base_fingerprint"] != found:
        with _mend_of(folder):
            told = f"{name} was pretrained on other weights than {record['base']} holds now; pretrain it again."
            raise UserError(told, "domain")
    has_networks = f"{_NETWORKS}.safetensors" in record.get("digests", {})
    domain = Domain(
        base_name,
        record["domain_token"],
        loaded.base,
        loaded.params,
        encoder=encoder,
        factors=factors,
        networks=partial(_read_networks, path, record, factors) if has_networks else None,
        samples=loaded.samples,
        familiarity=familiarity,
        **options,
    )
    part = misfit(domain)
    if part:
        raise UserError(f"{folder / part}.safetensors does not fit base and clip_features of {path.name}; {_MEND}.")
    if record["format"] < 4:
        squared = float(jnp.sum(domain_word(domain.method, domain.params["text_encoder"]) ** 2))
        domain = dataclasses.replace(domain, regularisation=domain.regularisation * squared)
    return domain


def _open_base(path: Path, name: str, record: dict[str, Any], policy: Mapping[str, Any]) -> LoadedBase:
    """The base of a domain, whose image encoder gives what the domain's encoder learned to see."""
    seen = record["clip_features"]
    try:
        return open_base(name, _image_encoder_of(path, record["image_encoder"]), clip_features=seen, **policy)
    except UserError as error:
        if error.argument != "clip_features":
            raise
        raise UserError(f"{path}: clip_features = {shortened(seen)} is unknown; update e4t-jax.") from None


@contextlib.contextmanager
def _mend_of(folder: Path) -> Iterator[None]:
    """Of a domain that was imported into the user's cache, errors say that it can be imported anew."""
    try:
        yield
    except UserError as error:
        if not folder.is_relative_to(user_cache()):
            raise
        fault = error.message.rpartition("; ")[0]
        raise UserError(f"{fault}; remove {folder}, and it is imported again.", error.argument) from None


def misfit(domain: Domain, feature_width: int | None = None) -> str | None:
    """The part, "encoder" or "offsets", whose shapes are others than the base asks for; None where both fit.

    `feature_width` is the base's, which takes it seconds to tell; where not given, the encoder's own is believed.

    Errors: `UserError` for a domain token that is none.
    """
    method, base = domain.method, domain.base
    found = jax.tree.map(lambda leaf: leaf.shape, domain.encoder)
    hidden = domain.encoder.get("unet_hidden")
    own = hidden["kernel"].shape[:1] if isinstance(hidden, dict) and "kernel" in hidden else (1,)
    width = own if feature_width is None else (feature_width,)
    clip, features = jnp.zeros((1, base.image_encoder.count, base.image_encoder.width)), jnp.zeros((1, *width))
    promised = jax.eval_shape(lambda: method.encoder.init(jax.random.key(0), clip, features, method="unfolded")["params"])
    if found != jax.tree.map(lambda leaf: leaf.shape, promised):
        return "encoder"
    return None if offsets.misfit(domain.factors, base.offset_kernels(domain.params["unet"])) is None else "offsets"


def _read_record(path: Path) -> dict[str, Any]:
    """What domain.json says: everything there, of its type and as it was written."""
    record = read_json(path, _MEND)
    number = record.get("format")
    if isinstance(number, int) and number > _FORMAT:
        raise UserError(f"{path} has format {shortened(number)}, this version reads up to {_FORMAT}; update e4t-jax.")
    check_signed(path, record, _MEND)
    for name, value in record.items():
        kind = {**_FIELDS, **_OPTIONAL_FIELDS}.get(name)
        if kind is None:
            raise UserError(f"{path} holds {shortened(name)}, which is unknown here; {_MEND}.")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{path}: {name} = {shortened(value)} is of the wrong kind; {_MEND}.")
        try:
            if name in _BOUNDS:
                check_range(name, value, _BOUNDS[name])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    required = [*_FIELDS, *(["digests"] if isinstance(number, int) and number > 1 else [])]
    missing = [name for name in required if name not in record]
    if missing:
        raise UserError(f"{path} lacks {missing[0]!r}; {_MEND}.")
    if record["format"] < 1:
        raise UserError(f"{path} has format {shortened(number)}, and there is none below 1; {_MEND}.")
    if record["template"] not in TEMPLATES:
        raise UserError(f"{path}: template = {shortened(record['template'])} is unknown; update e4t-jax.")
    return record


def _read_part(path: Path, part: str, record: dict[str, Any]) -> Params:
    """The tree of encoder or offsets, from the very file that domain.json was written with."""
    file = path.parent / f"{part}.safetensors"
    tensors, _ = unpack(file, _KIND, "part of a domain")
    if record["format"] > 1 and file_digest(file) != record["digests"].get(file.name):
        raise UserError(f"{file} is not the one that {path.name} was written with; {_MEND}.")
    try:
        return unflatten_dict({key: jnp.asarray(leaf, jnp.float32) for key, leaf in tensors.items()}, sep="|")
    except (TypeError, AttributeError):  # a name that is part and whole at once
        raise UserError(f"{file} is no {part} of a domain; {_MEND}.") from None


def _check_beside(path: Path, record: dict[str, Any]) -> None:
    """Errors: `UserError` for files of an image encoder beside a domain that are not those it was written with."""
    for name, told in record.get("digests", {}).items():
        file = path.parent / name
        if re.fullmatch(_INSIDE, name) and (not file.exists() or file_digest(file) != told):
            raise UserError(f"{file} is not the one that {path.name} was written with; {_MEND}.")


def _read_networks(path: Path, record: dict[str, Any], factors: Params) -> Networks:
    """The offset networks, which have to be those of the factors' kernels."""
    tree = _read_part(path, _NETWORKS, record)
    try:
        networks = {kernel: OffsetNetwork(**fields) for kernel, fields in tree.items()}
        made = jax.eval_shape(factors_of_networks, networks)
    except (TypeError, ValueError):  # of other parts, or of shapes that do not go together
        made = None
    if made is None or jax.tree.map(jnp.shape, made) != jax.tree.map(jnp.shape, factors):
        raise UserError(f"{path.parent / _NETWORKS}.safetensors does not fit the offsets beside it; {_MEND}.")
    return networks


def _read_familiarity(folder: Path) -> Familiarity | None:
    """What the domain's own pictures tell; None where nothing does, or where another domain left it there."""
    path = folder / _FAMILIARITY
    if not path.exists():
        return None
    tensors, header = unpack(path, _KIND, "part of a domain")
    if header.get("encoder") != file_digest(folder / "encoder.safetensors"):
        return None
    shapes = {name: tensors[name].shape for name in tensors}
    size = shapes.get("mean", ())
    if shapes != {"mean": size, "precision": 2 * size, "limit": (1,)} or len(size) != 1:  # a file has no number without an axis
        raise UserError(f"{path} lacks what it was written with; {_MEND}.")
    return Familiarity(**{**tensors, "limit": tensors["limit"].reshape(())})


def _base_of(folder: Path, record: dict[str, Any]) -> str:
    beside = record.get("base_beside")
    if beside and not os.path.isdir(record["base"]) and os.path.isdir(folder / beside):
        return str(folder / beside)
    return record["base"]


def _image_encoder_of(path: Path, name: str | None) -> str | None:
    """One that came with the domain lies in its folder; a name never leads out of it."""
    if name is None:
        return None
    inside = path.parent / name
    if re.fullmatch(r"[\w-]+", name) and inside.is_dir():
        return str(inside)
    if name.startswith("random:") or Path(name).is_absolute() or (re.fullmatch(_HUB_ID, name) and ".." not in name):
        return name
    raise UserError(f"{path}: image_encoder = {name!r} is neither a folder of the domain nor a Hub id; make the domain again.")
