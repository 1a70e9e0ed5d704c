"""Engines, built in a process of their own.

A builder holds gigabytes, cannot be interrupted from Python and may take its process down with it.
So it gets one: Ctrl-C ends it at once, its memory goes with it, and a crash becomes an error. The
parent writes one job per line, as JSON, to its standard input; it answers with one JSON event per line.
Knows nothing of engine sets.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from reelrt import errors
from reelrt.engines.recipe import Built, Job
from reelrt.errors import BackendError, ReelError
from reelrt.progress import Progress, silent

log = logging.getLogger("reelrt")

Builder = Callable[[Job, Path, Progress], Built]
"""A backend's `build`: the job, the graph in the job's precision, and whom to tell."""

_PARENT_DIES = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


class Worker:
    """Builds engines in a process of its own: one for each, or one for all that ONNX Runtime builds.

    To start ONNX Runtime's takes longer than to build a small engine, and it keeps nothing from one
    engine to the next; a TensorRT builder holds gigabytes. A context manager: the process starts with
    the first engine, and is gone when the block is left.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._noise: IO[str] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def build(self, job: Job, progress: Progress = silent) -> Built:
        """Build one engine and wait for it.

        Args:
            job: What to build; of the same backend each time.
            progress: Told of `build <stage>`, in percent where the builder says how far it is.

        Returns:
            What the builder says of the engine; the file stands at `job.output`.

        Raises:
            BackendError: The backend fails, crashes or is killed.
            OSError: A file cannot be written (the disk is full, say).
            KeyboardInterrupt: Ctrl-C; the process is gone by then.
        """
        what = f"build {job.spec.name}"
        progress(what, 0, 1)
        if self._process is None:
            self._noise = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
            self._process = _start(job.backend, self._noise)
        assert self._noise is not None
        try:
            built = _converse(self._process, job, what, progress)
            if built is None:
                code = self._process.wait()
                self._noise.seek(0)
                raise _crash(job, code, self._noise.read())
        except BaseException:
            self._process.kill()
            self._end()
            raise
        if job.backend != "onnxruntime":
            self._end()
        return built

    def _end(self) -> None:
        """Let the process end, which it does when nobody talks to it."""
        if self._process is None or self._noise is None:
            return
        try:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()
            self._process.wait()
        finally:
            self._process.kill()  # after another Ctrl-C; one that has ended is left alone
            self._process.wait()
            self._noise.close()
            self._process = self._noise = None


def _start(backend: str, noise: IO[str]) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        # Polygraphy decides by this at its import which of the two libraries it drives.
        "POLYGRAPHY_USE_TENSORRT_RTX": "1" if backend == "tensorrt_rtx" else "0",
        "POLYGRAPHY_AUTOINSTALL_DEPS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "reelrt.engines.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=noise,
        env=environment,
        encoding="utf-8",
    )


def _converse(process: subprocess.Popen[str], job: Job, what: str, progress: Progress) -> Built | None:
    """Send the job, follow the events; None when the process ended without a result."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(job.to_json()) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    total = 1
    for line in process.stdout:
        if not line.endswith("\n"):  # it died while it spoke
            return None
        event = json.loads(line)
        if "progress" in event:
            done, total = event["progress"]
            if done < total:  # the last one is told when the file is written
                progress(what, done, total)
        elif "log" in event:
            log.log(event["level"], "%s: %s", what, event["log"])
        elif "error" in event:
            raise _error(event["error"])
        else:
            progress(what, total, total)
            return Built(**event["built"])
    return None


def _crash(job: Job, code: int, noise: str) -> BackendError:
    last = " ".join(noise.strip().splitlines()[-1:])
    if code == -signal.SIGKILL:
        return BackendError(
            f"the {job.backend} builder of {job.spec.name} was killed, most likely for want of memory.",
            "Free memory, or build a smaller --size or fewer --frames.",
        )
    return BackendError(f"the {job.backend} builder of {job.spec.name} ended with status {code}: {last}")


def _error(data: Mapping[str, Any]) -> Exception:
    if data["type"] == "OSError":
        return OSError(data["errno"], data["message"], data["filename"])
    kind = getattr(errors, data["type"], BackendError)
    error: ReelError = kind(data["message"], data["remedy"])
    return error


def _describe(error: Exception, job: Job) -> dict[str, Any]:
    full = os.strerror(errno.ENOSPC)
    if full in str(error):
        return {"type": "OSError", "errno": errno.ENOSPC, "message": full, "filename": str(job.output)}
    if isinstance(error, OSError) and error.strerror:
        name = str(error.filename or job.output)
        return {"type": "OSError", "errno": error.errno, "message": error.strerror, "filename": name}
    if isinstance(error, ReelError):
        return {"type": type(error).__name__, "message": error.message, "remedy": error.remedy}
    text = " ".join(str(error).split())
    message = f"{job.backend} cannot build {job.spec.name}: {type(error).__name__}: {text}"
    return {"type": "BackendError", "message": message, "remedy": ""}


class Events:
    """The worker's side of the conversation."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def send(self, **event: Any) -> None:
        """Tell the parent one thing."""
        self._stream.write(json.dumps(event) + "\n")
        self._stream.flush()

    def progress(self, what: str, done: int, total: int) -> None:
        """A `Progress` that the parent hears; it knows what is being built."""
        del what
        self.send(progress=[done, total])


class _ToParent(logging.Handler):
    def __init__(self, events: Events) -> None:
        super().__init__(logging.INFO)
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        self._events.send(log=record.getMessage(), level=record.levelno)


def build(job: Job, progress: Progress) -> Built:
    """Build one engine in this process."""
    from reelrt.engines import onnxruntime
    from reelrt.engines.casts import cast_last
    from reelrt.engines.precision import convert
    from reelrt.engines.verified import check, read

    with tempfile.TemporaryDirectory(prefix=".reelrt-", dir=job.output.parent) as scratch:
        graph = job.graph
        on_cpu = job.backend == "onnxruntime"
        # What is not quantised of an INT8 graph is FP32: right for a CPU, FP16 is faster on a GPU.
        remainder = job.precision.startswith("int8") and not on_cpu
        if job.precision != job.graph_precision or remainder:
            graph = convert(
                job.graph,
                Path(scratch) / job.graph.name,
                job.spec,
                keep=job.keep_fp32,
                boundary=job.precision,
            )
        if not on_cpu:
            graph = cast_last(graph, Path(scratch), job.spec)
        module = "onnxruntime" if on_cpu else "tensorrt"
        builder: Builder = import_module(f"reelrt.engines.{module}").build
        built = builder(job, graph, progress)
        built_of = onnxruntime.files(job.output) if on_cpu else [graph]
        found = read(*built_of, fused=on_cpu, keep=job.keep_fp32)
        check(job, found, 0 if on_cpu else built.weight_bytes, built.inspected)
        return replace(built, layers=found.layers)


def _main() -> None:
    # The parent ends this process when it is interrupted; the terminal must not do it twice.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PARENT_DIES, signal.SIGKILL)
    # Libraries print to standard output; the parent shall see nothing there but events.
    events = Events(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    log.addHandler(_ToParent(events))
    log.setLevel(logging.INFO)
    log.propagate = False
    for line in sys.stdin:
        job = Job.from_json(json.loads(line))
        try:
            built = build(job, events.progress)
        except Exception as error:  # noqa: BLE001 (the parent tells the user)
            events.send(error=_describe(error, job))
        else:
            events.send(built=asdict(built))


if __name__ == "__main__":
    _main()
