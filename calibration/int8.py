"""INT8 by ModelOpt: an FP32 graph and what it reads become a graph with Q/DQ pairs.

Ranges of activations come from the samples, one number per tensor; weights have one per output
channel. Both are symmetric, as TensorRT wants them. Knows nothing of which layers to leave out.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from reelrt.calibration.qdq import Master, Quantised, quantised, weight_bytes
from reelrt.calibration.ranges import Feeds, Method
from reelrt.calibration.streaming import measure
from reelrt.errors import BackendError, CalibrationError
from reelrt.progress import Progress, silent
from reelrt.runtime.session import Array

if TYPE_CHECKING:
    import onnx

MODELOPT_BYTES = 1 << 30
"""Weights up to which ModelOpt does it; it, ONNX Runtime's calibrator and its result each hold them."""


def prepare(
    source: Path,
    nodes: Sequence[str],
    feeds: Feeds,
    count: int,
    *,
    method: Method,
    progress: Progress = silent,
    what: str = "ranges",
) -> Quantised:
    """Find ranges by ModelOpt, or, for a graph too large for it, by ONNX Runtime's histograms alone.

    Arguments and errors as `quantise`.
    """
    options: dict[str, Any] = {"method": method, "progress": progress, "what": what}
    if weight_bytes(source) > MODELOPT_BYTES:
        return measure(source, nodes, feeds, count, **options)
    return Master(quantise(source, nodes, feeds, count, **options))


def quantise(
    source: Path,
    nodes: Sequence[str],
    feeds: Feeds,
    count: int,
    *,
    method: Method,
    progress: Progress = silent,
    what: str = "ranges",
) -> onnx.ModelProto:
    """Put Q/DQ pairs before the inputs of some nodes.

    Args:
        source: The FP32 graph, its weights beside it.
        nodes: Names of the nodes to quantise.
        feeds: The samples.
        count: Number of samples.
        method: How a range is found: the largest magnitude, the one that loses the least entropy, or
            the one that holds 99.999 % of the values.
        progress: Told of the samples that have been run.
        what: Under which name.

    Returns:
        The graph in memory; its weights are floats still (see `qdq.fold_weights`). ModelOpt leaves out
        what TensorRT has no INT8 kernel for, such as a convolution of fewer than 16 channels; see
        `qdq.quantised` for what it did.

    Raises:
        BackendError: ModelOpt is not installed.
        CalibrationError: ModelOpt fails, or can quantise none of them.
    """
    import onnx

    reader = _reader(feeds, count, progress, what)
    with TemporaryDirectory(prefix="reelrt-int8-") as folder, _modelopt(method) as quantize:
        graph, target = Path(folder) / source.name, Path(folder) / "quantised.onnx"
        for path in (source, source.with_name(f"{source.name}.data")):
            if path.exists():
                shutil.copyfile(path, graph.with_name(path.name))
        try:
            quantize(
                str(graph),
                quantize_mode="int8",
                calibration_data_reader=reader,
                calibration_method="max" if method == "max" else "entropy",
                calibration_eps=["cpu"],
                nodes_to_quantize=[f"{re.escape(name)}$" for name in nodes],
                use_external_data_format=True,
                high_precision_dtype="fp32",
                output_path=str(target),
                log_level="CRITICAL",
                enable_gemv_detection_for_trt=False,
            )
        except Exception as error:  # whatever of onnx, onnxruntime, numpy and its own asserts
            if isinstance(error, OSError):
                raise
            raise CalibrationError(
                f"ModelOpt cannot quantise {source.name}: {' '.join(str(error).split())[:400]}."
            ) from error
        model = onnx.load(target)
    if not quantised(model.graph) & set(nodes):
        types = {node.name: node.op_type for node in model.graph.node}
        names = ", ".join(f"{name} ({types.get(name, 'gone')})" for name in nodes[:5])
        raise CalibrationError(
            f"ModelOpt can quantise none of these nodes of {source.name}: {names}"
            f"{', ...' if len(nodes) > 5 else ''}.",
        )
    return model


def check_installed() -> None:
    """See that ModelOpt and what its ONNX part needs are there.

    Raises:
        BackendError: They are not.
    """
    with _modelopt("max"):
        pass


def _reader(feeds: Feeds, count: int, progress: Progress, what: str) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc] # onnxruntime has no types
        def __init__(self) -> None:
            self.rewind()

        def get_next(self) -> dict[str, Array] | None:
            feed = next(self._feeds, None)
            progress(what, min(self._done, count), count)
            self._done += 1
            return None if feed is None else dict(feed)

        def get_first(self) -> dict[str, Array]:
            return dict(next(feeds()))

        def rewind(self) -> None:
            self._feeds, self._done = feeds(), 0

    return Reader()


@contextmanager
def _modelopt(method: Method) -> Iterator[Callable[..., None]]:
    """ModelOpt's `quantize`, kept quiet, for a method.

    Raises:
        BackendError: It is not installed.
    """
    try:
        import modelopt.onnx.quantization.int8 as module
        from modelopt.onnx import trt_utils
        from modelopt.onnx.quantization import ort_patching, quantize
    except ImportError as error:
        raise BackendError(
            f"calibrating needs NVIDIA ModelOpt, not installed here ({error}).",
            'Run `pip install "reelrt[calibration]"`.',
        ) from error
    methods, tensorrt = module.CalibrationMethod, trt_utils.TRT_PYTHON_AVAILABLE
    if method == "percentile":  # ONNX Runtime's calibrator has it, ModelOpt has no name for it
        module.CalibrationMethod = SimpleNamespace(Entropy=methods.Percentile, MinMax=methods.MinMax)
    # It would ask TensorRT for custom operators; there are none in our graphs.
    trt_utils.TRT_PYTHON_AVAILABLE = False
    bar, ort_patching.tqdm = ort_patching.tqdm, iter  # it would draw one for each sample
    try:
        with redirect_stdout(StringIO()):  # ONNX Runtime's calibrator prints
            yield quantize
    finally:
        module.CalibrationMethod, trt_utils.TRT_PYTHON_AVAILABLE = methods, tensorrt
        ort_patching.tqdm = bar
