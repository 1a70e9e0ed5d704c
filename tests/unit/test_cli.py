"""What the command line says and how it ends, without a model: help, JSON, errors, exit codes."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from reelrt import __version__, console
from reelrt.cli import _outputs, app
from reelrt.console import EXIT_CODES, command, parse_size, progress_bars, show
from reelrt.errors import CompatibilityError, InputError, RangeError, ReelError
from reelrt.runtime.video import Video

ROOT = Path(__file__).parents[2]
runner = CliRunner()


def commands() -> list[list[str]]:
    found = [[name] for name in ("export", "build", "generate", "inspect", "plan", "doctor", "video-info")]
    return [*found, ["evaluate", "adherence"]]


def failing(error: BaseException):
    @command
    def function(as_json: bool = False, debug: bool = False) -> None:
        raise error

    return function


def end(error: BaseException, capsys: pytest.CaptureFixture[str], **options: bool) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        failing(error)(**options)
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


def test_version() -> None:
    assert runner.invoke(app, ["--version"]).stdout == f"reelrt {__version__}\n"


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_help_json_and_debug(words: list[str]) -> None:
    result = runner.invoke(app, [*words, "--help"], terminal_width=200)
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert "--debug" in result.stdout


def test_help_and_manual_list_the_same_exit_codes() -> None:
    flat = " ".join(runner.invoke(app, ["--help"]).stdout.split())
    manual = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for code, when in EXIT_CODES:
        assert f"{code} {when}" in flat
        assert f"| {code} | {when} |" in manual


def test_every_error_class_has_a_documented_exit_code() -> None:
    def family(base: type[ReelError]) -> list[type[ReelError]]:
        return [base, *(each for child in base.__subclasses__() for each in family(child))]

    assert {kind.exit_code for kind in family(ReelError)} <= {code for code, _ in EXIT_CODES}


def test_completion_is_offered() -> None:
    result = runner.invoke(
        app,
        [],
        env={"_REELRT_COMPLETE": "complete_bash", "COMP_WORDS": "reelrt ge", "COMP_CWORD": "1"},
        prog_name="reelrt",
    )
    assert result.stdout.split() == ["generate"]


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (InputError("size 7 is odd.", "Take 8."), 2, "size 7 is odd. Take 8."),
        (
            RangeError("steps", 101, "ddim takes 1 to 100"),
            2,
            "steps 101 is not available: ddim takes 1 to 100.",
        ),
        (CompatibilityError("built for 8.6."), 5, "built for 8.6."),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 7, "the disk is full (writing /x/y)."),
        (OSError(errno.ENOSPC, "No space", "/from", None, "/to"), 7, "the disk is full (writing /to)."),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 7, "the disk is full."),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 7, "/x: Permission denied."),
        (KeyboardInterrupt(), 130, "interrupted; nothing is left half-written."),
        (ValueError("two\nlines [bold]"), 1, "ValueError: two lines [bold]"),
    ],
)
def test_an_error_is_one_sentence_with_its_exit_code(error, code, sentence, capsys) -> None:
    found, out, err = end(error, capsys)
    assert (found, out) == (code, "")
    assert err.startswith(f"Error: {sentence}")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_a_refused_file_has_its_own_exit_code_whoever_words_it(capsys) -> None:
    error = InputError("cannot write to /x: No space left on device.")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert end(error, capsys)[0] == 7


def test_debug_shows_the_traceback(capsys) -> None:
    code, _, err = end(InputError("no."), capsys, debug=True)
    assert code == 2
    assert "Traceback" in err


def test_an_error_is_json_too(capsys) -> None:
    code, out, err = end(InputError("size 7 is odd.", "Take 8."), capsys, as_json=True)
    wanted = {"type": "InputError", "message": "size 7 is odd.", "remedy": "Take 8.", "exit_code": 2}
    assert json.loads(out) == {"error": wanted}
    assert code == 2
    assert "size 7 is odd" in err


def test_our_warnings_are_a_line_and_those_of_others_are_not_shown(capsys) -> None:
    @command
    def function(as_json: bool = False, debug: bool = False) -> None:
        warnings.warn_explicit("the prompt is too long", UserWarning, "x", 1, module="reelrt.runtime.text")
        warnings.warn_explicit("tracing is inexact", UserWarning, "x", 1, module="torch.onnx")

    function()
    captured = capsys.readouterr()
    assert captured.err == "Warning: the prompt is too long\n"
    assert captured.out == ""


def test_results_for_people_carry_units(capsys) -> None:
    stages = {"step": {"precision": "fp16", "weight_bytes": 3 << 20}, "vae": {"precision": "fp32"}}
    show({"peak_memory_bytes": 1 << 30, "seconds": {"text": 0.5}, "stages": stages, "ok": True}, False)
    out = capsys.readouterr().out
    assert re.search(r"peak memory\s+1,024\.0 MiB", out)
    assert re.search(r"text\s+0\.50 s", out)
    assert re.search(r"step\s+fp16\s+3\.0 MiB", out)
    assert re.search(r"vae\s+fp32\s+-", out)


def test_json_keeps_every_letter(capsys) -> None:
    show({"prompt": "ein Kreis, größer", "path": Path("a")}, True)
    out = capsys.readouterr().out
    assert "größer" in out
    assert json.loads(out) == {"prompt": "ein Kreis, größer", "path": "a"}


def test_progress_in_a_log_is_one_line_per_finished_thing(capsys) -> None:
    with progress_bars() as progress:
        for done in range(5):
            progress("denoise", done, 4)
    assert re.fullmatch(r"denoise: \d+\.\d s\n", capsys.readouterr().err)


def test_progress_on_a_terminal_shows_what_and_how_far(monkeypatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "errors", Console(file=screen, force_terminal=True, width=120))
    with progress_bars() as progress:
        progress("denoise", 4, 25)
    assert "denoise" in screen.getvalue()
    assert "4/25" in screen.getvalue()


def test_sizes_are_width_by_height() -> None:
    assert parse_size("832x448") == (832, 448)
    assert parse_size("64X48") == (64, 48)
    assert parse_size(None) is None
    for text in ("64", "x64", "64x", "-8x8", "64x64x3", "8.5x8", ""):
        with pytest.raises(InputError, match="WIDTHxHEIGHT"):
            parse_size(text)


def test_several_prompts_number_their_files() -> None:
    assert _outputs(Path("a/red.mp4"), 1) == [Path("a/red.mp4")]
    assert _outputs(Path("a/red.mp4"), 2) == [Path("a/red-1.mp4"), Path("a/red-2.mp4")]


@pytest.mark.parametrize(
    "words",
    [
        ["build", "x", "-o", "y", "--backend", "cuda"],
        ["generate", "x"],
        ["nothing"],
        ["generate", "--steps", "few"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(words: list[str]) -> None:
    result = runner.invoke(app, words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr


def test_video_info_reads_back_what_save_wrote(tmp_path: Path) -> None:
    metadata = {"reelrt": __version__, "prompt": "a red circle", "seed": 7}
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    path = Video(frames, np.zeros((1, 4, 4, 4, 4), np.float32), metadata).save(tmp_path / "red.mp4")
    assert json.loads(runner.invoke(app, ["video-info", str(path), "--json"]).stdout) == metadata
    assert "a red circle" in runner.invoke(app, ["video-info", str(path)]).stdout


def test_video_info_of_something_else_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"no video")
    result = runner.invoke(app, ["video-info", str(tmp_path / "x.mp4")])
    assert result.exit_code == 2
    assert result.stdout == ""


def test_unwritable_output_is_found_before_anything_is_loaded() -> None:
    result = runner.invoke(app, ["generate", "no-such-engines", "x", "-o", "red.avi"])
    assert result.exit_code == 2
    assert ".avi" in result.stderr


def test_sigterm_leaves_a_document_too(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("reelrt.stopping._Stop.number", signal.SIGTERM)
    code, out, errors = end(SystemExit(143), capsys, as_json=True)
    assert (code, json.loads(out)["error"]["exit_code"]) == (143, 143)
    assert errors == "Error: interrupted; nothing is left half-written.\n"


def test_another_end_of_the_process_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert end(SystemExit(3), capsys, as_json=True) == (3, "", "")


def test_a_copy_that_fails_names_the_file_that_could_not_be_written(capsys) -> None:
    error = OSError(errno.EFBIG, os.strerror(errno.EFBIG), "from", None, "to")
    assert end(error, capsys)[2] == "Error: to: File too large.\n"
