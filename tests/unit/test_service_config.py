"""The service's configuration: what goes before what, what is refused, what is never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from reelrt.errors import InputError

pytest.importorskip("pydantic_settings", reason="the service extra is not installed")

from reelrt.service.config import read_settings, shown
from reelrt.service.guards import is_loopback, is_open, owner_of
from tests.unit.test_house import run_bare

KEY = "a-key-that-is-long-enough"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REELRT_CONFIG", "REELRT_PORT", "REELRT_API_KEYS", "REELRT_HOST", "STATE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)


def test_flags_go_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "reelrt.toml"
    file.write_text('port = 1\nqueue = 2\nslots = 3\nengines = ["a", "b"]\napi_keys = ["' + KEY + '"]\n')
    monkeypatch.setenv("REELRT_PORT", "10")
    monkeypatch.setenv("REELRT_QUEUE", "20")
    settings = read_settings({"port": 100, "slots": None}, file)
    assert (settings.port, settings.queue, settings.slots) == (100, 20, 3)
    assert (settings.engines, settings.keys) == ((Path("a"), Path("b")), (KEY,))
    monkeypatch.setenv("REELRT_CONFIG", str(file))
    assert read_settings({}).slots == 3


def test_lists_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REELRT_ENGINES", "one:two")
    monkeypatch.setenv("REELRT_API_KEYS", f"{KEY}, {KEY}-2")
    monkeypatch.setenv("REELRT_REMIX_POINTS", "0.2,0.8")
    settings = read_settings({})
    assert settings.engines == (Path("one"), Path("two"))
    assert settings.keys == (KEY, f"{KEY}-2")
    assert settings.options.remix_points == (0.2, 0.8)


def test_keys_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REELRT_API_KEYS", KEY)
    settings = read_settings({})
    assert KEY not in str(shown(settings)) + repr(settings) + str(settings)
    assert shown(settings)["api_keys"] == ["**********"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_an_open_address_needs_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=f"host {host} can be reached from other machines.*REELRT_API_KEYS"):
        read_settings({"host": host})
    monkeypatch.setenv("REELRT_API_KEYS", KEY)
    assert read_settings({"host": host}).host == host


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "prot: .*not permitted"),
        ("port = 70000", "port: .*65535"),
        ("port = [", "no TOML file"),
        ('api_keys = ["short"]', "at least 16"),
        ("remix_points = [1.5]", "remix_points.0: Input should be less than 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "reelrt.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as refused:
        read_settings({}, file)
    assert "short" not in str(refused.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.toml is no file"):
        read_settings({}, tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("LOCALHOST.", True),
        ("localhost.evil.example", False),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
    ],
)
def test_loopback_addresses(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_owners_do_not_tell_keys() -> None:
    assert owner_of(KEY) != owner_of(f"{KEY}2")
    assert KEY not in owner_of(KEY)


@pytest.mark.parametrize("path", ["/v1/videos", "/metrics", "/pagex", "/v1/videos/page/", "/health/"])
def test_only_the_page_and_the_probes_are_open(path: str) -> None:
    assert not is_open(path)


@pytest.mark.parametrize("command", ["serve engines", "list"])
def test_without_the_extra_the_commands_say_what_to_install(command: str) -> None:
    code = f"""
        sys.meta_path[0].find_spec = refuse = lambda name, path=None, target=None: (
            (_ for _ in ()).throw(ModuleNotFoundError(f"No module named {{name!r}}", name=name))
            if name in ("pydantic_settings", "httpx", "fastapi", "uvicorn") else None
        )
        sys.argv = ["reelrt", *{command.split()!r}]
        from reelrt.__main__ import main
        main()
    """
    result = run_bare(code)
    assert (result.returncode, "pip install 'reelrt[service]'" in result.stderr) == (6, True), result.stderr


@pytest.mark.parametrize("points", [(0.0, 0.5), (1.0,), (float("nan"),)])
def test_a_point_beyond_the_schedule_is_refused_at_once(points: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="remix_points"):
        read_settings({"remix_points": points})


def test_a_limit_per_key_is_none_where_there_are_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings({"per_key": 3}).options.jobs_per_owner == 0
    monkeypatch.setenv("REELRT_API_KEYS", KEY)
    assert read_settings({"per_key": 3}).options.jobs_per_owner == 3
