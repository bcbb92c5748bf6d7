"""The README.md of an export: what each file is, where each tool wants it, and what differs from drawing here."""

from __future__ import annotations

from importlib import metadata

from e4t_jax.interop.model_card import WRITTEN_BY, ModelCard, front_matter

LORA_FILE = "pytorch_lora_weights.safetensors"  # the names that diffusers looks for in a folder
WORD_FILE = "learned_embeds.safetensors"


def lora_readme(card: ModelCard, rank: int, kept: float) -> str:
    """Of a LoRA with its word beside it."""
    files = {
        LORA_FILE: f"the U-Net's change, rank {rank}: it holds {kept:.2%} of the change (1 - relative error²); {_PLACES['lora']}",
        **_word_files(card),
    }
    use = ["pipeline.load_lora_weights(FOLDER)", "pipeline.load_textual_inversion(FOLDER)"]
    return _readme(card, files, ["Both belong together: without its word the change shows little, and the other way round."], use)


def word_readme(card: ModelCard) -> str:
    """Of a word alone."""
    return _readme(card, _word_files(card), [], ["pipeline.load_textual_inversion(FOLDER)"])


def folder_readme(card: ModelCard, added: list[str]) -> str:
    """Of a whole model, whose tokenizer has the words `added`; with none of them, the word lies beside the model."""
    files = {"model_index.json": "the index of a whole model in diffusers' layout: the concept's change is merged into its U-Net"}
    if not added:
        note = "Tokenizer and text encoder are the base's own, so that converters to a single file take the folder."
        return _readme(card, files | _word_files(card), [note], ["pipeline.load_textual_inversion(FOLDER)"], whole=True)
    names = " and ".join(f"`{word}`" for word in added)
    notes = [
        f"Tokenizer and text encoder have {len(added)} more words than the base ({names}). Converters to a single file ask for the "
        "base's own number: for them, write the folder with `--no-add-token`.",
        f"This tokenizer finds `{card.token}` inside of words too: `{card.token}un` is read as `{card.token}` and `un`, where "
        "e4t-jax reads one word that is not the concept. Put a space or a mark behind it.",
    ]
    return _readme(card, files, notes, [], whole=True)


_PLACES = {
    "lora": "into `models/loras` (ComfyUI) or `models/Lora` (A1111, Forge, SD.Next), under any name",
    "word": "into `models/embeddings` (ComfyUI) or `embeddings` (A1111, Forge, SD.Next), or add it to InvokeAI's models",
}


def _word_files(card: ModelCard) -> dict[str, str]:
    return {
        f"{card.name}.safetensors": f"the word, `emb_params` [1, {card.width}]; {_PLACES['word']}",
        WORD_FILE: f"the same word for diffusers, under the name `{card.token}`",
    }


def _readme(card: ModelCard, files: dict[str, str], notes: list[str], use: list[str], *, whole: bool = False) -> str:
    beside = any(name == WORD_FILE for name in files)
    words = [f"`{card.token}` in diffusers"]
    if beside:
        words += [
            f"`{card.name}` in A1111, Forge and SD.Next",
            f"`embedding:{card.name}` in ComfyUI",
            f"`<{card.name}>` in InvokeAI",
        ]
    model = "FOLDER" if whole else f'"{card.base}"'
    code = [
        "import diffusers",
        f"pipeline = diffusers.StableDiffusionPipeline.from_pretrained({model})",
        *use,
        f'pipeline("a photo of {card.token}", guidance_scale={card.guidance:g}).images[0]',
    ]
    licence = card.licence or "not known here; the base's own holds"
    return "\n".join(
        [
            front_matter(card),
            "",
            f"# {card.name}",
            "",
            f"A {card.domain_token}, personalised by E4T (arXiv 2302.12228). Written by `{WRITTEN_BY}` of e4t-jax "
            f"{metadata.version('e4t-jax')}.",
            "",
            "| | |",
            "| --- | --- |",
            f"| base model | {card.base} |",
            f"| licence of the base | {licence} |",
            f"| trigger word | {', '.join(words)} |",
            f"| draw with | {card.advice} |",
            "",
            *(f"* `{name}`: {what}." for name, what in files.items()),
            "",
            *(line for note in notes for line in (note, "")),
            "The word is constant here: the mean of the words that e4t-jax predicts over all timesteps, 25 of DDIM in four of the "
            "domain's prompts. e4t-jax itself predicts it anew at every step: compare a picture or two.",
            "",
            "```python",
            *code,
            "```",
            "",
        ]
    )
