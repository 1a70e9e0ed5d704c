"""Ranges for NVIDIA's profilers: entered in order where the package is there, nothing where it is not."""

from __future__ import annotations

import builtins
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

import reelrt
from reelrt.bundle.manifest import EngineSet
from reelrt.runtime import ranges
from tests.simulated.machine import Machine
from tests.unit.test_runtime_pipeline import make_engines


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "engines").mkdir()
    return make_engines(tmp_path / "engines")


@pytest.fixture
def entered(monkeypatch):
    """What was entered and left, by thread; a list of `(thread, sign, name)`."""
    told = []

    class Annotate:
        def __init__(self, message, *, domain):
            assert domain == "reelrt"
            self.name = message

        def __enter__(self):
            told.append((threading.current_thread().name, "+", self.name))

        def __exit__(self, *_):
            told.append((threading.current_thread().name, "-", self.name))

    monkeypatch.setattr(ranges, "_nvtx", lambda: SimpleNamespace(annotate=Annotate))
    return told


def of(entered, *, encoder):
    return [sign + name for thread, sign, name in entered if (thread == "reelrt-encoder") == encoder]


STEPS = ["+denoise", *["+step", "-step"] * 4, "-denoise"]
TEXT = ["+text_encoder", "-text_encoder"] * 2  # without and with the prompt


@pytest.mark.parametrize("gpu", [False, True])
def test_stages_and_steps_in_order(folder, entered, tmp_path, monkeypatch, gpu):
    if gpu:
        folder = Machine(monkeypatch).engines(EngineSet.load(folder), tmp_path / "gpu").folder
    reelrt.load(folder).generate("red", steps=2, seed=1, save_to=tmp_path / "a.mp4")
    decode = ["+vae_decoder", "-vae_decoder"] * 2
    assert of(entered, encoder=False) == [*TEXT, *STEPS, *decode]
    assert of(entered, encoder=True) == ["+encode", "-encode"]


def test_a_failure_leaves_its_ranges(folder, entered):
    def stop(what, done, total):
        if (what, done) == ("denoise", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reelrt.load(folder).generate("red", steps=2, progress=stop)
    assert of(entered, encoder=False) == [*TEXT, "+denoise", "+step", "-step", "-denoise"]


def test_without_the_package_there_is_nothing(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name == "nvtx":
            raise ImportError(name)
        return real(name, *rest)

    ranges._nvtx.cache_clear()
    monkeypatch.setattr(builtins, "__import__", absent)
    with ranges.span("step"):
        pass
    assert ranges.span("step") is ranges.span("denoise")  # nothing is made for it
    ranges._nvtx.cache_clear()


def test_it_is_imported_when_something_runs():
    code = "import reelrt.runtime.pipeline, reelrt.runtime.trt, sys; print('nvtx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_real_package_takes_them():
    pytest.importorskip("nvtx")
    ranges._nvtx.cache_clear()
    with ranges.span("denoise"), ranges.span("step"):
        pass
