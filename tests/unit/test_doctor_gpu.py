"""What `reelrt doctor` says of a GPU, its driver and engines: one sentence and the remedy each.

No GPU is needed: descriptions of machines, and libraries that answer as the driver would, stand for
them.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from reelrt.engines.doctor import examine
from reelrt.errors import BackendError
from reelrt.jetson import device as machine
from reelrt.jetson.device import Device, Gpu, detect
from reelrt.runtime.ort import CPU, CUDA, open_engine
from tests.unit.test_runtime_pipeline import make_engines

AMPERE = Gpu("RTX 3060", "8.6", 6 * 2**30, "13.0")


def checks(monkeypatch, *engines, **changes):
    monkeypatch.setattr("reelrt.engines.doctor.detect", lambda: replace(detect(), **changes))
    return {check.name: check for check in examine(engines=engines)}


def packages(monkeypatch, cuda: int):
    """GPU packages that say they were built for a CUDA version."""
    monkeypatch.setattr("reelrt.engines.doctor.cuda_version", lambda backend, device: str(cuda))
    monkeypatch.setattr("reelrt.engines.doctor.installed", lambda name: name != "tensorrt")
    monkeypatch.setattr("reelrt.engines.doctor.metadata.version", lambda name: f"{cuda}.5.0")


def card(folder, vendor="0x10de", kind="0x030000"):
    (folder / "0000:01:00.0").mkdir(parents=True)
    (folder / "0000:01:00.0" / "vendor").write_text(f"{vendor}\n")
    (folder / "0000:01:00.0" / "class").write_text(f"{kind}\n")


@pytest.mark.parametrize(
    ("vendor", "kind", "fault"),
    [
        ("0x10de", "0x030000", "an NVIDIA card, and no driver for it"),
        ("0x10de", "0x030200", "an NVIDIA card, and no driver for it"),
        ("0x10de", "0x040300", ""),  # its sound output
        ("0x8086", "0x030000", ""),
    ],
)
def test_a_card_without_a_driver(monkeypatch, tmp_path, vendor, kind, fault):
    def missing(name):
        raise OSError

    card(tmp_path, vendor, kind)
    monkeypatch.setattr(machine, "PCI_FOLDER", tmp_path)
    monkeypatch.setattr(machine.ctypes, "CDLL", missing)
    found = detect()
    assert (found.gpu, found.gpu_fault) == (None, fault)


def test_no_driver_is_one_sentence_and_a_remedy(monkeypatch):
    found = checks(monkeypatch, gpu=None, gpu_fault="an NVIDIA card, and no driver for it")["GPU"]
    assert (found.status, found.detail) == ("warn", "an NVIDIA card, and no driver for it")
    assert found.remedy == "Install the NVIDIA driver, version 580 or newer for CUDA 13."


@pytest.mark.parametrize(
    ("code", "name", "remedy"),
    [
        (803, "SYSTEM_DRIVER_MISMATCH", "Restart"),
        (100, "NO_DEVICE", "CUDA_VISIBLE"),
        (42, "error 42", "again"),
    ],
)
def test_a_driver_that_does_not_work(monkeypatch, code, name, remedy):
    cuda = SimpleNamespace(
        cuInit=lambda flags: code,
        cuDeviceGet=None,
        cuDriverGetVersion=None,
        cuDeviceGetName=None,
        cuDeviceGetAttribute=None,
        cuDeviceTotalMem_v2=None,
    )
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda library: cuda)
    found = detect()
    assert found.gpu is None and name in found.gpu_fault
    told = checks(monkeypatch, gpu=None, gpu_fault=found.gpu_fault)["GPU"]
    assert name in told.detail and remedy in told.remedy


def test_a_driver_that_is_too_old(monkeypatch):
    packages(monkeypatch, 13)
    found = checks(monkeypatch, gpu=replace(AMPERE, cuda="12.4"))
    assert found["GPU"].status == "warn"
    assert found["GPU"].detail.endswith(
        "driver for CUDA 12.4, which is too old for tensorrt_rtx and cuda-bindings of CUDA 13"
    )
    assert found["GPU"].remedy == (
        "Update the NVIDIA driver to 580 or newer, or install what it runs: "
        "pip install 'tensorrt-rtx-cu12' 'cuda-bindings==12.*'."
    )
    assert "tensorrt_rtx" not in found["Can run"].detail


def test_a_gpu_with_everything_runs_its_engines(monkeypatch):
    packages(monkeypatch, 12)
    found = checks(monkeypatch, gpu=AMPERE)
    assert found["GPU"].status == "ok"
    assert found["Can run"].detail == "onnxruntime engines; tensorrt_rtx engines for 8.6"


def engine_set(folder, **changes):
    folder.mkdir()
    return make_engines(folder, **changes)


def test_engines_for_another_card(monkeypatch, tmp_path):
    rtx = {"backend": "tensorrt_rtx", "target": "rtx3060", "compute_capability": "8.6"}
    folder = engine_set(tmp_path / "rtx", **rtx)
    ada = Gpu("RTX 4060", "8.9", 2**33, "13.0")
    for gpu, here in ((ada, "this machine has RTX 4060, 8.9"), (None, "this machine has no GPU")):
        found = checks(monkeypatch, folder, gpu=gpu)[str(folder)]
        assert found.status == "missing"
        assert found.detail.endswith(f"engines for rtx3060, compute capability 8.6; {here}")
        assert found.remedy == "Build the engines for this machine: `reelrt build BUNDLE -o ENGINES`."
    found = checks(monkeypatch, folder, gpu=AMPERE)[str(folder)]
    assert "is installed" in found.detail or "not installed" in found.detail


def test_engines_that_run_here_and_no_engines_at_all(monkeypatch, tmp_path):
    folder = engine_set(tmp_path / "cpu")
    assert checks(monkeypatch, folder)[str(folder)].status == "ok"
    old = engine_set(tmp_path / "old", backend_version="1.2.3")
    assert "onnxruntime 1.2.3 engines for host; " in checks(monkeypatch, old)[str(old)].detail
    strange = engine_set(tmp_path / "strange", backend="teapot")
    assert checks(monkeypatch, strange)[str(strange)].status == "missing"
    none = checks(monkeypatch, tmp_path / "none")[str(tmp_path / "none")]
    assert none.status == "missing" and "there is no folder" in none.detail and none.remedy


def test_a_machine_is_described_without_a_gpu_fault_by_default():
    assert Device(None, "", "", "x86_64", "CPU", (), 1, 1).gpu_fault == ""


def test_onnxruntimes_cuda_provider_is_told(monkeypatch):
    gpu = Gpu("NVIDIA H100", "9.0", 80 << 30, "13.0")
    assert "CUDA provider" not in checks(monkeypatch, gpu=gpu)["Can run"].detail
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert "bundles by ONNX Runtime's CUDA provider" in checks(monkeypatch, gpu=gpu)["Can run"].detail
    assert "CUDA provider" not in checks(monkeypatch, gpu=None)["Can run"].detail


def test_a_provider_that_is_not_there_is_one_sentence_and_a_remedy(monkeypatch, tmp_path):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(BackendError, match="has no CUDAExecutionProvider; it has CPU.*onnxruntime-gpu"):
        open_engine(tmp_path / "step.onnx", 1, CUDA)


def test_a_provider_that_falls_back_to_the_cpu_is_an_error(monkeypatch, tmp_path):
    """ONNX Runtime says nothing when its library for CUDA does not load."""
    import onnxruntime

    class Session:
        def __init__(self, *_, **__):
            pass

        def get_providers(self):
            return [CPU]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(BackendError, match="CUDAExecutionProvider does not start here"):
        open_engine(tmp_path / "step.onnx", 1, CUDA)
