"""What importing brings in: nothing of the exporter's, and libraries only when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import reelrt

EXPORTERS = {
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxscript",
    "polygraphy",
    "tensorrt",
    "tensorrt_rtx",
}
LIBRARIES = {"av", "PIL", "onnxruntime", "tokenizers"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import reelrt", EXPORTERS | LIBRARIES | {"numpy", "safetensors"}),
        ("import reelrt.runtime.pipeline, reelrt.runtime.video", EXPORTERS | LIBRARIES | {"cuda"}),
        ("import reelrt.runtime.ort", EXPORTERS | {"cuda"}),
        ("import reelrt.runtime.trt", EXPORTERS | LIBRARIES | {"cuda"}),
        ("import reelrt.engines.doctor as d; d.examine()", EXPORTERS | {"cuda"}),
    ],
)
def test_imports_are_light(statement, absent):
    code = f"import sys; there = {{*sys.modules}}; {statement}; print(*({{*sys.modules}} - there))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "reelrt" in loaded.stdout.split()
    assert not absent & set(loaded.stdout.split())


def test_every_public_name_is_there():
    for name in reelrt.__all__:
        assert getattr(reelrt, name) is not None
        assert name in dir(reelrt)
    with pytest.raises(AttributeError, match="has no attribute 'Vide'"):
        _ = reelrt.Vide
