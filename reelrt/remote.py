"""The commands that talk to a running service: `submit`, `watch`, `list` and `cancel`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reelrt.console import Debug, Json, Solver, command, note, parse_size, progress_bars, show
from reelrt.errors import BackendError, ServiceError

if TYPE_CHECKING:
    from reelrt.client import Client

Url = Annotated[
    str | None, typer.Option(help="Address of the service.", show_default="$REELRT_URL, else 127.0.0.1:8000")
]
Id = Annotated[str, typer.Argument(metavar="ID", help="A video's id, as `submit` and `list` show it.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="File to write the video to, when it is done.")
]
LISTED = ("id", "status", "progress", "prompt")


@command
def submit(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the video shall show.")],
    output: Output = None,
    watch: Annotated[bool, typer.Option("--watch", help="Wait until it is done, as --output does.")] = False,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="25")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; 1 is none.", show_default="the model's")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise.", show_default="drawn")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the video shall not show.")] = None,
    solver: Annotated[Solver | None, typer.Option(help="Sampler.", show_default="the model's")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Picture, in pixels.", show_default="the model's")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames.", show_default="the model's")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second.", show_default="8")] = None,
    model: Annotated[str | None, typer.Option(help="Model.", show_default="the service's first")] = None,
    priority: Annotated[
        int | None, typer.Option(help="-10 to 10; higher goes first.", show_default="0")
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds after which it is no longer wanted.", show_default="none")
    ] = None,
    remix: Annotated[str | None, typer.Option(metavar="ID", help="A finished video to vary.")] = None,
    remix_from: Annotated[
        float | None, typer.Option(help="Share of its schedule to take over.", show_default="0.5")
    ] = None,
    url: Url = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Ask a running service for a video; with --output, wait for it and fetch it."""
    common: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "guidance_scale": guidance,
        "fps": fps,
        "priority": priority,
        "deadline_s": deadline,
        "format": output.suffix[1:].lower() if output and output.suffix.lower() == ".webm" else None,
    }
    own: dict[str, Any] = {
        "num_inference_steps": steps,
        "seed": seed,
        "solver": solver,
        "num_frames": frames,
        "model": model,
    }
    if pair := parse_size(size):
        own |= {"size": f"{pair[0]}x{pair[1]}"}
    with _client(url) as client:
        if remix is None:
            video = client.create(prompt, **common, **own)
        else:  # the service says which of the own ones are too many
            video = client.remix(remix, prompt, remix_from=remix_from, **common, **own)
        if output is None and not watch:
            show(video if as_json else _brief(video), as_json)
        else:
            _follow(client, str(video["id"]), output, as_json)


@command
def watch(
    video_id: Id, output: Output = None, url: Url = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Follow a video of a running service until it is over; with --output, fetch it then."""
    with _client(url) as client:
        _follow(client, video_id, output, as_json)


@command
def list_videos(
    limit: Annotated[int, typer.Option(help="Most videos to show.")] = 20,
    after: Annotated[str | None, typer.Option(metavar="ID", help="Begin behind this one.")] = None,
    url: Url = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the videos of a running service, the newest first."""
    with _client(url) as client:
        page = client.list(after=after, limit=limit)
    if as_json:
        show(page, as_json)
    elif page["data"]:
        show({"videos": [{name: video[name] for name in LISTED} for video in page["data"]]}, as_json)
        if page["has_more"]:
            note(f"Older ones: `reelrt list --after {page['last_id']}`.")
    else:
        note("There are no videos.")


@command
def cancel(
    video_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Videos to cancel and remove.")],
    url: Url = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Cancel videos of a running service, and remove them with their files."""
    with _client(url) as client:
        answers = [client.delete(each) for each in video_ids]
    if as_json:
        show({"cancelled": answers}, as_json)
    else:
        note(f"Removed {', '.join(video_ids)}.")


@contextmanager
def _client(url: str | None) -> Iterator[Client]:
    try:
        from reelrt.client import Client
    except ModuleNotFoundError as error:
        raise BackendError(
            f"this command needs {error.name}, which is not installed.", "pip install 'reelrt[service]'"
        ) from error
    with Client(url) as client:
        yield client


def _follow(client: Client, video_id: str, output: Path | None, as_json: bool) -> None:
    with progress_bars() as progress:

        def told(name: str, data: dict[str, Any]) -> None:
            if name == "video" and data["status"] in ("in_progress", "completed"):
                progress("video", data["progress"], 100)

        video = client.wait(video_id, told)
    if video["status"] != "completed":
        error = video["error"] or {"message": f"{video_id} has {video['status']}."}
        raise ServiceError(error["message"])
    path = str(client.download(video_id, output)) if output else None
    show({**video, "path": path} if as_json else {**_brief(video), "wrote": path}, as_json)


def _brief(video: Mapping[str, Any]) -> dict[str, Any]:
    """What people read of a video."""
    names = ("id", "status", "model", "size", "num_frames", "num_inference_steps", "guidance_scale", "seed")
    head = {name: video[name] for name in names}
    if video["queue_position"] is not None:
        head["before it"] = video["queue_position"]
    if video["inference_time_s"] is not None:
        head["took_seconds"] = video["inference_time_s"]
    return head
