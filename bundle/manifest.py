"""The manifests of a bundle and of an engine set, and the folders they describe.

A bundle is what `reelrt export` writes: one ONNX graph per stage, schedules, tokenizer. An
engine set is what `reelrt build` makes of it for one device. Knows neither ONNX nor TensorRT.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TypeVar

from reelrt.bundle.files import OWN, hash_folder, sha256, verify
from reelrt.bundle.schedule import CFGS, Cfg, Schedules
from reelrt.bundle.spec import Geometry, Range, StageSpec, is_whole
from reelrt.errors import IntegrityError

SCHEMA = 1
MANIFEST = "manifest.json"
SCHEDULES = "schedules.safetensors"
TOKENIZER = "tokenizer.json"
PREFIX = ".prefix"
"""What follows an engine file's name in that of its first part, where a step engine has two."""
MAX_STEPS = 100
STAGES = ("text_encoder", "step", "vae_decoder")


@dataclass(frozen=True, slots=True)
class Model:
    """The diffusers folder that everything came from.

    Attributes:
        name: The folder's name.
        family: `unet3d`, ...
        sha256: Hash over the hashes of its weight and configuration files.
        licence: SPDX name, or empty when the folder does not say.
        weight_bytes: Size of the exported stages' weights.
    """

    name: str
    family: str
    sha256: str
    licence: str = ""
    weight_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What a bundle and the engine sets built from it share.

    Attributes:
        model: Where the weights come from.
        geometry: The sizes no request can change.
        cfg: How guidance is computed in the step graph.
        solver: The model's own solver, used when a request names none.
        guidance: The model's own guidance scale, used when a request names none.
        pad_token: Token id that fills a prompt up; `start_token` and `end_token` enclose it.
    """

    model: Model
    geometry: Geometry
    cfg: Cfg
    solver: str
    guidance: float
    start_token: int
    end_token: int
    pad_token: int

    def __post_init__(self) -> None:
        """Refuse what a damaged manifest may hold; raises ValueError."""
        whole = (self.start_token, self.end_token, self.pad_token)
        if not (self.cfg in CFGS and isinstance(self.guidance, int | float) and all(map(is_whole, whole))):
            raise ValueError("cfg, guidance or a token is none")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Pipeline:
        """The inverse of `dataclasses.asdict`."""
        rest = {key: value for key, value in data.items() if key not in ("model", "geometry")}
        return cls(Model(**data["model"]), Geometry(**data["geometry"]), **rest)


@dataclass(frozen=True, slots=True)
class Stage:
    """One exported graph.

    Attributes:
        spec: Its boundary.
        file: ONNX file, relative to the bundle; external data stand beside it.
        precision: `fp32`, `fp16` or `int8`: the type of its weights.
        weight_bytes: Size of its weights.
        keep_fp32: Layers that stay FP32 in an engine of less precision, as the FP16 audit found.
    """

    spec: StageSpec
    file: str
    precision: str
    weight_bytes: int
    keep_fp32: tuple[str, ...] = ()


WEIGHT_STREAMING = "weight streaming"
"""Among the builder flags of an engine's cache key: its weights may stay with the host."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One built engine.

    Attributes:
        spec: Its boundary.
        file: Engine file, relative to the engine set.
        precision: `fp32` or `fp16`, as the graph's types decided.
        profile: The sizes it accepts.
        key: Cache key: the hash of `key_fields`.
        key_fields: Everything the engine depends on, by name.
        weight_bytes: As the builder reports it.
        activation_bytes: As the builder reports it, at the profile's largest sizes; 0 when the
            backend does not say before it runs.
        build_seconds: How long the build took.
        layers: Layer class to precision to `count` and `weight_bytes`, as the built graph's types say;
            empty in engine sets of older versions.
        inspected: Layer type to precision to number of layers, as TensorRT's engine inspector says of
            the finished engine; empty where it was built without a GPU.
    """

    spec: StageSpec
    file: str
    precision: str
    profile: Mapping[str, Range]
    key: str
    key_fields: Mapping[str, str]
    weight_bytes: int
    activation_bytes: int
    build_seconds: float
    layers: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    inspected: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def weight_streaming(self) -> bool:
        """Whether it was built so that its weights may stay with the host."""
        return self.key_fields.get("flags", "").endswith(WEIGHT_STREAMING)


@dataclass(frozen=True, slots=True)
class Bundle:
    """An ONNX bundle on disk; `load` verifies it, `save` writes its manifest."""

    kind: ClassVar[str] = "bundle"

    folder: Path
    pipeline: Pipeline
    stages: Mapping[str, Stage]
    files: Mapping[str, str] = field(default_factory=dict)
    version: str = ""

    @property
    def sha256(self) -> str:
        """What this bundle is: the hash of its manifest file."""
        return sha256(self.folder / MANIFEST)

    @property
    def schedules(self) -> Schedules:
        """The compiled schedules, read from disk."""
        return Schedules.load(self.folder / SCHEDULES)

    def save(self, version: str) -> None:
        """Hash the folder's files and write the manifest beside them."""
        stages = {
            name: {
                "spec": stage.spec.to_json(),
                "file": stage.file,
                "precision": stage.precision,
                "weight_bytes": stage.weight_bytes,
                **({"keep_fp32": list(stage.keep_fp32)} if stage.keep_fp32 else {}),
            }
            for name, stage in self.stages.items()
        }
        _write(self, version, {"pipeline": asdict(self.pipeline), "stages": stages})

    @classmethod
    def load(cls, folder: Path, check: bool = True) -> Bundle:
        """Read a bundle.

        Args:
            folder: The bundle.
            check: Whether to verify every file's hash.

        Raises:
            IntegrityError: Not a bundle, of an unknown schema, or damaged.
        """
        with _complete(folder):
            data = _read(cls, folder, "stages", check)
            stages = {
                name: Stage(
                    **{
                        **stage,
                        "spec": StageSpec.from_json(stage["spec"]),
                        "keep_fp32": tuple(stage.get("keep_fp32", ())),
                    }
                )
                for name, stage in data["stages"].items()
            }
            return cls(folder, Pipeline.from_json(data["pipeline"]), stages, data["files"], data["reelrt"])


@dataclass(frozen=True, slots=True)
class EngineSet:
    """An engine set on disk; `load` verifies it, `save` writes its manifest.

    Attributes:
        folder: Where it is.
        bundle: SHA-256 of the manifest of the bundle it was built from.
        pipeline: As in the bundle.
        backend: `onnxruntime`, `tensorrt_rtx` or `tensorrt`.
        backend_version: The library that built it.
        target: The target's name: `host`, `rtx3060`, ...
        compute_capability: `8.6`, say; empty for a CPU.
        engines: Stage name to engine.
        quality: What the bundle's quality report says of it; see `reelrt.bundle.report.Report.summary`.
            Empty when there was none and none was needed.
        files: Path to hex SHA-256.
    """

    kind: ClassVar[str] = "engines"

    folder: Path
    bundle: str
    pipeline: Pipeline
    backend: str
    backend_version: str
    target: str
    compute_capability: str
    engines: Mapping[str, Engine]
    quality: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    version: str = ""

    @property
    def schedules(self) -> Schedules:
        """The compiled schedules, read from disk."""
        return Schedules.load(self.folder / SCHEDULES)

    @property
    def is_built(self) -> bool:
        """Whether its engines were built; those of a bundle that is run as it is were not."""
        return any(engine.key for engine in self.engines.values())

    def save(self, version: str) -> None:
        """Hash the folder's files and write the manifest beside them."""
        engines = {}
        for name, engine in self.engines.items():
            plain = {key: getattr(engine, key) for key in Engine.__slots__}
            profile = {axis: asdict(extent) for axis, extent in engine.profile.items()}
            engines[name] = {**plain, "spec": engine.spec.to_json(), "profile": profile}
        head = {
            "bundle": self.bundle,
            "backend": self.backend,
            "backend_version": self.backend_version,
            "target": self.target,
            "compute_capability": self.compute_capability,
            "quality": dict(self.quality),
        }
        _write(self, version, {**head, "pipeline": asdict(self.pipeline), "engines": engines})

    @classmethod
    def load(cls, folder: Path, check: bool = True) -> EngineSet:
        """Read an engine set.

        Args:
            folder: The engine set.
            check: Whether to verify every file's hash.

        Raises:
            IntegrityError: Not an engine set, of an unknown schema, or damaged.
        """
        with _complete(folder):
            data = _read(cls, folder, "engines", check)
            if lacking := set(STAGES) - set(data["engines"]):
                raise ValueError(f"{', '.join(sorted(lacking))} is missing")
            engines = {}
            for name, engine in data["engines"].items():
                profile = {axis: Range(**extent) for axis, extent in engine["profile"].items()}
                spec = StageSpec.from_json(engine["spec"])
                if missing := set(spec.axes) - set(profile):
                    raise ValueError(f"the profile of {name} lacks {', '.join(sorted(missing))}")
                engines[name] = Engine(**{**engine, "spec": spec, "profile": profile})
            return cls(
                folder=folder,
                bundle=data["bundle"],
                pipeline=Pipeline.from_json(data["pipeline"]),
                backend=data["backend"],
                backend_version=data["backend_version"],
                target=data["target"],
                compute_capability=data["compute_capability"],
                engines=engines,
                quality=data.get("quality", {}),
                files=data["files"],
                version=data["reelrt"],
            )


def kind_of(folder: Path) -> str:
    """`bundle` or `engines`, as a folder's manifest says; "" where it says nothing, its loader will."""
    try:
        return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["kind"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def check_either(folder: Path) -> None:
    """Refuse a folder that cannot be a bundle or an engine set, where either will do.

    Raises:
        IntegrityError: It is not there, or has no manifest.
    """
    if not (folder / MANIFEST).is_file():
        raise _absent(
            folder, "`reelrt export` and `reelrt calibrate` make bundles, `reelrt build` engine sets"
        )


def _absent(folder: Path, hint: str) -> IntegrityError:
    if not folder.is_dir():
        return IntegrityError(f"there is no folder {folder}.", f"Check the name; {hint}.")
    return IntegrityError(f"{folder} has no {MANIFEST}.", f"Name another folder; {hint}.")


Folder = TypeVar("Folder", Bundle, EngineSet)


def _write(folder: Bundle | EngineSet, version: str, body: Mapping[str, Any]) -> None:
    head = {"schema": SCHEMA, "kind": folder.kind, "reelrt": version}
    data = {**head, **body, "files": hash_folder(folder.folder)}
    (folder.folder / MANIFEST).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _complete(folder: Path) -> Iterator[None]:
    """Name the manifest that lacks an entry or holds one of another kind."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        fault = f"{type(error).__name__}: {error}"
        message = f"{folder / MANIFEST} is incomplete or damaged ({fault})."
        raise IntegrityError(message, "Build this folder again.") from error


def _check_names(folder: Path, files: Mapping[str, str], parts: Mapping[str, Any]) -> None:
    """Refuse a manifest that names files elsewhere, or not all that are used.

    Raises:
        ValueError: The message names the file.
    """
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise ValueError(f"{name!r} is not a file in this folder")
    graphs = [str(part["file"]) for part in parts.values()]
    around = [path for graph in graphs for path in folder.glob(f"{glob.escape(graph)}*")]
    beside = [path.name for path in around if not any(path.match(own) for own in OWN)]
    shared = [name for name in (SCHEDULES, TOKENIZER) if (folder / name).exists()]
    for name in (*graphs, *beside, *shared):
        if name not in files:
            raise ValueError(f"{name!r} has no hash")


def _read(kind: type[Folder], folder: Path, parts: str, check: bool) -> dict[str, Any]:
    """A manifest's content; `parts` is the entry that lists stages or engines."""
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found, schema = data["kind"], data["schema"]
    except FileNotFoundError as error:
        makers = {"bundle": "`reelrt export` makes bundles", "engines": "`reelrt build` makes engine sets"}
        raise _absent(folder, makers[kind.kind]) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}.", "Build this folder again.") from error
    if found != kind.kind:
        raise IntegrityError(f"{folder} holds {found!r}, where {kind.kind!r} is needed.")
    if schema != SCHEMA:
        raise IntegrityError(
            f"{path} has schema {schema}; this version of reelrt reads {SCHEMA}.", "Build this folder again."
        )
    _check_names(folder, data["files"], data[parts])
    if check:
        verify(folder, data["files"])
    return dict(data)
