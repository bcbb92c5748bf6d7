"""A domain on disk: domain.json, encoder.safetensors, offsets.safetensors, written and read as one thing.

domain.json names the base, and holds the checksums of the two others and the base's fingerprint: files of two domains do not mix.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from e4t_jax import registry
from e4t_jax.bases import CLIP_FEATURES, Params, load_base
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.ranges import check_range
from e4t_jax.storage import FORMAT, digest, file_digest, fingerprint, pack, read_json, to_json, unpack, write_files

_KIND = "e4t domain"
_TENSORS = ("encoder", "offsets")
_OPTIONS: dict[str, type | tuple[type, ...]] = {
    "scale": (int, float),
    "regularisation": (int, float),
    "guidance": (int, float),
    "template": str,
    "image_encoder": (str, type(None)),
    "clip_features": str,
}
_PARTS = ("vae", "unet", "text_encoder", "image_encoder")
_HUB_ID = r"[\w-][\w.-]*/[\w.-]+"


def save_domain(folder: str | Path, domain: Domain, dtype: Any = np.float16) -> None:
    """Writes the three files: all of them, or none.

    Errors: `UserError` when they cannot be written.
    """
    folder = Path(folder)
    contents: dict[Path, bytes | str] = {}
    for name, tree in zip(_TENSORS, (domain.encoder, domain.factors), strict=True):
        flat = {key: np.asarray(leaf, dtype) for key, leaf in flatten_dict(tree, sep="|").items()}
        contents[folder / f"{name}.safetensors"] = pack(flat, {"kind": _KIND})
    facts = {name: getattr(domain, name) for name in _OPTIONS}
    facts |= {"format": FORMAT, "base": domain.base_name, "domain_token": domain.domain_token}
    facts["base_fingerprint"] = base_fingerprint(domain.params)
    facts["digests"] = {path.name: digest(content) for path, content in contents.items() if isinstance(content, bytes)}
    if Path(domain.base_name).is_dir() and not registry.find("base", domain.base_name):
        # Found from any folder, and after both were moved together.
        facts["base"] = str(Path(domain.base_name).absolute())
        facts["base_beside"] = os.path.relpath(facts["base"], folder.absolute())
    contents[folder / "domain.json"] = to_json(facts)
    write_files(contents)


def base_fingerprint(params: Params) -> str:
    """The fingerprint of all four parts of a base."""
    return fingerprint(*(params[part] for part in _PARTS))


def load_domain(name: str | Path = "creatures") -> Domain:
    """A domain by name ("creatures", shipped with the package) or folder.

    Errors: `UserError` for a folder that is missing, damaged, of a newer format, or whose base has other weights.
    """
    shipped = registry.find("domain", str(name))
    folder = shipped() if shipped else Path(name)
    path = folder / "domain.json"
    if not path.exists():
        known = ", ".join(registry.names("domain"))
        raise UserError(f"{path} does not exist; give a folder that pretraining wrote, or {known}.", "domain")
    facts = read_json(path, "make or copy the domain again")
    options = _read_options(path, facts)
    for part in _TENSORS:
        promised = facts.get("digests", {}).get(f"{part}.safetensors")
        file = folder / f"{part}.safetensors"
        if promised and file.exists() and file_digest(file) != promised:
            raise UserError(f"{file} is not the one that {path.name} was written with; make or copy the domain again.")
    encoder, factors = (
        unflatten_dict(
            {key: jnp.asarray(leaf, jnp.float32) for key, leaf in tensors.items()},
            sep="|",
        )
        for tensors, _ in (unpack(folder / f"{part}.safetensors", _KIND, "part of a domain") for part in _TENSORS)
    )
    base, params = load_base(_base_of(folder, facts), _image_encoder_of(path, options["image_encoder"]))
    found = base_fingerprint(params) if facts["format"] > 1 else fingerprint(params["unet"], params["text_encoder"])
    if facts["base_fingerprint"] != found:
        raise UserError(f"{name} was pretrained on other weights than {facts['base']} holds now; pretrain it again.", "domain")
    return Domain(facts["base"], facts["domain_token"], base, params, encoder, factors, **options)


def _read_options(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The domain's settings, each there and of its type."""
    mend = "make or copy the domain again"
    kinds = {**_OPTIONS, "format": int, "base": str, "domain_token": str, "base_fingerprint": str}
    if "format" in facts and isinstance(facts["format"], int) and facts["format"] > FORMAT:
        raise UserError(f"{path} has format {facts['format']}, this version reads up to {FORMAT}; update e4t-jax.")
    for name, kind in kinds.items():
        if name not in facts:
            raise UserError(f"{path} lacks {name!r}; {mend}.")
        if not isinstance(facts[name], kind) or isinstance(facts[name], bool):
            raise UserError(f"{path}: {name} = {facts[name]!r} is of the wrong kind; {mend}.")
        try:
            check_range(name, facts[name])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    if not isinstance(facts.get("digests", {}), dict):
        raise UserError(f"{path}: digests = {facts['digests']!r} is of the wrong kind; {mend}.")
    if facts["clip_features"] not in CLIP_FEATURES:
        raise UserError(f"{path}: clip_features = {facts['clip_features']!r} is unknown; update e4t-jax.")
    return {name: facts[name] for name in _OPTIONS}


def _base_of(folder: Path, facts: dict[str, Any]) -> str:
    beside = facts.get("base_beside")
    if beside and not Path(facts["base"]).is_dir() and (folder / str(beside)).is_dir():
        return str(folder / str(beside))
    return facts["base"]


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
