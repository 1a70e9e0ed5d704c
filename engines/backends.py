"""The libraries that build engines: which there are, which are installed, what each can build.

Looks packages up without importing them, so that a build with nothing to do stays fast.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from importlib import metadata

from reelrt.errors import BackendError, InputError
from reelrt.jetson.device import Device, host_target
from reelrt.jetson.targets import HOST, Target, find

AUTO = "auto"
GRAPH_PACKAGES = {"onnx": "onnx", "onnx_ir": "onnx-ir"}
"""Module to the package that brings it: what building for any backend needs."""
# https://docs.nvidia.com/deeplearning/tensorrt-rtx: the GPUs of its support matrix.
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


@dataclass(frozen=True, slots=True)
class Backend:
    """A library that builds engines.

    Attributes:
        name: What the user calls it, and the Python module.
        title: What its makers call it.
        suffix: Ending of its engine files.
        precision: What it builds when nothing is asked for; None keeps the bundle's.
        flags: Everything fixed in how we call it; part of the cache key.
        remedy: What to do when it is not installed.
    """

    name: str
    title: str
    suffix: str
    precision: str | None
    flags: str
    remedy: str


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "onnxruntime",
            "ONNX Runtime",
            ".onnx",
            None,
            "optimization=all, rows of tokens, joined sums, text-free part",
            "Install it: pip install onnxruntime.",
        ),
        Backend(
            "tensorrt_rtx",
            "TensorRT-RTX",
            ".engine",
            "fp16",
            "strongly typed",
            "Install it: pip install 'reelrt[rtx]'.",
        ),
        Backend(
            "tensorrt",
            "TensorRT",
            ".engine",
            "fp16",
            "strongly typed",
            "Install it: pip install 'reelrt[tensorrt]' tensorrt; on a Jetson JetPack brings it "
            "(apt install python3-libnvinfer, and an environment with --system-site-packages).",
        ),
    )
}


def installed(module: str) -> bool:
    """Whether a module can be imported; type stubs alone do not count."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def version(backend: Backend) -> str:
    """The version of an installed backend, as the module itself says it.

    Raises:
        BackendError: It is not installed, or cannot be loaded.
    """
    if not installed(backend.name):
        raise BackendError(f"{backend.title} is not installed.", backend.remedy)
    try:
        return metadata.version(backend.name)
    except metadata.PackageNotFoundError:  # another build of it, or the system's own
        pass
    try:
        return str(importlib.import_module(backend.name).__version__)
    except Exception as error:  # a library that does not load raises what it likes
        raise BackendError(f"{backend.title} cannot be loaded: {error}", backend.remedy) from error


def check_graph_packages() -> None:
    """Whether what reads and rewrites graphs is there.

    Raises:
        BackendError: It is not.
    """
    lacking = [package for module, package in GRAPH_PACKAGES.items() if not installed(module)]
    if lacking:
        raise BackendError(
            f"building engines needs {' and '.join(lacking)}, not installed here.",
            f"Install it: pip install {' '.join(lacking)}.",
        )


def cuda_version(backend: Backend, device: Device) -> str:
    """The CUDA version an engine is built with, empty for a CPU."""
    if backend.name == "onnxruntime":
        return ""
    for major in range(11, 15):
        try:
            metadata.version(f"{backend.name}_cu{major}")
        except metadata.PackageNotFoundError:
            continue
        return str(major)
    return device.gpu.cuda if device.gpu else ""


def choose(backend: str, target: str, device: Device) -> tuple[Backend, Target]:
    """What builds for a target on this machine.

    Args:
        backend: A backend's name, or `auto`.
        target: A target's name, or `host`.
        device: This machine.

    Raises:
        InputError: An unknown name, or a target that this backend does not build for here.
    """
    aim = host_target(device) if target == HOST else find(target)
    name = aim.backend if backend == AUTO else backend
    if name not in BACKENDS:
        raise InputError(f"backend {name!r} is not known.", f"Choose one of {', '.join([AUTO, *BACKENDS])}.")
    capability, here = aim.compute_capability, device.gpu.compute_capability if device.gpu else ""
    if name == "onnxruntime" and target != HOST:
        raise InputError(
            f"ONNX Runtime engines are optimised for the machine that builds them, not for {target}.",
            "Use --target host, or another backend.",
        )
    if name == "onnxruntime":
        return BACKENDS[name], host_cpu(device)
    if not capability:
        raise InputError(
            f"{BACKENDS[name].title} needs a GPU to build for, and this machine has none.",
            "TensorRT-RTX needs only its name: --backend tensorrt_rtx --target rtx3060, say.",
        )
    if name == "tensorrt_rtx" and capability not in RTX_CAPABILITIES:
        raise InputError(
            f"TensorRT-RTX does not build for {aim.description} (compute capability {capability}).",
            "Use --backend tensorrt on the device itself.",
        )
    if name == "tensorrt" and (capability != here or (aim.on_device and not device.jetson)):
        raise InputError(
            f"TensorRT engines for {target} must be built on the device itself, and this machine is not one.",
            "Copy the bundle there and run the same command.",
        )
    return BACKENDS[name], aim


def host_cpu(device: Device) -> Target:
    """This machine's CPU as a target."""
    return Target(HOST, device.cpu, "", device.memory_bytes / 2**30, "onnxruntime")
