"""A plan adds up, its remedies are plans themselves, and what cannot fit is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reelrt.bundle.manifest import Bundle, EngineSet
from reelrt.bundle.spec import Range
from reelrt.cli import app
from reelrt.engines.builder import build_engines
from reelrt.engines.memory import (
    CONTEXT_BYTES,
    Plan,
    Planner,
    Video,
    available,
    plan_of_engines,
)
from reelrt.engines.remedies import check_fits, find_remedies
from reelrt.engines.roofline import bounds, peak_flops
from reelrt.errors import InputError, PlanError, RangeError
from reelrt.jetson.boards import boards
from reelrt.jetson.targets import find
from tests.graphs import GEOMETRY, quantised, tiny_bundle

runner = CliRunner()
VIDEO = Video(48, 32, 4, 1, "fp16", "split")
HUGE = replace(VIDEO, width=16384, height=16384, frames=64, batch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("plan") / "bundle")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return Bundle.load(folder)


@pytest.fixture(scope="module")
def engines(folder: Path) -> Path:
    return build_engines(folder, folder.with_name("engines"), backend="onnxruntime").folder


@pytest.fixture
def planner(bundle: Bundle) -> Planner:
    return Planner(bundle, find("rtx3060"))


def test_the_state_exists_twice_and_the_table_once(planner: Planner) -> None:
    state = 4 * GEOMETRY.state_rows * 4 * 4 * (32 // 8) * (48 // 8)
    table, text, counter = 4 * 200 * GEOMETRY.table_columns, 2 * 2 * 8 * 32, 8
    assert planner.plan(VIDEO).stages["step"].state_bytes == 2 * (state + counter) + table + text


def test_peaks_are_sums_of_the_stages(planner: Planner) -> None:
    plan = planner.plan(VIDEO)
    need = plan.stages
    alone = {name: n.weight_bytes + n.activation_bytes + n.state_bytes for name, n in need.items()}
    assert plan.peaks["staged"] == CONTEXT_BYTES + max(alone.values())
    assert plan.peaks["streamed"] <= plan.peaks["staged"] <= plan.peaks["all"]
    assert plan.peaks["all"] >= CONTEXT_BYTES + sum(n.weight_bytes for n in need.values())
    assert plan.frame_bytes == 3 * 48 * 32 * 4


def test_streaming_gains_nothing_where_cpu_and_gpu_share_the_memory(bundle: Bundle) -> None:
    plan = Planner(bundle, find("orin-nano-8gb")).plan(VIDEO)
    assert plan.peaks["streamed"] == plan.peaks["staged"]
    assert plan.available_bytes == boards()["orin-nano-8gb"].free_bytes


def test_two_videos_need_more_than_one(planner: Planner) -> None:
    one, two = (planner.plan(replace(VIDEO, batch=batch)).stages["step"] for batch in (1, 2))
    assert two.activation_bytes > one.activation_bytes
    assert two.state_bytes == 2 * one.state_bytes


def test_remedies_are_plans_of_their_own(planner: Planner) -> None:
    found = {each.what: each for each in find_remedies(planner, HUGE)}
    one = planner.plan(replace(HUGE, batch=1))
    assert found["--batch 1"].peak_bytes == one.peaks[found["--batch 1"].policy]
    assert any(each.fits for each in found.values())
    last = [each for each in found.values() if each.fits][-1]
    assert last.peak_bytes <= available(find("rtx3060"))


def test_what_fits_nowhere_is_refused_with_what_does(planner: Planner) -> None:
    with pytest.raises(PlanError, match=r"needs .* GiB at least, and rtx3060 leaves 5.50 GiB") as refused:
        check_fits(planner, HUGE)
    assert "What fits: " in refused.value.remedy
    assert refused.value.exit_code == 9
    assert check_fits(planner, VIDEO).fits["all"]


def test_what_fits_only_with_streamed_weights_asks_for_them(planner: Planner) -> None:
    plan = planner.plan(VIDEO)
    tight = replace(plan, available_bytes=plan.peaks["staged"] - 1)
    assert [policy for policy, fits in tight.fits.items() if fits] == ["streamed"]

    class Tight(Planner):
        def plan(self, video: Video) -> Plan:
            return tight

    tighter = Tight(planner.bundle, tight.target)
    with pytest.raises(PlanError, match=r"only with the step's weights streamed .*--weight-streaming"):
        check_fits(tighter, VIDEO, weight_streaming=False)
    assert check_fits(tighter, VIDEO, weight_streaming=True) is tight
    assert check_fits(planner, VIDEO, weight_streaming=False).fits["all"]


def test_a_target_without_known_memory_asks_for_a_board(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="memory of target sm86 .* is not known.*rtx3060-laptop-6gb"):
        Planner(bundle, find("sm86")).plan(VIDEO)


def test_a_size_the_model_cannot_make_is_refused(planner: Planner) -> None:
    with pytest.raises(RangeError, match="width 50"):
        planner.plan(replace(VIDEO, width=50))


def test_the_bound_is_arithmetic_over_peak_or_bytes_over_bandwidth(planner: Planner) -> None:
    board = boards()["rtx3060-12gb"]
    plan = planner.plan(VIDEO)
    found = bounds(plan, board, launches=50)
    cost = plan.stages["step"].cost
    assert cost is not None
    arithmetic = cost.flops / (board.fp16_tflops * 1e12)
    memory = (cost.weight_bytes + cost.boundary_bytes) / (board.bandwidth_gbs * 1e9)
    assert found["step"].seconds == pytest.approx(50 * max(arithmetic, memory))
    assert found["step"].limit == ("memory" if memory > arithmetic else "arithmetic")
    assert peak_flops(board, "int8") == pytest.approx(2 * peak_flops(board, "int8-weights"), rel=0.01)


def test_an_impossible_build_is_refused_before_anything_is_built(folder, tmp_path) -> None:
    with pytest.raises(PlanError, match="What fits"):
        build_engines(folder, tmp_path / "engines", target="rtx3060", size=(16384, 16384), frames=64, batch=2)
    assert list(tmp_path.iterdir()) == []


def plan(*words: object, code: int = 0) -> dict:
    result = runner.invoke(app, ["plan", *map(str, words), "--json"])
    assert result.exit_code == code, result.output
    document: dict = json.loads(result.stdout)
    return document


def test_the_command_prints_one_document(folder: Path) -> None:
    found = plan(folder, "--target", "orin-nx-16gb", "--steps", 2, "--guidance", 3)
    assert found["fits"]
    assert found["remedies"] == []
    assert found["video"] == {**found["video"], "width": 48, "height": 32, "frames": 4, "precision": "fp16"}
    assert found["roofline"]["stages"]["step"]["launches"] == 4  # two rows of the table for each step
    assert found["roofline"]["least_seconds"] > 0
    assert "fp16_tflops" in found["roofline"]["sources"]


def test_the_command_ends_with_its_own_code_when_nothing_fits(folder: Path) -> None:
    words = ("--size", "16384x16384", "--frames", 64, "--steps", 2, "--target", "orin-nano")
    found = plan(folder, *words, code=9)
    assert not found["fits"]
    assert found["remedies"]
    assert "orin-nano leaves" in found["error"]


def test_people_read_the_bound_as_a_bound(folder: Path) -> None:
    result = runner.invoke(app, ["plan", str(folder), "--target", "rtx4060", "--steps", "2"])
    assert "least time (a bound, no prediction)" in result.stdout
    assert "no video faster than" in result.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("--target", "rtx9999"),
        ("--target", ""),
        ("--size", "50x50"),
        ("--batch", "0"),
        ("--guidance", "nan"),
        ("--guidance", "-5"),
    ],
)
def test_wrong_input_ends_with_2(folder: Path, words: tuple[str, ...]) -> None:
    assert plan(folder, "--steps", 2, *words, code=2)["error"]["exit_code"] == 2


def test_an_unknown_board_lists_those_there_are(folder: Path) -> None:
    remedy = plan(folder, "--target", "orin-nx-12gb", code=2)["error"]["remedy"]
    assert "orin-nx-16gb" in remedy


def test_host_is_planned_from_its_own_memory(folder: Path) -> None:
    found = plan(folder, "--steps", 2)
    assert found["target"] == "host"
    assert found["memory"]["available_bytes"] > 0


@pytest.mark.parametrize(
    "words",
    [
        ("--size", "64x64"),
        ("--frames", "4"),
        ("--batch", "2"),
        ("--precision", "int8"),
        ("--steps", "4"),
        ("--guidance", "1"),
    ],
)
def test_engines_alone_take_no_option_that_would_be_ignored(engines: Path, words) -> None:
    made = runner.invoke(app, ["plan", str(engines), *words])
    assert made.exit_code == 2
    assert f"{words[0]} cannot be given with an engine set alone" in " ".join(made.output.split())


def test_an_int8_bundle_needs_the_activations_of_the_fp32_one_it_was_made_of(
    bundle: Bundle, tmp_path
) -> None:
    """What lies between the pairs of an INT8 graph is stored as FP32 and runs as FP16."""
    video = replace(VIDEO, precision="int8")
    made = quantised(bundle, tmp_path / "int8", ["in_weight", "out_weight"])
    before, after = (Planner(each, find("rtx3060")).plan(video).stages["step"] for each in (bundle, made))
    assert after.activation_bytes == before.activation_bytes
    assert after.cost is not None
    assert before.cost is not None
    assert after.cost.kernel_bytes == pytest.approx(before.cost.kernel_bytes, rel=0.2)


def test_the_builders_numbers_count_only_where_the_engines_run(bundle: Bundle, tmp_path: Path) -> None:
    built = _engines_with_numbers(bundle, tmp_path)
    same, other = (Planner(bundle, find(name), built).plan(VIDEO) for name in ("rtx3060-12gb", "orin-agx"))
    assert {need.source for need in same.stages.values()} == {"builder"}
    assert {need.source for need in other.stages.values()} == {"estimate"}
    assert plan_of_engines(built, find("rtx3060-12gb")).stages["step"].source == "builder"
    with pytest.raises(InputError, match=r"does not run on orin-agx \(8\.7\)"):
        plan_of_engines(built, find("orin-agx"))


def _engines_with_numbers(bundle: Bundle, folder: Path) -> EngineSet:
    """An engine set as a builder for an RTX 3060 would report it."""
    built = build_engines(bundle.folder, folder / "engines", backend="onnxruntime")
    sizes = Planner(bundle, find("rtx3060")).sizes(VIDEO)
    engines = {
        name: replace(
            engine,
            precision="fp16",
            activation_bytes=1000,
            profile={axis: Range(1, size, size) for axis, size in sizes[name].items()},
        )
        for name, engine in built.engines.items()
    }
    return replace(built, engines=engines, target="rtx3060", compute_capability="8.6")
