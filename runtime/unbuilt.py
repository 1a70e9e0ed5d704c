"""A bundle run as it is, by ONNX Runtime, without building engines of it first.

For measuring and calibrating: what runs are the very graphs that every backend's engines are made
of. ONNX Runtime optimises them when they are opened, so it takes longer than opening an engine set.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnxruntime as ort

from reelrt.bundle.manifest import Bundle, Engine, EngineSet, kind_of
from reelrt.bundle.spec import DECODER_FRAMES, MAX_TABLE_ROWS, Profile, Range
from reelrt.jetson.device import physical_cores
from reelrt.runtime.ort import CPU, OrtSessions, open_engine
from reelrt.runtime.pipeline import TextToVideo
from reelrt.runtime.session import Sessions, open_sessions

BATCH = 4
"""Videos at once."""
MOST_FRAMES, MOST_CELLS = 1024, 1024

Wrap = Callable[[Sessions], Sessions]
"""What stands between the pipeline and its sessions, to look at what passes."""


def open_pipeline(
    folder: Path,
    *,
    threads: int | None = None,
    check: bool = True,
    wrap: Wrap | None = None,
    provider: str = CPU,
) -> TextToVideo:
    """Open a bundle, or an engine set, whichever a folder holds.

    Args:
        folder: What `reelrt export`, `reelrt calibrate` or `reelrt build` wrote.
        threads: CPU threads; None takes one per physical core.
        check: Whether to verify the SHA-256 of every file first.
        wrap: Given the sessions of either, returns those that the pipeline uses.
        provider: What of ONNX Runtime runs a bundle: on a GPU that no other library of ours takes, its
            `CUDAExecutionProvider`. State and frames pass through the host's memory then.

    Raises:
        IntegrityError: Neither of the two, or a file of it is missing or damaged.
        CompatibilityError: An engine set of another backend version, device or machine.
        BackendError: No session of this version runs it, or ONNX Runtime cannot open it.
    """
    if kind_of(folder) == EngineSet.kind:
        engines = EngineSet.load(folder, check)
        sessions = open_sessions(engines, threads)
    else:
        engines = as_engines(Bundle.load(folder, check))
        sessions = OrtSessions(engines, threads or physical_cores(), partial(open_engine, provider=provider))
    return TextToVideo(engines, sessions if wrap is None else wrap(sessions))


def as_engines(bundle: Bundle) -> EngineSet:
    """What a bundle would be if its graphs were engines of any size."""
    cells = Range(1, 1, MOST_CELLS)
    frames = bundle.pipeline.geometry.frames
    picture = {"height": cells, "width": cells}
    chunk = min(DECODER_FRAMES, frames)
    profiles: dict[str, Profile] = {
        "text_encoder": {"batch": Range(1, 1, 2)},
        "step": {
            "batch": Range(1, 1, BATCH),
            "rows": Range(1, MAX_TABLE_ROWS, MAX_TABLE_ROWS),
            "frames": Range(1, frames, MOST_FRAMES),
            **picture,
        },
        "vae_decoder": {"batch": Range(1, 1, 1), "frames": Range(1, chunk, MOST_FRAMES), **picture},
    }
    engines = {
        name: Engine(
            spec=stage.spec,
            file=stage.file,
            precision=stage.precision,
            profile=profiles[name],
            key="",
            key_fields={},
            weight_bytes=stage.weight_bytes,
            activation_bytes=0,
            build_seconds=0,
        )
        for name, stage in bundle.stages.items()
    }
    return EngineSet(
        folder=bundle.folder,
        bundle=bundle.sha256,
        pipeline=bundle.pipeline,
        backend="onnxruntime",
        backend_version=ort.__version__,
        target="host",
        compute_capability="",
        engines=engines,
        files=bundle.files,
        version=bundle.version,
    )
