"""Prompts to embeddings: CLIP tokenisation, the text encoder, and a cache of what it said.

Knows nothing of guidance or pictures. Several threads may encode at once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reelrt.bundle.manifest import Pipeline
from reelrt.errors import IntegrityError
from reelrt.runtime.ranges import span
from reelrt.runtime.session import Array, Sessions

CACHED_PROMPTS = 256


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """A tokenised prompt.

    Attributes:
        ids: start, the prompt, end, padding; int64 [L].
        cut: The words at the end of the prompt that did not fit, or "".
    """

    ids: npt.NDArray[np.int64]
    cut: str


class Tokenizer:
    """Prompts to token ids of fixed length, as the model's own tokenizer gives them.

    Args:
        path: `tokenizer.json`.
        pipeline: Length and special tokens.

    Raises:
        IntegrityError: The file cannot be read.
    """

    def __init__(self, path: Path, pipeline: Pipeline) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise IntegrityError(f"{path} cannot be read: {error}.", "Build this folder again.") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._pipeline = pipeline

    def __call__(self, prompt: str) -> Tokens:
        """Tokenise one prompt; one that is too long loses its end."""
        pipeline, room = self._pipeline, self._pipeline.geometry.tokens - 2
        encoding = self._tokenizer.encode(prompt, add_special_tokens=False)
        ids = np.full(room + 2, pipeline.pad_token, np.int64)
        kept = encoding.ids[:room]
        ids[: len(kept) + 2] = pipeline.start_token, *kept, pipeline.end_token
        if len(encoding.ids) == len(kept):
            return Tokens(ids, "")
        begin = encoding.offsets[room][0]
        while begin and not prompt[begin - 1].isspace():
            begin -= 1  # a word that is half gone is named whole
        return Tokens(ids, prompt[begin:].strip())


class TextEncoder:
    """Prompt embeddings, each computed once.

    Every prompt is encoded alone, so that its embedding never depends on its company.

    Attributes:
        hits: Prompts that were there already.
        misses: Prompts that were encoded.

    Args:
        tokenizer: Prompts to ids.
        sessions: Where `text_encoder` runs.
    """

    def __init__(self, tokenizer: Tokenizer, sessions: Sessions) -> None:
        self._tokenizer, self._sessions = tokenizer, sessions
        self._looking = threading.Lock()
        self._cache: OrderedDict[str, tuple[Array, str]] = OrderedDict()
        self.hits = self.misses = 0

    def __call__(self, prompt: str) -> tuple[Array, str]:
        """Encode one prompt.

        Returns:
            Its embeddings [L, D] in the encoder's precision, not to be written to; and the words
            that were cut, or "".
        """
        with self._looking:
            found = self._cache.get(prompt)
            self.hits += found is not None
            self.misses += found is None
            if found is not None:
                self._cache.move_to_end(prompt)
                return found
        tokens = self._tokenizer(prompt)
        with span("text_encoder"):
            text = self._sessions.run("text_encoder", {"tokens": tokens.ids[None]})["text"][0]
        text.flags.writeable = False
        with self._looking:
            self._cache[prompt] = text, tokens.cut
            if len(self._cache) > CACHED_PROMPTS:
                self._cache.popitem(last=False)
        return text, tokens.cut
