"""The service's configuration: flags before environment before a TOML file before these defaults.

Checked once, when it is made. Knows no engine set: what engines can do, they say themselves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from reelrt.errors import InputError
from reelrt.service.guards import is_loopback
from reelrt.service.options import ServiceOptions

SHORTEST_KEY = 16
"""Characters of an API key: what is shorter is guessed."""
PREFIX = "REELRT_"
CONFIG_FILE = "REELRT_CONFIG"
"""Environment variable that names the TOML file where no flag does."""


def _data_folder() -> Path:
    """Where systemd or the user's desktop wants it."""
    if state := os.environ.get("STATE_DIRECTORY"):
        return Path(state.split(":")[0])
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "reelrt"


class Settings(BaseSettings):
    """Everything that can be set.

    Raises:
        pydantic.ValidationError: A value is not possible; `read_settings` says it in a sentence.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    engines: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="Engine sets to serve; in the environment parted by `:`."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port; 0 takes a free one.")
    grpc_port: int | None = Field(
        None, ge=0, le=65535, description="Port of the gRPC door; none: no such door."
    )
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="Keys that may use the service; in the environment parted by commas. None: anybody may.",
    )
    data: Path = Field(default_factory=_data_folder, description="Folder of the job store and the results.")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of each engine.")

    slots: int = Field(4, ge=1, le=64, description="Most videos in the batch at once.")
    queue: int = Field(64, ge=1, le=10_000, description="Most jobs that wait; more are answered 429.")
    per_key: int = Field(
        16, ge=0, le=10_000, description="Most jobs of one key that wait or run; 0: no limit."
    )
    preview_every: int = Field(5, ge=0, le=1000, description="Launches between preview pictures; 0: none.")
    retention_hours: float = Field(
        168, gt=0, le=87_600, description="Hours that a job and its files are kept."
    )
    quota_mb: int = Field(8192, ge=1, le=10**9, description="Most disk space of the results, in MiB.")
    trajectory_mb: int = Field(
        256, ge=0, le=10**9, description="Disk space of what remixes go on from, in MiB."
    )
    remix_points: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], NoDecode] = Field(
        (0.25, 0.5, 0.75), description="Shares of the schedule from which a video can be remixed."
    )

    most_body: int = Field(1_048_576, ge=1024, le=2**30, description="Largest request body, in bytes.")
    body_seconds: float = Field(
        15, gt=0, le=3600, description="Longest time of a request's head, and of its body."
    )
    sync_seconds: float = Field(600, gt=0, le=86_400, description="Longest time `/v1/videos/sync` waits.")
    streams: int = Field(64, ge=1, le=10_000, description="Most event streams open at once.")
    connections: int = Field(1024, ge=16, le=100_000, description="Most connections open at once.")
    stop_seconds: float = Field(30, ge=0, le=3600, description="Time that running jobs get to end at a stop.")

    @field_validator("engines", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        return tuple(value.split(os.pathsep)) if isinstance(value, str) else value

    @field_validator("remix_points", mode="before")
    @classmethod
    def _points(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("api_keys", mode="before")
    @classmethod
    def _keys(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("api_keys")
    @classmethod
    def _long_keys(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for key in value:
            secret = key.get_secret_value()
            if (
                len(secret) < SHORTEST_KEY
                or not secret.isascii()
                or not secret.isprintable()
                or " " in secret
            ):
                raise ValueError(f"a key has at least {SHORTEST_KEY} printable ASCII characters, no space")
        return value

    @model_validator(mode="after")
    def _closed_door(self) -> Settings:
        """Refuse to let a whole network in."""
        if not self.api_keys and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached from other machines, and no API key is set; "
                f"set {PREFIX}API_KEYS, or listen on 127.0.0.1"
            )
        return self

    @property
    def options(self) -> ServiceOptions:
        """What of it concerns the job service."""
        return ServiceOptions(
            folder=self.data,
            slots=self.slots,
            queue_size=self.queue,
            jobs_per_owner=self.per_key if self.api_keys else 0,  # without keys nobody is told apart
            preview_every=self.preview_every,
            retention=self.retention_hours * 3600,
            quota=self.quota_mb * 2**20,
            trajectory_bytes=self.trajectory_mb * 2**20,
            remix_points=self.remix_points,
            threads=self.threads,
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """The API keys in the clear."""
        return tuple(key.get_secret_value() for key in self.api_keys)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 (pydantic-settings calls by name)
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment; `read_settings` adds the file."""
        return init_settings, env_settings


def read_settings(flags: Mapping[str, Any], file: Path | None = None) -> Settings:
    """The configuration of flags, environment and a TOML file.

    Args:
        flags: What the command line says; None stands for nothing said.
        file: TOML file; by default the one that `REELRT_CONFIG` names, if it does.

    Raises:
        InputError: The file cannot be read, or a value is not possible.
    """
    named = os.environ.get(CONFIG_FILE)
    file = file or (Path(named) if named else None)
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return _with_file(file)(**given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        text = str(first["msg"]).removeprefix("Value error, ")
        known = "See `reelrt serve --help`." if first["type"] == "extra_forbidden" else ""
        raise InputError(f"{where}: {text}." if where else f"{text}.", known) from error


def _with_file(file: Path | None) -> type[Settings]:
    """`Settings` that read a file, too."""
    if file is None:
        return Settings
    if sys.version_info >= (3, 11):
        from tomllib import TOMLDecodeError
    else:
        from tomli import TOMLDecodeError
    if not file.is_file():
        raise InputError(f"{file} is no file.", "Name a TOML file, or none.")
    try:
        source = TomlConfigSettingsSource(Settings, file)
    except (TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is no TOML file: {error}.") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from error

    class SettingsOfFile(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],  # noqa: ARG003
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, source

    return SettingsOfFile


def shown(settings: Settings) -> dict[str, Any]:
    """The configuration as plain values; keys are masked."""
    plain: dict[str, Any] = settings.model_dump(mode="json")
    plain["api_keys"] = ["**********" for _ in settings.api_keys]
    return plain
