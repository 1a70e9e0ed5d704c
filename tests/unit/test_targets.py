"""Targets have one table; a machine is described from what its files say."""

from __future__ import annotations

import platform

import pytest

from reelrt.engines.backends import RTX_CAPABILITIES, choose
from reelrt.errors import InputError
from reelrt.jetson import device as machine
from reelrt.jetson.boards import boards
from reelrt.jetson.device import Device, Gpu, detect, host_target, jetpack
from reelrt.jetson.targets import TARGETS, find

NO_GPU = Device(None, "", "", "x86_64", "some CPU", ("avx2",), 2, 8 * 2**30)
LAPTOP = Device(Gpu("RTX 3060 Laptop", "8.6", 6 * 2**30, "13.0"), "", "", "x86_64", "CPU", (), 8, 2**34)
ORIN = Device(Gpu("Orin", "8.7", 2**35, "12.6"), "Jetson AGX Orin", "6", "aarch64", "CPU", (), 12, 2**35)


def test_the_targets_of_the_command_line_are_there():
    wanted = "rtx3060 rtx4060 sm86 sm75 sm80 sm89 sm120 orin-agx orin-nx orin-nano"
    assert set(TARGETS) == {*wanted.split(), *boards()}
    assert find("rtx3060").compute_capability == "8.6"
    assert find("orin-nano").compute_capability == "8.7"


def test_an_unknown_target_lists_the_choices():
    with pytest.raises(InputError, match=r"'rtx9999' is not known.*host, rtx3060.*orin-nano"):
        find("rtx9999")


def test_rtx_targets_are_ones_the_library_builds_for():
    for target in TARGETS.values():
        assert (target.backend == "tensorrt_rtx") == (target.compute_capability in RTX_CAPABILITIES)


@pytest.mark.parametrize(
    ("device", "backend", "capability"),
    [(NO_GPU, "onnxruntime", ""), (LAPTOP, "tensorrt_rtx", "8.6"), (ORIN, "tensorrt", "8.7")],
)
def test_host_is_the_machine_at_hand(device, backend, capability):
    library, target = choose("auto", "host", device)
    assert (library.name, target.name, target.compute_capability) == (backend, "host", capability)
    assert host_target(device).memory_gib > 5


def test_an_rtx_target_needs_no_gpu():
    library, target = choose("auto", "rtx3060", NO_GPU)
    assert (library.name, target.compute_capability) == ("tensorrt_rtx", "8.6")


def test_a_gpu_backend_for_a_machine_without_one_asks_for_a_target():
    with pytest.raises(InputError, match="this machine has none.*tensorrt_rtx --target rtx3060"):
        choose("tensorrt_rtx", "host", NO_GPU)


@pytest.mark.parametrize("device", [NO_GPU, LAPTOP])
def test_orin_engines_are_built_on_the_orin(device):
    with pytest.raises(InputError, match="orin-agx must be built on the device itself.*Copy the bundle"):
        choose("auto", "orin-agx", device)
    assert choose("auto", "orin-agx", ORIN)[0].name == "tensorrt"


def test_rtx_does_not_build_for_orin():
    with pytest.raises(InputError, match="does not build for Jetson Orin Nano"):
        choose("tensorrt_rtx", "orin-nano", ORIN)


def test_cpu_engines_are_for_the_machine_that_builds_them():
    with pytest.raises(InputError, match="not for rtx3060"):
        choose("onnxruntime", "rtx3060", LAPTOP)
    assert choose("onnxruntime", "host", LAPTOP)[1].compute_capability == ""


def test_an_unknown_backend_lists_the_choices():
    with pytest.raises(
        InputError, match=r"'openvino' is not known.*auto, onnxruntime, tensorrt_rtx, tensorrt"
    ):
        choose("openvino", "host", NO_GPU)


def test_this_machine_is_described_without_a_gpu_library():
    device = detect()
    assert device.cpu_cores >= 1
    assert device.memory_bytes > 2**28
    assert device.architecture == platform.machine()


def test_a_jetson_is_known_by_its_files(tmp_path, monkeypatch):
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    line = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
    (tmp_path / "release").write_text(line)
    (tmp_path / "cpu").write_text("processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp\n")
    for name in ("model", "release", "cpu"):
        attribute = {"model": "MODEL_FILE", "release": "RELEASE_FILE", "cpu": "CPU_FILE"}[name]
        monkeypatch.setattr(machine, attribute, tmp_path / name)
    found = detect()
    assert found.jetson == "NVIDIA Jetson AGX Orin Developer Kit"
    assert found.jetpack == "6 (L4T 36.4.3)"
    assert found.cpu_features == ("asimd", "asimdhp", "asimddp")


def test_a_release_file_that_is_none_says_nothing():
    assert jetpack("") == jetpack("no release here") == ""
    assert jetpack("# R99 (release), REVISION: 1.0") == "L4T 99.1.0"
