"""TensorRT sessions on a simulated GPU whose calls fail at random: leaks and wrong videos must be none.

    python -m benchmarks.faults

No GPU takes part, so this says nothing about speed. Videos are asked for until 10,000 calls have failed,
in turn with every library the simulation knows: allocations, copies, launches, captures and waits; and
some are cancelled or stopped by Ctrl-C. Half are encoded while they are decoded, and in three of ten another
thread runs stages meanwhile. Whatever comes out, files included, is compared with ONNX Runtime's to the bit.
The last line on stdout is JSON; a full run also writes it to `benchmarks/results/faults.json`. Exit
code 1 when there was a leak, a wrong video or damage.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from reelrt.bundle.manifest import EngineSet
from tests.simulated.faults import Tally, run
from tests.simulated.machine import Machine
from tests.simulated.tensorrt import MISSING
from tests.unit.test_runtime_pipeline import make_engines

FAULTS = 10_000
WORKERS = 2
"""Libraries that are tried beside each other."""
RESULT = Path(__file__).parent / "results" / "faults.json"


def _faults_of(library: str, faults: int, seed: int) -> Tally:
    """So many failed calls on a simulated GPU with one library."""
    logging.disable(logging.WARNING)  # each failed capture is told, which is thousands of lines
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        (folder / "source").mkdir()
        make_engines(folder / "source")  # type: ignore[no-untyped-call] # a test's
        source = EngineSet.load(folder / "source")
        return run(Machine(patch, library), source, folder / "engines", 10 * faults, seed, faults)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--faults", type=int, default=FAULTS, help="failed calls in all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(stderr=True)
    console.print("wanted: no leak, no damage, and every video that comes out ONNX Runtime's to the bit")
    share = -(-options.faults // len(MISSING))
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        seeds = range(options.seed, options.seed + len(MISSING))
        found = pool.map(_faults_of, MISSING, [share] * len(MISSING), seeds)
        tallies = dict(zip(MISSING, found, strict=True))
    table = Table("library", "videos asked for", "faults", "came out", "wrong", "leaks", "damage")
    for library, tally in tallies.items():
        counts = (tally.rounds, tally.faults.total(), tally.ends["video"], tally.wrong)
        table.add_row(library, *map(str, (*counts, len(tally.leaks), len(tally.violations))))
    console.print(table)
    libraries = {name: tally.to_json() for name, tally in tallies.items()}
    result = {
        "simulated": True,
        "seed": options.seed,
        "libraries": libraries,
        "machine": machine("onnxruntime", "cuda-bindings"),
    }
    if options.faults >= FAULTS:
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return int(any(tally.wrong or tally.leaks or tally.violations for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
