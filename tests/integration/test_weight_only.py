"""INT8 weights of an exported model: a quarter of the size, and nearly the same next state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reelrt.bundle.manifest import Bundle
from reelrt.engines.weight_only import quantize_weights
from reelrt.export.graph import sample_inputs
from reelrt.export.validation import open_session

SIZES = {"batch": 2, "rows": 3, "frames": 4, "height": 8, "width": 8}


@pytest.fixture(scope="module")
def bundle(small_engines: Path) -> Bundle:
    return Bundle.load(small_engines.parent / "bundle")


def test_an_exported_step_with_int8_weights_is_close(bundle, tmp_path):
    stage = bundle.stages["step"]
    full = bundle.folder / stage.file
    small = quantize_weights(full, tmp_path / stage.file, stage.spec)
    feed = {key: x.numpy() for key, x in sample_inputs(stage.spec, SIZES, "fp32", 1, seed=1).items()}
    (wanted, *_), (found, *_) = (open_session(path).run(None, feed) for path in (full, small))
    assert 0 < np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)
    was, now = (path.with_name(f"{path.name}.data").stat().st_size for path in (full, small))
    assert now < 0.35 * was
