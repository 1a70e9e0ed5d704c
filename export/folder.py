"""A diffusers folder on disk: what it says it is, its components, its card.

Checks everything that can be checked before a weight is read. Knows no ONNX.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelrt.bundle.files import sha256
from reelrt.errors import ModelError
from reelrt.export.families import FAMILIES, Family

INDEX = "model_index.json"
CARD = "README.md"
HASHED = (".json", ".safetensors", ".txt")
NOT_WEIGHTS = ("tokenizer", "scheduler")
VARIANTS = ("", "fp16")
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Either of these is a whole tokenizer."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A diffusers folder whose classes and weight files were checked.

    Attributes:
        path: The folder.
        family: Its model family.
        classes: Component to class name.
        variants: Component to the variant of its weight files, "" for none.
        card: The front matter of its model card.
    """

    path: Path
    family: Family
    classes: Mapping[str, str]
    variants: Mapping[str, str]
    card: Mapping[str, Any]

    @property
    def licence(self) -> str:
        """The licence's name as the model card gives it, or ""."""
        return str(self.card.get("license") or "")

    def parameter(self, name: str, default: float) -> float:
        """A default of requests as the model card gives it (`inference: parameters:`).

        Raises:
            ModelError: The card gives no number.
        """
        inference = self.card.get("inference")
        parameters = inference.get("parameters") if isinstance(inference, dict) else None
        value = parameters.get(name, default) if isinstance(parameters, dict) else default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelError(f"{self.path / CARD} gives {value!r} as {name}, which is no number.")
        return value

    def config(self, component: str) -> dict[str, Any]:
        """A component's `config.json`.

        Raises:
            ModelError: It cannot be read.
        """
        return _json(self.path / component / "config.json")

    def sha256(self) -> str:
        """One hash over the names and hashes of the configuration and weight files."""
        files = [self.path / INDEX]
        for component in self.classes:
            files += (path for path in (self.path / component).rglob("*") if path.suffix in HASHED)
        digest = hashlib.sha256()
        for path in sorted(files):
            digest.update(f"{path.relative_to(self.path).as_posix()} {sha256(path)}\n".encode())
        return digest.hexdigest()

    def papers(self) -> list[Path]:
        """The model card and licence files."""
        names = ("readme", "licence", "license", "notice")
        return [path for path in self.path.iterdir() if path.is_file() and path.stem.lower() in names]


def open_folder(path: Path) -> ModelFolder:
    """Read a diffusers folder's index and check its components.

    Args:
        path: The folder.

    Raises:
        ModelError: Not a diffusers folder, a pipeline or component of a class we do not export, or
            a weight file that is missing or damaged.
    """
    if not path.is_dir():
        raise ModelError(f"{path} is not a folder.", "Name the folder of a diffusers model.")
    if not (path / INDEX).is_file():
        raise ModelError(f"{path} has no {INDEX}.", "Name the folder of a diffusers model.")
    index = _json(path / INDEX)
    pipeline = index.get("_class_name")
    family = FAMILIES.get(str(pipeline))
    if family is None:
        known = ", ".join(FAMILIES)
        raise ModelError(
            f"{path} is a {pipeline or 'model of no class'}, which cannot be exported.",
            f"Supported is {known}.",
        )
    classes = {name: _class(path, index, name, wanted) for name, wanted in family.components.items()}
    weighty = [name for name in classes if name not in NOT_WEIGHTS]
    for component in classes:
        if not (path / component).is_dir():
            raise ModelError(f"{path} has no folder {component}.", "Download the model again.")
    _json(path / "scheduler" / "scheduler_config.json")
    for component in weighty:
        _json(path / component / "config.json")
    if not any(all((path / "tokenizer" / name).is_file() for name in names) for names in TOKENIZER_FILES):
        raise ModelError(f"{path / 'tokenizer'} holds no tokenizer.", "Download the model again.")
    variants = {component: _check_weights(path / component) for component in weighty}
    return ModelFolder(path, family, classes, variants, _card(path / CARD))


def _class(path: Path, index: Mapping[str, Any], component: str, wanted: str) -> str:
    entry = index.get(component)
    if not (isinstance(entry, list) and len(entry) == 2 and entry[1]):
        raise ModelError(f"{path / INDEX} names no {component}.")
    if wanted and entry[1] != wanted:
        raise ModelError(f"{path}: {component} is a {entry[1]}; only {wanted} can be exported.")
    return str(entry[1])


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing.", "Download the model again.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", "Download the model again.") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds no JSON object.", "Download the model again.")
    return data


def _check_weights(folder: Path) -> str:
    """Find a component's weight files and check each one's length; returns their variant."""
    names = ("model", "diffusion_pytorch_model")
    for variant in VARIANTS:
        suffix = f".{variant}" if variant else ""
        for name in names:
            whole = folder / f"{name}{suffix}.safetensors"
            index = folder / f"{name}.safetensors.index{suffix}.json"
            if index.is_file():
                shards = _json(index).get("weight_map")
                files = [folder / str(file) for file in sorted(set(dict(shards or {}).values()))]
            elif whole.is_file():
                files = [whole]
            else:
                continue
            for file in files:
                _check_safetensors(file)
            return variant
    if any(folder.glob("*.bin")):
        raise ModelError(
            f"{folder} holds its weights as pickled .bin files only, which are not loaded.",
            "Save the model with safe_serialization=True.",
        )
    raise ModelError(f"{folder} has no safetensors weights.", "Download the model again.")


def _check_safetensors(path: Path) -> None:
    """A safetensors file says in its header how long it is."""
    if not path.is_file():
        raise ModelError(f"{path} is missing.", "Download the model again.")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        needed = 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(
            f"{path} is damaged: its header cannot be read.", "Download the model again."
        ) from error
    if size != needed:
        raise ModelError(
            f"{path} is damaged: it has {size} bytes, its header says {needed}.", "Download the model again."
        )


def _card(path: Path) -> dict[str, Any]:
    """The YAML front matter of a model card; nothing when there is none."""
    import yaml

    if not path.is_file():
        return {}
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        data = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}
