"""Prompts become the ids that transformers' CLIPTokenizer gives, and what is cut is said."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from reelrt.bundle.manifest import Model, Pipeline
from reelrt.bundle.spec import Geometry
from reelrt.errors import IntegrityError
from reelrt.runtime.text import TextEncoder, Tokenizer

LENGTH = 12
PROMPTS = [
    "",
    "a red circle",
    "A RED   Circle\tmoving\nright",
    "red, circle; (moving)!",
    "the dog's 42 balls",
    "na\u00efve caf\u00e9 \u4e2d\u6587 \U0001f600",
    "e\u0301 \u00e9",
    "a " * 40,
    "red circle <|endoftext|> red",
    " ".join(["red", "circle"] * 5),
    " ".join(["red", "circle"] * 5) + " red",
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("c", "i"), ("ci", "r"), ("cir", "c"), ("circ", "l")]
    merges += [("circl", "e</w>"), ("i", "n"), ("in", "g</w>"), ("m", "o"), ("mo", "v")]
    symbols = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH, pad_token="!")


@pytest.fixture(scope="module")
def pipeline(reference):
    return Pipeline(
        Model("m", "unet3d", "0"),
        Geometry(4, 8, 8, LENGTH, 16, 3, 16, 64, 64),
        "split",
        "ddim",
        7.5,
        start_token=reference.bos_token_id,
        end_token=reference.eos_token_id,
        pad_token=reference.pad_token_id,
    )


@pytest.fixture(scope="module")
def tokenizer(reference, pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "tokenizer.json"
    reference(["red", "circle"], padding="max_length", truncation=True)  # leaves its mark in the file
    reference.backend_tokenizer.save(str(path))
    return Tokenizer(path, pipeline)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_same_ids_as_transformers(tokenizer, reference, prompt):
    expected = reference(prompt, padding="max_length", max_length=LENGTH, truncation=True).input_ids
    ids = tokenizer(prompt).ids
    assert ids.dtype == np.int64
    assert ids.tolist() == expected


@pytest.mark.parametrize(
    ("prompt", "cut"),
    [
        ("red " * 10, ""),
        ("red " * 10 + "circle moving", "circle moving"),
        ("red " * 9 + "moving right", "moving right"),  # `mov` would fit, `ing` would not
        ("red " * 10 + "\u4e2d\u6587!", "\u4e2d\u6587!"),
        ("red " * 10 + "   ", ""),
    ],
)
def test_what_is_cut_is_named(tokenizer, prompt, cut):
    assert tokenizer(prompt).cut == cut


def test_a_broken_file_is_named(tmp_path, pipeline):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": ')
    with pytest.raises(IntegrityError, match="tokenizer.json cannot be read"):
        Tokenizer(path, pipeline)
    with pytest.raises(IntegrityError, match="tokenizer.json cannot be read"):
        Tokenizer(tmp_path / "missing" / "tokenizer.json", pipeline)


class Encoder:
    """Stands for the text encoder's engine: the ids themselves, as floats."""

    def __init__(self):
        self.batches = []

    def run(self, stage, inputs):
        assert stage == "text_encoder"
        self.batches.append(len(inputs["tokens"]))
        return {"text": inputs["tokens"][..., None].astype(np.float32)}


def test_prompts_are_encoded_once_and_alone(tokenizer):
    engine = Encoder()
    encode = TextEncoder(tokenizer, engine)
    red, _ = encode("a red circle")
    again, _ = encode("a red circle")
    other, _ = encode("a circle")
    assert engine.batches == [1, 1]
    assert red is again
    assert not np.array_equal(red, other)
    with pytest.raises(ValueError, match="read-only"):
        red[0] = 0


def test_what_is_cut_is_said_every_time(tokenizer):
    encode = TextEncoder(tokenizer, Encoder())
    for _ in range(2):
        assert encode("red " * 10 + "circle moving")[1] == "circle moving"
        assert encode("red")[1] == ""


def test_the_cache_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr("reelrt.runtime.text.CACHED_PROMPTS", 2)
    engine = Encoder()
    encode = TextEncoder(tokenizer, engine)
    for prompt in ("a", "b", "a", "c", "a", "b"):
        encode(prompt)
    assert len(engine.batches) == 4  # a b c, and b once more
