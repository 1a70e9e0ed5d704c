"""The GPU benchmark's measuring, on a simulated GPU whose times mean nothing; and without one."""

from __future__ import annotations

import json
import sys

import pytest

import reelrt
from benchmarks import gpu
from reelrt.bundle.manifest import EngineSet
from reelrt.jetson.device import detect
from tests.simulated.machine import Machine
from tests.unit.test_runtime_pipeline import make_engines


def test_what_it_measures(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    make_engines(tmp_path / "source")
    machine = Machine(monkeypatch)
    engines = machine.engines(EngineSet.load(tmp_path / "source"), tmp_path / "engines")
    pipe = reelrt.load(engines.folder)
    found = json.loads(json.dumps(gpu.measure(pipe, steps=6)))
    assert set(found["stage_milliseconds"]) == {"text_encoder", "vae_decoder"}
    for kind, reason in (("graphs", ""), ("plain", "measured without")):
        assert found[kind]["launches"] == 12
        assert 0 <= found[kind]["idle_share"] < 1
        assert found[kind]["launch_milliseconds"] > 0
        assert found[kind]["without_graphs_because"] == reason
    assert 0 < found["memory_bytes"]["peak"] <= found["memory_bytes"]["planned"]
    assert machine.driver.violations == []


@pytest.mark.skipif(detect().gpu is not None, reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", str(tmp_path)])
    assert gpu.main() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["skipped"].startswith("this machine has ")
