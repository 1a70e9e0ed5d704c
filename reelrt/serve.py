"""`reelrt serve`: the flags of the service's configuration, and its start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reelrt.console import Debug, Json, command, note, show
from reelrt.errors import BackendError

Flag = typer.Option


@command
def serve(
    engines: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[ENGINES]...", help="Engine sets that `reelrt build` wrote."),
    ] = None,
    host: Annotated[str | None, Flag(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, Flag(help="Port; 0 takes a free one.", show_default="8000")] = None,
    grpc_port: Annotated[
        int | None, Flag(help="Port of the gRPC door; 0 takes a free one.", show_default="no such door")
    ] = None,
    data: Annotated[
        Path | None,
        Flag(help="Folder of the jobs and the videos.", show_default="~/.local/state/reelrt"),
    ] = None,
    slots: Annotated[int | None, Flag(help="Most videos in a batch.", show_default="4")] = None,
    queue: Annotated[int | None, Flag(help="Most jobs that wait.", show_default="64")] = None,
    threads: Annotated[
        int | None, Flag(help="CPU threads of each engine.", show_default="one per physical core")
    ] = None,
    config: Annotated[
        Path | None, Flag(metavar="FILE", help="TOML file with any setting.", show_default="$REELRT_CONFIG")
    ] = None,
    show_config: Annotated[
        bool, Flag("--show-config", help="Print the configuration, keys masked, and end.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve videos over HTTP, with a page at /; docs/service.md has the routes and all settings.

    Flags go before REELRT_... variables, and these before the TOML file. Without an API key
    (REELRT_API_KEYS) only this machine is listened to.
    """
    try:
        from reelrt.service.config import read_settings, shown
        from reelrt.service.server import serve as run
    except ModuleNotFoundError as error:
        raise BackendError(
            f"the service needs {error.name}, which is not installed.", "pip install 'reelrt[service]'"
        ) from error

    flags: dict[str, Any] = {
        "engines": tuple(engines) if engines else None,
        "host": host,
        "port": port,
        "grpc_port": grpc_port,
        "data": data,
        "slots": slots,
        "queue": queue,
        "threads": threads,
    }
    settings = read_settings(flags, config)
    if show_config:
        show(shown(settings), as_json)
        return

    def started(addresses: dict[str, str], models: list[str]) -> None:
        if as_json:
            show({**addresses, "models": models, "data": settings.data}, as_json)
        else:
            note(f"Serving {', '.join(models)} at {', '.join(addresses.values())}; Ctrl-C stops.")

    run(settings, started)
    if not as_json:
        note("Stopped; what was not finished goes on at the next start.")
