"""Model folders by name: a local folder, or a Hub id, taken from the cache where it is there and fetched once where not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from e4t_jax.errors import UserError

# What a base and an image encoder are read from; safety checkers and whole-model checkpoints stay where they are.
BASE_FILES = ("model_index.json", *(f"{part}/*" for part in ("scheduler", "tokenizer", "unet", "vae", "text_encoder")))
IMAGE_ENCODER_FILES = ("config.json", "model*.safetensors*", "pytorch_model*.bin*")


def find_folder(name: str | Path, flag: str, files: Sequence[str] = BASE_FILES) -> Path:
    """The folder `name`, or the snapshot of the Hub's repository of that name; `files` are its patterns to fetch.

    Errors: `UserError` when it is neither, or not in the cache and out of reach.
    """
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
        raise UserError(f"{flag} {name}: no such folder, and not a Hub id such as owner/model; check the spelling.")
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(files), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        # Weights come in several formats beside each other; one is enough.
        skip = ["*.bin", "*.msgpack", "*.ckpt", "*.onnx*", "*non_ema*"]
        folder = Path(snapshot_download(str(name), allow_patterns=list(files), ignore_patterns=skip))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(
            f"{flag} {name} is neither a folder nor in the Hub's cache, and could not be fetched ({reason}); "
            "check the name and the connection, or give a folder."
        ) from None
    return folder
