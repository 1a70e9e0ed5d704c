"""How large the tensors of a graph get, with few of them in memory at once: ranges for INT8.

The histograms are ONNX Runtime's own, as ModelOpt uses them, fed a group of tensors at a time: neither
the graph is copied nor are all activations kept, so a graph of any size can be measured. Knows nothing
of how ranges are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from reelrt.errors import BackendError, CalibrationError
from reelrt.progress import Progress, silent
from reelrt.runtime.session import Array

if TYPE_CHECKING:
    import onnx

Method = Literal["max", "entropy", "percentile"]
METHODS: tuple[Method, ...] = ("max", "entropy", "percentile")

Feeds = Callable[[], Iterator[Mapping[str, Array]]]
"""Gives the samples from the beginning, each as the graph's feed."""

GROUP_BYTES = 512 << 20
"""Most that the tensors of a group may take together."""
PERCENTILE, BINS, LEVELS = 99.999, {"percentile": 2048, "entropy": 128}, 128
"""ONNX Runtime's own defaults for the two methods."""


def collect(
    source: Path,
    tensors: Sequence[str],
    feeds: Feeds,
    count: int,
    *,
    method: Method,
    progress: Progress = silent,
    what: str = "ranges",
) -> dict[str, float]:
    """Find the range of each of some tensors.

    Args:
        source: The FP32 graph, its weights beside it.
        tensors: Names of tensors that a node makes or the graph reads.
        feeds: The samples.
        count: Number of samples.
        method: As `reelrt.calibration.int8.quantise`.
        progress: Told of the samples that have been run, over all groups.
        what: Under which name.

    Returns:
        Tensor to the largest magnitude that INT8 shall hold.

    Raises:
        CalibrationError: Values that are not finite; names the layer and the sample.
        BackendError: ONNX Runtime fails.
    """
    import onnx

    model = onnx.load(source, load_external_data=False)
    groups = _groups(source, model, tensors, next(feeds()))
    found: dict[str, float] = {}
    for number, group in enumerate(groups):
        session = open_with_outputs(source, model, group)
        collector = _Collector(method)
        for sample, feed in enumerate(feeds()):
            progress(what, number * count + sample, len(groups) * count)
            values = dict(zip(group, run(session, group, feed, source), strict=True))
            _check_finite(model, values, sample)
            collector.add(values)
        del session
        found |= collector.ranges()
    progress(what, len(groups) * count, len(groups) * count)
    return found


class _Collector:
    """Histograms, or largest magnitudes, of what it is shown."""

    def __init__(self, method: Method) -> None:
        from onnxruntime.quantization.calibrate import HistogramCollector

        self._largest: dict[str, float] = {}
        self._histograms = None
        if method != "max":
            self._histograms = HistogramCollector(
                method=method,
                symmetric=method == "percentile",
                num_bins=BINS[method],
                num_quantized_bins=LEVELS,
                percentile=PERCENTILE,
                scenario="same",
            )

    def add(self, values: Mapping[str, Array]) -> None:
        if self._histograms is None:
            for name, each in values.items():
                self._largest[name] = max(self._largest.get(name, 0.0), float(np.abs(each).max(initial=0)))
            return
        with redirect_stdout(StringIO()):  # it prints
            self._histograms.collect(dict(values))

    def ranges(self) -> dict[str, float]:
        if self._histograms is None:
            return self._largest
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # it draws bars as well
            found = self._histograms.compute_collection_result()
        return {name: max(abs(float(each[0])), abs(float(each[1]))) for name, each in found.items()}


def _groups(
    source: Path, model: onnx.ModelProto, tensors: Sequence[str], feed: Mapping[str, Array]
) -> list[list[str]]:
    """Tensors that may be in memory together, by their size in one sample."""
    from onnx import helper

    sizes = [helper.make_node("Size", [name], [f"{name}.size"]) for name in tensors]
    names = [f"{name}.size" for name in tensors]
    session = open_with_outputs(source, model, names, sizes)
    groups: list[list[str]] = []
    room = 0
    for name, size in zip(tensors, run(session, names, feed, source), strict=True):
        room -= 4 * int(size)
        if room < 0 or not groups:
            groups.append([])
            room = GROUP_BYTES - 4 * int(size)
        groups[-1].append(name)
    return groups


def _check_finite(model: onnx.ModelProto, values: Mapping[str, Array], sample: int) -> None:
    for name, each in values.items():
        if not np.isfinite(each).all():
            makers = {made: node.name for node in model.graph.node for made in node.output}
            raise CalibrationError(
                f"layer {makers.get(name) or name} produces numbers that are not finite in sample {sample}.",
                "Export the model again with `--precision fp32`, and check its weights.",
            )


def open_with_outputs(
    source: Path, model: onnx.ModelProto, outputs: Sequence[str], nodes: Sequence[onnx.NodeProto] = ()
) -> Any:
    """ONNX Runtime on a graph that gives some of its tensors, and nothing else.

    Args:
        source: Where the graph's weights are.
        model: The graph, its weights not loaded.
        outputs: What to give.
        nodes: Nodes to add, which may make some of it.

    Raises:
        BackendError: It cannot be opened.
    """
    import onnx
    import onnxruntime as ort

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.node.extend(nodes)
    del probe.graph.output[:], probe.graph.value_info[:]
    inputs = {value.name for value in probe.graph.input}
    for name in outputs:
        if name in inputs:  # an input that is an output as well needs a node between
            probe.graph.node.append(onnx.helper.make_node("Identity", [name], [f"{name}.seen"]))
            name = f"{name}.seen"  # noqa: PLW2901
        probe.graph.output.append(onnx.ValueInfoProto(name=name))  # ONNX Runtime knows the types
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(source.parent.resolve())
    )
    try:
        return ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class
        raise BackendError(f"ONNX Runtime cannot open {source}: {error}") from error


def run(session: Any, names: Sequence[str], feed: Mapping[str, Array], source: Path) -> list[Array]:
    """Run such a session; its outputs in the order of `open_with_outputs`.

    Raises:
        BackendError: It fails.
    """
    wanted = {each.name for each in session.get_inputs()}
    try:
        outputs: list[Array] = session.run(None, {k: v for k, v in feed.items() if k in wanted})
    except Exception as error:
        raise BackendError(f"ONNX Runtime failed in {source}: {error}") from error
    assert len(outputs) == len(names)
    return outputs
