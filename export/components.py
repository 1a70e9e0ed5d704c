"""A diffusers folder's components as torch modules, one at a time. Knows no ONNX."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reelrt.errors import ModelError
from reelrt.export.folder import ModelFolder

TOKENIZER_PROBES = (
    "",
    "a red circle moving right on a black background",
    "It's 3 O'Clock, naïve CAFÉ — don't!  (100%)",
)


@contextmanager
def loaded(model: ModelFolder, component: str, precision: str) -> Iterator[Any]:
    """A component in evaluation mode; weights stay mapped from the file where their type agrees.

    Args:
        model: The folder.
        component: `text_encoder`, `unet` or `vae`.
        precision: `fp32` or `fp16`.

    Yields:
        The module. The caller drops its own references before the block ends.

    Raises:
        ModelError: The weights do not fit the configuration.
    """
    import diffusers
    import torch
    import transformers

    name, variant = model.classes[component], model.variants[component]
    library = diffusers if hasattr(diffusers, name) else transformers
    dtype = torch.float16 if precision == "fp16" else torch.float32
    folder = model.path / component
    keyword = "dtype" if library is transformers else "torch_dtype"
    options: dict[str, Any] = {keyword: dtype, "variant": variant or None, "use_safetensors": True}
    with _quiet():
        try:
            module, info = getattr(library, name).from_pretrained(
                folder, output_loading_info=True, local_files_only=True, **options
            )
        except (OSError, RuntimeError, ValueError, TypeError, KeyError, NotImplementedError) as error:
            raise ModelError(f"{folder} cannot be loaded as a {name}: {_reason(error)}.") from error
    missing = sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])])
    if missing:
        raise ModelError(
            f"{folder} lacks weights for {len(missing)} of its parameters, {missing[0]} among them.",
            "Download the model again.",
        )
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(
                f"{folder}: the weight {name} is not finite as {precision}.",
                "Download the model again, or export it with `--precision fp32`.",
            )
    module.eval().requires_grad_(False)
    try:
        yield module
    finally:
        del module
        gc.collect()


def load_scheduler(model: ModelFolder) -> Any:
    """The model's own scheduler.

    Raises:
        ModelError: diffusers has no such class, or refuses its configuration.
    """
    import diffusers

    name = model.classes["scheduler"]
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ModelError(f"{model.path}: this version of diffusers has no scheduler {name}.")
    try:
        with _quiet():
            return kind.from_pretrained(model.path / "scheduler", local_files_only=True)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"{model.path / 'scheduler'} cannot be loaded: {_reason(error)}.") from error


def write_tokenizer(model: ModelFolder, path: Path) -> tuple[Any, int]:
    """Write `tokenizer.json`, and check that it gives the same ids as the model's tokenizer.

    Returns:
        The tokenizer, and the length of a tokenised prompt.

    Raises:
        ModelError: The tokenizer cannot be loaded, or its `tokenizer.json` disagrees with it.
    """
    import tokenizers
    from transformers import CLIPTokenizer

    folder = model.path / "tokenizer"
    try:
        with _quiet():
            own = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises no other
        raise ModelError(
            f"{folder} cannot be loaded: {_reason(error)}.", "Download the model again."
        ) from error
    text = own.backend_tokenizer.to_str(pretty=True)
    path.write_text(text, encoding="utf-8")
    written = tokenizers.Tokenizer.from_str(text)
    written.no_padding()
    written.no_truncation()
    for text in TOKENIZER_PROBES:
        ids = [own.bos_token_id, *written.encode(text, add_special_tokens=False).ids, own.eos_token_id]
        if ids != own(text).input_ids:
            raise ModelError(f"{folder} cannot be exported: tokenizer.json gives other ids for {text!r}.")
    config = model.config("text_encoder")
    return own, min(int(own.model_max_length), int(config.get("max_position_embeddings", 77)))


def _reason(error: Exception) -> str:
    """What a library says, in a line: the first, and the next where that is a heading."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings and progress bars: what matters becomes a ModelError."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level, bar in zip(libraries, levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
