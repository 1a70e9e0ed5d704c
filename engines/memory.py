"""The memory plan: what a set of engines needs on a board, and whether it fits.

Made from the bundle's graphs before anything is built or loaded; from the builder's own numbers
where there is an engine set. Knows boards and costs; opens no engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from reelrt.bundle.manifest import Bundle, Engine, EngineSet
from reelrt.bundle.schedule import Cfg
from reelrt.bundle.spec import DECODER_FRAMES, StageSpec
from reelrt.engines import profiles
from reelrt.engines.graph_cost import WORKSPACE_BYTES, Cost, SizedGraph, graph_cost, sized_graph
from reelrt.engines.graph_shapes import load_graph
from reelrt.errors import InputError
from reelrt.jetson.boards import GIB
from reelrt.jetson.targets import Target

if TYPE_CHECKING:
    import onnx

POLICIES = {
    "all": "every stage stays loaded; they share one block for activations",
    "staged": "one stage at a time is loaded, run and freed",
    "streamed": "as staged, and the step's weights come from the host while it runs",
}
CONTEXT_BYTES = 400 << 20
"""CUDA's context, kernels and the library's own: an estimate, to be measured on each board."""
SYSTEM_BYTES = GIB
"""What the system takes of a GPU's memory that no board describes: an estimate."""


@dataclass(frozen=True, slots=True)
class Video:
    """What a plan is made for.

    Attributes:
        width: Pixels.
        height: Pixels.
        frames: Number of frames.
        batch: Videos at once.
        precision: One of `reelrt.engines.graph_cost.PRECISIONS`.
        cfg: How guidance is computed.
        decoder_frames: Latent frames per call of the decoder.
    """

    width: int
    height: int
    frames: int
    batch: int
    precision: str
    cfg: Cfg
    decoder_frames: int = DECODER_FRAMES


@dataclass(frozen=True, slots=True)
class StageNeed:
    """What one stage needs.

    Attributes:
        weight_bytes: Its weights.
        activation_bytes: Its activations at the planned size.
        state_bytes: Its inputs and outputs: of the step, state and counter twice, table and text.
        source: `estimate`, or `builder` where an engine's own numbers stand here.
        cost: The estimate; None where there are engines and no graphs.
    """

    weight_bytes: int
    activation_bytes: int
    state_bytes: int
    source: str
    cost: Cost | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a set of engines needs on a target.

    Attributes:
        video: What it was made for.
        target: The device.
        available_bytes: Memory for engines there: what the system leaves.
        stages: Stage name to its needs.
        frame_bytes: Decoded frames of the whole batch, uint8; on a card they lie in the host's memory.
        context_bytes: CUDA's context, an estimate.
        peaks: Policy to the most memory in use at once.
    """

    video: Video
    target: Target
    available_bytes: int
    stages: Mapping[str, StageNeed]
    frame_bytes: int
    context_bytes: int
    peaks: Mapping[str, int]

    @property
    def fits(self) -> Mapping[str, bool]:
        """Policy to whether its peak is within the memory."""
        return {policy: peak <= self.available_bytes for policy, peak in self.peaks.items()}

    @property
    def smallest(self) -> str:
        """The policy with the smallest peak, the simplest of several."""
        return min(self.peaks, key=self.peaks.__getitem__)


class Planner:
    """Plans of one bundle for one target.

    Args:
        bundle: The bundle; only its graphs and manifest are read.
        target: The device.
        engines: Built engines of the bundle, whose numbers are used where they were built for the
            planned size and precision.
    """

    def __init__(self, bundle: Bundle, target: Target, engines: EngineSet | None = None) -> None:
        self.bundle, self._target, self._engines = bundle, target, engines
        self._sized: dict[tuple[str, tuple[tuple[str, int], ...]], SizedGraph] = {}

    @cached_property
    def _graphs(self) -> dict[str, onnx.ModelProto]:
        return {
            name: load_graph(self.bundle.folder / stage.file) for name, stage in self.bundle.stages.items()
        }

    def plan(self, video: Video) -> Plan:
        """The plan for a video.

        Raises:
            RangeError: A size, frame count or batch the model cannot make.
            BackendError: onnx is not installed, or a graph cannot be read.
        """
        sizes = self.sizes(video)
        stages = {name: self._need(name, video, sizes[name]) for name in self.bundle.stages}
        return _plan(video, self._target, stages)

    def sizes(self, video: Video) -> dict[str, dict[str, int]]:
        """Stage to the largest size of each of its named axes."""
        geometry = self.bundle.pipeline.geometry
        profiles.check_size(geometry, (video.width, video.height), video.frames)
        ranges = profiles.profiles(geometry, video.width, video.height, video.frames, video.batch)
        sizes = {name: {axis: each.max for axis, each in ranges[name].items()} for name in self.bundle.stages}
        if "vae_decoder" in sizes:
            sizes["vae_decoder"]["frames"] = min(video.decoder_frames, video.frames)
        return sizes

    def _need(self, name: str, video: Video, sizes: dict[str, int]) -> StageNeed:
        precision = precision_of(name, video.precision)
        stage, cost = self.bundle.stages[name], self.cost(name, precision, sizes)
        weights, activations = cost.weight_bytes, cost.activation_bytes
        if name == "step" and video.cfg != self.bundle.pipeline.cfg:
            assert video.cfg == "split"  # half of what the batched network runs on
            activations = (activations - 2 * WORKSPACE_BYTES) // 2 + 2 * WORKSPACE_BYTES
        engine = self._engine(name, video, sizes)
        if engine is not None:
            weights, activations = engine.weight_bytes, engine.activation_bytes
        state = _boundary(stage.spec, precision, sizes)
        return StageNeed(weights, activations, state, "builder" if engine else "estimate", cost)

    def _engine(self, name: str, video: Video, sizes: Mapping[str, int]) -> Engine | None:
        """The built engine of a stage, if the builder told its activations for exactly this plan."""
        engine = self._engines.engines.get(name) if self._engines else None
        if engine is None or not engine.activation_bytes or video.cfg != self.bundle.pipeline.cfg:
            return None
        if self._engines is not None and not _built_for(self._engines, self._target):
            return None
        same = engine.precision == precision_of(name, video.precision) and all(
            engine.profile[axis].max == size for axis, size in sizes.items()
        )
        return engine if same else None

    def cost(self, name: str, precision: str, sizes: Mapping[str, int]) -> Cost:
        """What one run of a stage costs; its graph is looked at once for each size."""
        stage, key = self.bundle.stages[name], (name, tuple(sorted(sizes.items())))
        if key not in self._sized:
            self._sized[key] = sized_graph(self._graphs[name], stage.spec, sizes)
        return graph_cost(self._sized[key], precision, stage.precision)


def plan_of_engines(engines: EngineSet, target: Target) -> Plan:
    """The plan of built engines at the largest size they accept, from the builder's numbers alone.

    Raises:
        InputError: Their builder tells no activations, they run on another GPU than the target's, or the
            target's memory is not known.
    """
    if not all(engine.activation_bytes for engine in engines.engines.values()):
        raise InputError(
            f"{engines.folder} holds {engines.backend} engines, whose builder tells no activations.",
            "Give the bundle they were built from instead.",
        )
    if not _built_for(engines, target):
        raise InputError(
            f"{engines.folder} was built for {engines.target}, compute capability "
            f"{engines.compute_capability}, and does not run on {target.name} ({target.compute_capability}).",
            "Give the bundle it was built from, or a target of the same compute capability.",
        )
    stages = {}
    for name, engine in engines.engines.items():
        sizes = {axis: each.max for axis, each in engine.profile.items()}
        state = _boundary(engine.spec, engine.precision, sizes)
        stages[name] = StageNeed(engine.weight_bytes, engine.activation_bytes, state, "builder", None)
    profile, pipeline = engines.engines["step"].profile, engines.pipeline
    scale = pipeline.geometry.spatial_scale
    video = Video(
        width=profile["width"].max * scale,
        height=profile["height"].max * scale,
        frames=profile["frames"].max,
        batch=profile["batch"].max,
        precision=engines.engines["step"].precision,
        cfg=pipeline.cfg,
        decoder_frames=engines.engines["vae_decoder"].profile["frames"].max,
    )
    return _plan(video, target, stages)


def _built_for(engines: EngineSet, target: Target) -> bool:
    """Whether engines run on a target's GPU, so that their numbers say something of it."""
    return engines.compute_capability == target.compute_capability


def _plan(video: Video, target: Target, stages: Mapping[str, StageNeed]) -> Plan:
    frames = 3 * video.width * video.height * video.frames * video.batch
    context = CONTEXT_BYTES if target.compute_capability else 0
    peaks = _peaks(stages, frames if target.on_device else 0, context, target.on_device)
    return Plan(video, target, available(target), stages, frames, context, peaks)


def precision_of(stage: str, precision: str) -> str:
    """What a stage runs in: only the step is quantised, the others are FP16 then."""
    return "fp16" if precision.startswith("int8") and stage != "step" else precision


def available(target: Target) -> int:
    """Bytes that the system leaves for engines on a target.

    Raises:
        InputError: The target's memory is not known.
    """
    if target.board is not None:
        return target.board.free_bytes
    if not target.memory_gib:
        raise InputError(
            f"the memory of target {target.name} ({target.description}) is not known.",
            "Name a board: rtx3060-laptop-6gb or orin-nx-16gb, say.",
        )
    return int(target.memory_gib * GIB) - SYSTEM_BYTES


def _boundary(spec: StageSpec, precision: str, sizes: Mapping[str, int]) -> int:
    """Bytes of a stage's inputs and outputs.

    The step's state and counter are counted twice that way, as the runtime holds them: each launch reads
    one side and writes the other.
    """
    dtype = "fp32" if precision == "fp32" else "fp16"
    return sum(
        math.prod(tensor.shape(sizes)) * tensor.numpy_dtype(dtype).itemsize
        for tensor in (*spec.inputs.values(), *spec.outputs.values())
    )


def _peaks(stages: Mapping[str, StageNeed], frame_bytes: int, context: int, shared: bool) -> dict[str, int]:
    """Policy to its peak.

    Frames pile up while the decoder runs; `frame_bytes` is what of them lies in the engines' memory.
    """
    held = {name: each.state_bytes + frame_bytes * (name == "vae_decoder") for name, each in stages.items()}
    run = {name: each.activation_bytes + held[name] for name, each in stages.items()}
    weights = sum(each.weight_bytes for each in stages.values())
    alone = {name: each.weight_bytes + run[name] for name, each in stages.items()}
    streamed = dict(alone)
    step = stages["step"]
    if not shared and step.cost is not None:  # one weight is used while the next one comes
        streamed["step"] = min(2 * step.cost.largest_weight_bytes, step.weight_bytes) + run["step"]
    resident = max(each + (step.state_bytes if name != "step" else 0) for name, each in run.items())
    peaks = {"all": weights + resident, "staged": max(alone.values()), "streamed": max(streamed.values())}
    return {policy: peak + context for policy, peak in peaks.items()}
