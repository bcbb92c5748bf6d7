"""From prompts with a placeholder to token ids, and the concept's word embedding in the placeholder's stead.

A prompt such as "a photo of *s in the snow" becomes n token ids. At the placeholder stands the id of the
domain token ("face"), and the concept's embedding e* takes the place of that token's word embedding
(E4T, arXiv 2302.12228, as textual inversion does, arXiv 2208.01618):

    words_j = e*                        where placeholder_j
    words_j = embedding(ids_j)          elsewhere

This happens *before* position embeddings are added: e* is a word like any other, and may stand anywhere.
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from e4t_jax.arrays import Array
from e4t_jax.errors import UserError, shortened

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

PLACEHOLDER = "*s"
_WORD_END = "</w>"  # of a token that ends a word
_LONGEST = 60  # letters of a text that near words are looked for of
# What other tools read as weights, schedules or files in a prompt.
_OTHER_SYNTAX = re.compile(
    r"""\([^()]*[^\d\s()]\s*:\s*\d?\.?\d+\s*\)                 # (word:1.3): A1111, ComfyUI
    | \(\([^()]+\)\)                                          # ((word)): A1111
    | \([^()]*\)(?:\++|-+|\d*\.\d+)(?=[\s,.)]|$)              # (some words)+ and (some words)1.3: compel
    | [^\s,()]+(?:\+\+|--)(?=[\s,.)]|$)                       # word++ and word--: compel
    | \[[^\[\]]*:\s*\d*\.?\d+\s*\] | \[[^\[\]|]*\|[^\[\]]*\]  # [from:to:0.5] and [one|other]: A1111
    | <(?:lora|lyco|hypernet|ti):[^<>]*> | \bembedding:\S+    # files: A1111, SD.Next; ComfyUI
    """,
    re.VERBOSE,
)


class TokenizedPrompts(NamedTuple):
    """Token ids, padded, and where among them the concept's word goes."""

    ids: Int[np.ndarray, "batch length"]
    placeholder: Bool[np.ndarray, "batch length"]


def domain_token_id(tokenizer: "CLIPTokenizer", token: str) -> int:
    """The id of the domain token, whose word embedding e_d is where every concept starts.

    Errors: `UserError` when the tokenizer does not hold the word as ONE token.
    """
    ids = _ids(tokenizer, token)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = ", ".join(tokenizer.convert_ids_to_tokens(ids[:8])) or "nothing"
        near = near_words(tokenizer, token)
        mend = f"near it {'is' if len(near) == 1 else 'are'} {', '.join(near)}" if near else "choose a more common word"
        raise UserError(f"{shortened(token)} is not one token of this tokenizer (it reads {pieces}); {mend}.", "domain_token")
    return ids[0]


def near_words(tokenizer: "CLIPTokenizer", text: str, most: int = 4) -> list[str]:
    """Words that are one token each: those of the text itself, and those spelled most like it.

    Args:
        tokenizer: Whose vocabulary is searched.
        text: What is not one token.
        most: How many at most.

    Errors: none.
    """
    whole = {word.removesuffix(_WORD_END) for word in tokenizer.get_vocab() if word.endswith(_WORD_END)}
    whole = {word for word in whole if word.isalpha() and len(word) > 2}
    own = re.findall(r"\w+", text.lower()[:_LONGEST])
    # Of one first letter: what ends other words is a token too.
    alike = [near for word in own for near in get_close_matches(word, [w for w in sorted(whole) if w[0] == word[0]], most, 0.7)]
    return list(dict.fromkeys([*(word for word in own if word in whole), *alike]))[:most]


def check_placeholder(tokenizer: "CLIPTokenizer", placeholder: str) -> None:
    """Makes sure that the placeholder is a word the tokenizer does not know: it means the concept alone.

    Errors: `UserError` when it is empty, holds white space, or is a single token of the vocabulary already.
    """
    if not placeholder or re.search(r"\s", placeholder):
        raise UserError(f"The placeholder {placeholder!r} must be one word, such as {PLACEHOLDER!r}.")
    ids = _ids(tokenizer, placeholder)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        raise UserError(
            f"The placeholder {placeholder!r} is a word of the vocabulary already; choose another, such as {PLACEHOLDER!r}."
        )


def tokenize(
    tokenizer: "CLIPTokenizer",
    prompts: Sequence[str],
    *,
    placeholder: str = PLACEHOLDER,
    domain_token: str,
    require_placeholder: bool = True,
) -> TokenizedPrompts:
    """Token ids `[BOS, …, EOS, PAD, …]` of length `tokenizer.model_max_length`, the placeholders marked.

    The pieces of the prompt around the placeholder are tokenised apart, so no tokenizer ever has to learn it.

    Errors: `UserError` for a prompt that is too long (cut, it might lose its placeholder), for one without
    the placeholder when `require_placeholder`, and for a placeholder or a domain token that will not do.
    """
    check_placeholder(tokenizer, placeholder)
    domain_id = domain_token_id(tokenizer, domain_token)
    length = tokenizer.model_max_length
    ids = np.full((len(prompts), length), tokenizer.pad_token_id, np.int32)
    marks = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        pieces = _split(prompt, placeholder)
        if require_placeholder and len(pieces) == 1:
            raise UserError(f"The prompt {shortened(prompt)} lacks the placeholder; write {placeholder!r} in it.")
        tokens, places = [tokenizer.bos_token_id], []
        for piece in pieces:
            tokens += _ids(tokenizer, piece)
            places.append(len(tokens))
            tokens.append(domain_id)
        # One placeholder fewer than pieces: the last one written is where the prompt ends.
        tokens[places.pop()] = tokenizer.eos_token_id
        if len(tokens) > length:
            raise UserError(f"The prompt {shortened(prompt)} has {len(tokens) - 2} tokens, the limit is {length - 2}; shorten it.")
        ids[row, : len(tokens)] = tokens
        marks[row, places] = True
    return TokenizedPrompts(ids, marks)


def other_syntax(prompts: Sequence[str]) -> str | None:
    """The first piece of these prompts that other tools read as a weight or a file, and that is plain text here; None without one.

    "(*s:1.3)", "*s++", "[a:b:0.5]", "<lora:x:1>": the syntaxes of A1111, ComfyUI and compel.
    """
    found = (match[0] for prompt in prompts for match in _OTHER_SYNTAX.finditer(prompt))
    return next(found, None)


def inject(
    words: Float[Array, "batch length width"],
    placeholder: Bool[Array, "batch length"],
    concept_word: Float[Array, "batch width"],
) -> Float[Array, "batch length width"]:
    """Puts e* in the placeholder's place, before position embeddings: words_j ← e* where placeholder_j."""
    return jnp.where(placeholder[..., None], concept_word[:, None, :].astype(words.dtype), words)


def _split(prompt: str, placeholder: str) -> list[str]:
    """The pieces of the prompt around the placeholder, a word of its own: there is no "*s" in "*sun"."""
    before = r"(?<!\w)" if re.match(r"\w", placeholder[0]) else ""
    after = r"(?!\w)" if re.match(r"\w", placeholder[-1]) else ""
    # CLIP's tokenizer does not tell upper from lower case, so neither does the placeholder.
    return re.split(before + re.escape(placeholder) + after, prompt, flags=re.IGNORECASE)


def _ids(tokenizer: "CLIPTokenizer", text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # what is too long is said here
