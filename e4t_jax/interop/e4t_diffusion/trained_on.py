"""Which base a checkpoint was trained on, and whether the one given is it: several have the same geometry, 1.4 and 1.5 among them.

By name, where the names are Hub ids or a folder tells its own; of a tuned checkpoint with a whole U-Net, by its weights too:

    rms(W_tuned − W_base) ≤ 3/2 · steps · rate + 2⁻¹¹ rms(W_base)     AdamW moves a weight by about the rate in a step
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from e4t_jax import bases, registry
from e4t_jax.bases.hub import current_name, hub_id_of, is_hub_id
from e4t_jax.errors import UserError, shortened
from e4t_jax.interop.e4t_diffusion.settings import CheckpointSettings
from e4t_jax.interop.e4t_diffusion.tensors import State

_SLACK = 1.5
_HALF = 2.0**-11  # relative rounding of half precision, which a base's files may have


def default_base(file: Path, settings: CheckpointSettings) -> str:
    """The base that a checkpoint's settings, in `file`, name.

    Errors: `UserError` where they name none, or a folder that is not here.
    """
    if settings.base is None:
        raise UserError(f"{file} names none; give the base it was trained on.", "base")
    if not (Path(settings.base).is_dir() or is_hub_id(settings.base)):
        raise UserError(f"{file} names {shortened(settings.base)}, which is not here; give the base it was trained on.", "base")
    return current_name(settings.base)


def difference_by_name(settings: CheckpointSettings, base: str) -> str | None:
    """One line where the base given is another than the checkpoint was trained on, or nothing tells; None where it is the same."""
    named = settings.base
    if named is None:
        return f"Its config.json does not say which base it was trained on; {base} is taken."
    if not is_hub_id(named):  # a folder of its trainer
        if Path(named).name == Path(base).name:
            return None
        return f"It was trained on the folder {shortened(named)}; nothing tells whether {base} holds the same weights."
    known = _ids_of(base)
    if current_name(named) in known:
        return None
    if not known:
        return f"It was trained on {named}; nothing in {base} tells whether it holds the same weights."
    return f"It was trained on {named}, and {min(known)} is given: other weights of the same geometry, it will draw worse."


def _ids_of(base: str) -> set[str]:
    """The Hub ids, as they are today, that a base has or tells of itself."""
    if registry.find("base", base) is not None:
        return {base}
    folder = Path(base)
    if not folder.is_dir():
        return {current_name(base)} if is_hub_id(base) else set()
    told = {hub_id_of(folder)}
    for file in (folder / "model_index.json", folder / "unet" / "config.json"):
        if file.exists():
            told.add(bases.read_json(file).get("_name_or_path"))
    return {current_name(one) for one in told if isinstance(one, str) and is_hub_id(one) and not Path(one).is_dir()}


def difference_by_weights(settings: CheckpointSettings, unet: State, base: str) -> str | None:
    """One line where a tuned U-Net is farther from the base's than its tuning can have moved it; None where it is not.

    Errors: `UserError` for a base that cannot be read.
    """
    weights = bases.open_weights(bases.base_folder(base) / "unet", "unet")
    squares = size = count = 0.0
    for name in sorted(set(weights.read) & set(unet)):
        ours, theirs = np.asarray(weights.read[name](), np.float32), unet[name]
        if ours.shape == theirs.shape:
            squares += float(np.square(theirs - ours, dtype=np.float64).sum())
            size += float(np.square(ours, dtype=np.float64).sum())
            count += ours.size
    if not count:
        return None
    apart, most = (squares / count) ** 0.5, _SLACK * settings.moved + _HALF * (size / count) ** 0.5
    if not apart > most:
        return None
    trained_on = f"it was trained on {shortened(settings.base)}" if settings.base else "give the base it was trained on"
    return f"Its U-Net is {apart:.2g} (rms) from that of {base}, and its tuning moved it by {most:.2g} at most: {trained_on}."
