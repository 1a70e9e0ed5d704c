"""Every figure of a board says where it is from, and the targets are made of the boards."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from reelrt.jetson.boards import GIB, Board, boards
from reelrt.jetson.targets import FAMILIES, find

FIGURES = ("compute_capability", "memory_gib", "usable_gib", "system_gib", "bandwidth_gbs")
PEAKS = ("fp16_tflops", "int8_tops")
FILE = Path(__file__).parents[2] / "jetson" / "boards.json"


@pytest.mark.parametrize("board", boards().values(), ids=lambda board: board.name)
def test_every_figure_has_a_source_or_is_called_an_estimate(board: Board) -> None:
    assert {*FIGURES, *PEAKS} <= set(board.sources)
    assert {field.name for field in fields(Board)} >= set(board.sources)
    assert bool(board.tensorrt) == ("tensorrt" in board.sources)
    for source in board.sources.values():
        known = any(word in source for word in ("https://", "DS-", "deviceQuery", "arithmetic", "estimate"))
        assert known, source


@pytest.mark.parametrize("board", boards().values(), ids=lambda board: board.name)
def test_figures_agree_with_each_other(board: Board) -> None:
    assert 0 < board.system_gib < board.usable_gib < board.memory_gib
    assert board.free_bytes == int((board.usable_gib - board.system_gib) * GIB)
    assert board.int8_tops == pytest.approx(2 * board.fp16_tflops, rel=0.01)  # both dense
    assert board.name.endswith(f"{board.memory_gib}gb")
    assert board.shared == (board.compute_capability == "8.7")


def test_no_source_is_left_over() -> None:
    data = json.loads(FILE.read_text(encoding="utf-8"))
    used = {source for board in data["boards"].values() for source in board["source"].values()}
    assert used == set(data["sources"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_its_smallest_board(family: str) -> None:
    target = find(family)
    same = [board for name, board in boards().items() if name.startswith(family)]
    assert target.board in same
    assert target.memory_gib == min(board.memory_gib for board in same)
    assert find(target.board.name).board is target.board


def test_the_orin_nano_is_described_in_its_fastest_mode() -> None:
    nano = boards()["orin-nano-8gb"]
    assert (nano.bandwidth_gbs, nano.tensorrt["JetPack 6.2"]) == (102, "10.3")
    assert "68 GB/s" in nano.note
