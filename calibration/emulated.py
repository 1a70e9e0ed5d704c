"""A bundle whose graphs compute as its FP16 engines would, on a machine that has no FP16 arithmetic.

ONNX Runtime's CPU computes FP16 graphs in FP32, so that their videos show rounded weights and nothing
else. Here each layer's inputs, weights and result are rounded to FP16 and sums stay FP32, as in FP16
kernels; layers that the bundle lists stay FP32, INT8 ones stay INT8. Knows no comparison.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from reelrt import __version__
from reelrt.bundle.manifest import Bundle
from reelrt.calibration import probes
from reelrt.errors import InputError


def emulate_fp16(bundle: Bundle, folder: Path) -> Bundle:
    """Write such a version of a bundle.

    Args:
        bundle: Its stages FP32, or INT8 with an FP32 remainder.
        folder: An empty folder.

    Returns:
        The bundle in the folder. It says FP32 of what it emulates, because that is what its graphs are.

    Raises:
        InputError: A stage has FP16 graphs already.
        CalibrationError: A graph cannot be read so.
    """
    for name, stage in bundle.stages.items():
        if stage.precision == "fp16":
            raise InputError(
                f"{name} of {bundle.folder} has FP16 graphs, whose arithmetic cannot be emulated.",
                "Take the bundle that was exported with `--precision fp32`.",
            )
    graphs = {stage.file: stage for stage in bundle.stages.values()}
    for name in bundle.files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name not in graphs:
            shutil.copyfile(bundle.folder / name, target)  # onnx refuses weights with a second link
        else:
            stage = graphs[name]
            graph = probes.understand(bundle.folder / name, stage.spec)
            target.write_bytes(probes.rounded(graph, stage.spec, stage.keep_fp32))
    made = Bundle(folder, bundle.pipeline, {n: replace(s, keep_fp32=()) for n, s in bundle.stages.items()})
    made.save(__version__)
    return made
