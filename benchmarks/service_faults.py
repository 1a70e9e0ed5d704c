"""Kills the job service at random moments under load, then proves that nothing was lost.

    python -m benchmarks.service_faults ENGINES

A hundred times the service is started on the same folder, asked for videos, remixes, cancellations and
deletions as fast as it takes them, and killed with SIGKILL. Whatever it answered is kept
outside. Then it is started once more, and: every accepted job is finished, or failed with a reason;
whatever had ended has ended in no other way since; every finished file is whole, decodes, and is the one
that was seen before; what was deleted is gone; no key has two jobs and no job has no key; nothing
half-written is left. The last line on stdout is JSON; a full run also writes it to
`benchmarks/results/service-faults.json`. Exit code 1 when a part of that is not so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from tests.killing import Ledger, kill_once, prove

KILLS = 100
DEEDS = 120
"""What a service is asked and answers before it is killed, at most."""
RESULT = Path(__file__).parent / "results" / "service-faults.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("engines", type=Path, help="an engine set")
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(stderr=True)
    console.print("wanted: every accepted job finished or failed with a reason, once; no finished file lost")
    ledger, began = Ledger(), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "state"
        for number in range(options.kills):
            kill_once(options.engines.resolve(), folder, ledger, options.seed + number, DEEDS)
        outcomes = prove(options.engines.resolve(), folder, ledger)
    seconds = time.monotonic() - began
    table = Table("what", "how many")
    for what, count in (
        ("kills", ledger.kills),
        ("requests", len(ledger.asked)),
        ("accepted", len(ledger.accepted)),
        ("answers lost in a kill", len(ledger.asked) - len(ledger.accepted) - len(ledger.refused)),
        ("deleted", len(ledger.deleted)),
        ("ends seen before a kill", len(ledger.ends)),
        *((f"killed with {what}", count) for what, count in sorted(ledger.killed_while.items())),
        *((f"in the end {what}", count) for what, count in sorted(outcomes.items())),
        ("wrong", len(ledger.faults)),
    ):
        table.add_row(what, str(count))
    console.print(table)
    for fault in ledger.faults[:20]:
        console.print(fault)
    result = {
        "kills": ledger.kills,
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "requests": len(ledger.asked),
        "accepted": len(ledger.accepted),
        "refused": len(ledger.refused),
        "deleted": len(ledger.deleted),
        "ends_seen": len(ledger.ends),
        "killed_with": dict(sorted(ledger.killed_while.items())),
        "outcomes": dict(sorted(outcomes.items())),
        "wrong": ledger.faults,
        "machine": machine("onnxruntime", "av"),
    }
    if options.kills >= KILLS:
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return int(bool(ledger.faults) or ledger.kills < options.kills)


if __name__ == "__main__":
    sys.exit(main())
