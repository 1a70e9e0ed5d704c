"""What this machine can export, build and run, and what is missing for it.

Looks packages up without importing them (torch alone would take seconds), with one exception:
PyAV is asked for its codecs.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from reelrt.bundle.manifest import EngineSet
from reelrt.engines.backends import (
    BACKENDS,
    GRAPH_PACKAGES,
    RTX_CAPABILITIES,
    cuda_version,
    installed,
    version,
)
from reelrt.errors import BackendError, IntegrityError
from reelrt.jetson.device import Device, detect
from reelrt.wording import counted

Status = Literal["ok", "warn", "missing"]

MIN_MEMORY = 4 * 2**30
MIN_DISK = 5 * 2**30
EXPORT_MODULES = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
CODECS = {"libx264": ".mp4", "libvpx-vp9": ".webm", "gif": ".gif", "png": ".png"}
"""Encoder to the ending of the videos that need it."""
# CUDA's major version to the oldest driver that runs it: https://docs.nvidia.com/deploy/cuda-compatibility
DRIVERS = {12: "525", 13: "580"}
DRIVER_REMEDIES = {
    "no driver": f"Install the NVIDIA driver, version {DRIVERS[13]} or newer for CUDA 13.",
    "SYSTEM_DRIVER_MISMATCH": "Restart the machine: its driver was updated and not loaded again.",
    "NO_DEVICE": "Check that nvidia-smi lists the GPU and that CUDA_VISIBLE_DEVICES does not hide it.",
    "STUB_LIBRARY": "Install the NVIDIA driver; a stub library stands in its place.",
}
"""What a fault of the GPU says to what can be done about it."""
OLDER = {
    "tensorrt_rtx": "tensorrt-rtx-cu{}",
    "tensorrt": "tensorrt-cu{}",
    "cuda-bindings": "cuda-bindings=={}.*",
}
"""Package to the requirement that names its build for a CUDA version."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What it is.
        status: `ok`; `warn`, when something works less well without it; or `missing`.
        detail: What was found.
        remedy: What to do about it; empty when there is nothing to do.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def examine(folder: Path = Path(), engines: Iterable[Path] = ()) -> list[Check]:
    """Look at this machine.

    Args:
        folder: Where bundles and engines shall be written; its disk is looked at.
        engines: Engine sets that shall run here.

    Returns:
        The checks in reading order: the machine, the packages, then what can be done with them.
    """
    device = detect()
    packages = [
        _package("onnxruntime", "missing", BACKENDS["onnxruntime"].remedy),
        *(_package(name, "warn", BACKENDS[name].remedy) for name in ("tensorrt_rtx", "tensorrt")),
        _package("polygraphy", "warn", "Install it: pip install 'reelrt[rtx]'."),
        *(_package(name, "warn", "Install it: pip install 'reelrt[export]'.") for name in EXPORT_MODULES),
        _cuda(device),
        _codecs(),
    ]
    machine = _machine(device, folder)
    sets = [_engines(device, each) for each in engines]
    return [*machine, *packages, *_abilities(device, [*machine, *packages]), *sets]


def _machine(device: Device, folder: Path) -> list[Check]:
    python = platform.python_version()
    supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    memory, free = device.memory_bytes, _free(folder)
    return [
        Check(
            "Python", "ok" if supported else "warn", python, "" if supported else "Use Python 3.10 to 3.13."
        ),
        Check(
            "CPU", "ok", f"{device.cpu}, {counted(device.cpu_cores, 'core')}, {' '.join(device.cpu_features)}"
        ),
        _gpu(device),
        *([Check("Jetson", "ok", f"{device.jetson}, JetPack {device.jetpack}")] if device.jetson else []),
        Check(
            "Memory",
            "ok" if memory >= MIN_MEMORY else "warn",
            _gib(memory),
            "" if memory >= MIN_MEMORY else f"Exporting and building take {_gib(MIN_MEMORY)} and more.",
        ),
        Check(
            "Disk",
            "ok" if free >= MIN_DISK else "warn",
            f"{_gib(free)} free in {folder.absolute()}",
            "" if free >= MIN_DISK else "Free some space: a large model's bundle and engines take 6 GiB.",
        ),
    ]


def _gpu(device: Device) -> Check:
    gpu, fault = device.gpu, device.gpu_fault
    if gpu is None:
        remedies = [remedy for sign, remedy in DRIVER_REMEDIES.items() if sign in fault]
        remedy = "With an NVIDIA GPU in this machine, install its driver."
        if fault:
            remedy = remedies[0] if remedies else "Install the NVIDIA driver again, and restart the machine."
        return Check("GPU", "warn", fault or "no NVIDIA GPU, or no driver for it", remedy)
    detail = (
        f"{gpu.name}, compute capability {gpu.compute_capability}, {_gib(gpu.memory_bytes)}, "
        f"driver for CUDA {gpu.cuda}"
    )
    newest = int(gpu.cuda.partition(".")[0])
    wanted = {name: major for name, major in _cuda_majors(device).items() if major > newest}
    if not wanted:
        return Check("GPU", "ok", detail)
    major = max(wanted.values())
    older = " ".join(f"'{requirement}'" for name in wanted for requirement in [OLDER[name].format(newest)])
    return Check(
        "GPU",
        "warn",
        f"{detail}, which is too old for {' and '.join(wanted)} of CUDA {major}",
        f"Update the NVIDIA driver to {DRIVERS.get(major, 'the newest')} or newer, or install what it runs: "
        f"pip install {older}.",
    )


def _cuda_majors(device: Device) -> dict[str, int]:
    """The CUDA that installed packages were built for, where they say it."""
    found = {
        name: cuda_version(BACKENDS[name], device).partition(".")[0]
        for name in ("tensorrt_rtx", "tensorrt")
        if installed(name)
    }
    with suppress(metadata.PackageNotFoundError):
        found["cuda-bindings"] = metadata.version("cuda-bindings").partition(".")[0]
    return {name: int(major) for name, major in found.items() if major}


def _engines(device: Device, folder: Path) -> Check:
    """Whether an engine set runs on this machine."""
    name, again = str(folder), "Build the engines for this machine: `reelrt build BUNDLE -o ENGINES`."
    try:
        engines = EngineSet.load(folder, check=False)
    except IntegrityError as error:
        return Check(name, "missing", error.message, error.remedy or again)
    wanted, gpu = engines.compute_capability, device.gpu
    detail = f"{engines.backend} {engines.backend_version} engines for {engines.target}"
    if wanted and (gpu is None or gpu.compute_capability != wanted):
        here = f"this machine has {gpu.name}, {gpu.compute_capability}" if gpu else "this machine has no GPU"
        return Check(name, "missing", f"{detail}, compute capability {wanted}; {here}", again)
    try:
        found = version(BACKENDS[engines.backend])
    except (BackendError, KeyError):
        remedy = BACKENDS[engines.backend].remedy if engines.backend in BACKENDS else again
        return Check(name, "missing", f"{detail}; {engines.backend} is not installed", remedy)
    if found != engines.backend_version:
        return Check(name, "missing", f"{detail}; {found} is installed", again)
    return Check(name, "ok", detail)


def _package(module: str, absent: Status, remedy: str) -> Check:
    """A package by its module's name."""
    if not installed(module):
        return Check(module, absent, "not installed", remedy)
    return Check(module, "ok", f"{_version(module)}{_providers() if module == 'onnxruntime' else ''}")


def _version(module: str) -> str:
    if module in BACKENDS:
        try:
            return version(BACKENDS[module])
        except BackendError as error:
            return error.message
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return "installed"


def _providers() -> str:
    import onnxruntime

    return f" ({', '.join(onnxruntime.get_available_providers())})"


def _cuda(device: Device) -> Check:
    """CUDA from Python, which only a machine with a GPU has a use for."""
    try:
        return Check("cuda-bindings", "ok", metadata.version("cuda-bindings"))
    except metadata.PackageNotFoundError:
        pass
    if device.gpu is None:
        return Check("cuda-bindings", "ok", "not installed; nothing here needs it")
    extra = "tensorrt" if device.jetson else "rtx"
    return Check("cuda-bindings", "warn", "not installed", f"Install it: pip install 'reelrt[{extra}]'.")


def _codecs() -> Check:
    if not installed("av"):
        return Check("PyAV", "missing", "not installed", "Install it: pip install av.")
    from av.codec import codecs_available

    lacking = [f"{codec} ({ending})" for codec, ending in CODECS.items() if codec not in codecs_available]
    found = f"{_version('av')} with {', '.join(codec for codec in CODECS if codec in codecs_available)}"
    if lacking:
        remedy = "Install the wheel from the package index: pip install --force-reinstall av."
        return Check("PyAV", "warn", f"{found}; without {', '.join(lacking)}", remedy)
    return Check("PyAV", "ok", found)


def _abilities(device: Device, found: Iterable[Check]) -> list[Check]:
    """What can be done with all that."""
    found = [*found]
    there = {check.name for check in found if check.status == "ok"}
    graphs = all(installed(module) for module in GRAPH_PACKAGES)
    onnx = graphs and "polygraphy" in there
    rtx, full = onnx and "tensorrt_rtx" in there, onnx and "tensorrt" in there and device.gpu is not None
    gpu = device.gpu.compute_capability if device.gpu else ""
    builds = [
        *(["onnxruntime engines for this CPU"] if graphs and "onnxruntime" in there else []),
        *([f"tensorrt_rtx engines for compute capability {', '.join(RTX_CAPABILITIES)}"] if rtx else []),
        *([f"tensorrt engines for this device ({gpu})"] if full else []),
    ]
    runs = ["onnxruntime engines"] if "onnxruntime" in there else []
    if device.gpu is not None and {"GPU", "cuda-bindings"} <= there:
        runs += [f"{name} engines for {gpu}" for name in ("tensorrt_rtx", "tensorrt") if name in there]
    if device.gpu is not None and any("CUDAExecutionProvider" in check.detail for check in found):
        runs.append("bundles by ONNX Runtime's CUDA provider")
    packages = " ".join(["onnxruntime", *GRAPH_PACKAGES.values()])
    lacking = [name for name in EXPORT_MODULES if name not in there]
    export = f"without {', '.join(lacking)}" if lacking else "diffusers folders to bundles"
    return [
        _ability("Can export", not lacking, export, "Install it: pip install 'reelrt[export]'."),
        _ability("Can build", bool(builds), "; ".join(builds), f"Install it: pip install {packages}."),
        _ability("Can run", bool(runs), "; ".join(runs), BACKENDS["onnxruntime"].remedy),
    ]


def _ability(name: str, able: bool, detail: str, remedy: str) -> Check:
    return Check(name, "ok" if able else "missing", detail or "nothing", "" if able else remedy)


def _free(folder: Path) -> int:
    """Free bytes for a folder that need not exist yet."""
    for place in (folder.absolute(), *folder.absolute().parents):
        if place.exists() and os.access(place, os.R_OK):
            return shutil.disk_usage(place).free
    return 0


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
