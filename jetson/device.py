"""What the machine at hand is: GPU, Jetson board, JetPack, CPU and memory.

Asks the system's files and the driver, loads no CUDA binding, and never fails: what a machine
does not say is empty or 0.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from reelrt.jetson.targets import HOST, Target

CPU_FEATURES = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16")
ARM_FEATURES = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve")
# L4T release to the JetPack that carries it: https://developer.nvidia.com/embedded/jetpack-archive
JETPACKS = {"35": "5", "36": "6", "38": "7", "39": "7"}

MODEL_FILE = Path("/proc/device-tree/model")
RELEASE_FILE = Path("/etc/nv_tegra_release")
CPU_FILE = Path("/proc/cpuinfo")
CPU_FOLDER = Path("/sys/devices/system/cpu")
PCI_FOLDER = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY = "0x10de", "0x03"

# What cuInit may answer: https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TYPES.html
DRIVER_FAULTS = {
    34: "CUDA_ERROR_STUB_LIBRARY",
    100: "CUDA_ERROR_NO_DEVICE",
    101: "CUDA_ERROR_INVALID_DEVICE",
    802: "CUDA_ERROR_SYSTEM_NOT_READY",
    803: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
    804: "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
    999: "CUDA_ERROR_UNKNOWN",
}

# CUdevice_attribute: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first NVIDIA GPU.

    Attributes:
        name: As the driver names it.
        compute_capability: `8.6`, say.
        memory_bytes: Its memory; on a Jetson, all of the board's.
        cuda: The newest CUDA version that the driver runs: `12.6`, say.
    """

    name: str
    compute_capability: str
    memory_bytes: int
    cuda: str


@dataclass(frozen=True, slots=True)
class Device:
    """A machine.

    Attributes:
        gpu: None where there is none, or no driver.
        jetson: The board's model, empty where it is no Jetson.
        jetpack: `6 (L4T 36.4.3)`, say, or empty.
        architecture: `x86_64` or `aarch64`.
        cpu: Model name.
        cpu_features: Vector extensions that a CPU engine depends on, in a fixed order.
        cpu_cores: Cores this process may use.
        memory_bytes: Physical memory; 0 when the system does not say.
        gpu_fault: Why an NVIDIA card that is there cannot be used; empty where nothing is known of one.
    """

    gpu: Gpu | None
    jetson: str
    jetpack: str
    architecture: str
    cpu: str
    cpu_features: tuple[str, ...]
    cpu_cores: int
    memory_bytes: int
    gpu_fault: str = ""


def detect() -> Device:
    """Look at this machine."""
    cpu, features = _cpu(_text(CPU_FILE))
    gpu, fault = _gpu()
    model = _text(MODEL_FILE).strip("\0\n")
    return Device(
        gpu=gpu,
        jetson=model if "jetson" in model.lower() or "orin" in model.lower() else "",
        jetpack=jetpack(_text(RELEASE_FILE)),
        architecture=platform.machine(),
        cpu=cpu or platform.processor() or platform.machine(),
        cpu_features=features,
        cpu_cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        memory_bytes=_memory(),
        gpu_fault=fault,
    )


def physical_cores() -> int:
    """Cores this process may use, two hardware threads of a core counted once."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    cores = {_text(CPU_FOLDER / f"cpu{cpu}" / "topology" / "thread_siblings_list") for cpu in allowed}
    return len(allowed) if "" in cores else len(cores)


def host_target(device: Device) -> Target:
    """What `--target host` means on a machine."""
    if device.gpu is None:
        return Target(HOST, device.cpu, "", device.memory_bytes / 2**30, "onnxruntime")
    gpu = device.gpu
    backend = "tensorrt" if device.jetson else "tensorrt_rtx"
    memory = gpu.memory_bytes / 2**30
    return Target(HOST, gpu.name, gpu.compute_capability, memory, backend, on_device=bool(device.jetson))


def jetpack(release: str) -> str:
    """JetPack's major version from the text of `/etc/nv_tegra_release`; empty when it has none.

    Its first line reads `# R36 (release), REVISION: 4.3, GCID: ...`.
    """
    found = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", release)
    if not found:
        return ""
    major, revision = found.groups()
    l4t = f"L4T {major}.{revision}"
    return f"{JETPACKS[major]} ({l4t})" if major in JETPACKS else l4t


def _cpu(text: str) -> tuple[str, tuple[str, ...]]:
    """Model name and vector extensions from the text of `/proc/cpuinfo`."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip().lower(), value.strip())
    flags = set(fields.get("flags", fields.get("features", "")).split())
    return fields.get("model name", ""), tuple(name for name in CPU_FEATURES + ARM_FEATURES if name in flags)


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cards() -> int:
    """NVIDIA display and compute cards on the PCI bus, driver or not."""
    vendors = PCI_FOLDER.glob("*/vendor")
    return sum(
        _text(vendor).strip() == _NVIDIA and _text(vendor.with_name("class")).startswith(_DISPLAY)
        for vendor in vendors
    )


def _gpu() -> tuple[Gpu | None, str]:
    """The first GPU as libcuda, the driver's own library, describes it, or why it does not."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None, "an NVIDIA card, and no driver for it" if _cards() else ""
    device, version, major, minor = (ctypes.c_int() for _ in range(4))
    total, name = ctypes.c_size_t(), ctypes.create_string_buffer(256)
    try:
        if code := cuda.cuInit(0):
            answer = DRIVER_FAULTS.get(code, f"CUDA error {code}")
            return None, f"an NVIDIA driver that answers {answer}"
        calls = (
            cuda.cuDeviceGet(ctypes.byref(device), 0),
            cuda.cuDriverGetVersion(ctypes.byref(version)),
            cuda.cuDeviceGetName(name, len(name), device),
            cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
            cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
            cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device),
        )
    except AttributeError:  # a libcuda without these entries is a stub
        return None, ""
    if any(calls):
        return None, ""
    found = Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=f"{major.value}.{minor.value}",
        memory_bytes=total.value,
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )
    return found, ""
