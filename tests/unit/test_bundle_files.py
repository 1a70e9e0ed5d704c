"""Folders appear whole or not at all, and damage to any file is noticed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from reelrt.bundle.files import BLOCK_BYTES, atomic_files, atomic_folder, hash_folder, sha256, verify
from reelrt.errors import InputError, IntegrityError

OLD = json.dumps({"kind": "bundle", "files": {}})


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_sha256_of_a_file_longer_than_a_block(tmp_path):
    data = bytes(range(256)) * (BLOCK_BYTES // 256 + 3)
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_every_file_but_the_manifest_is_hashed(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("manifest.json", "b", "a", "sub/c"):
        (tmp_path / name).write_text(name)
    hashes = hash_folder(tmp_path)
    assert list(hashes) == ["a", "b", "sub/c"]
    verify(tmp_path, hashes)


def test_damage_is_named(tmp_path):
    (tmp_path / "a").write_text("one")
    hashes = hash_folder(tmp_path)
    (tmp_path / "a").write_text("two")
    with pytest.raises(IntegrityError, match=r"a is damaged: its SHA-256 is 3fc4ccfe7458"):
        verify(tmp_path, hashes)
    (tmp_path / "a").unlink()
    with pytest.raises(IntegrityError, match="a is missing"):
        verify(tmp_path, hashes)


def test_a_folder_is_written(tmp_path):
    target = tmp_path / "deep" / "bundle"
    with atomic_folder(target, "bundle") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
        assert not target.exists()
    assert contents(target) == {"sub/a": "a"}
    assert [p.name for p in target.parent.iterdir()] == ["bundle"]


def test_a_bundle_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "manifest.json").write_text(json.dumps({"kind": "bundle", "files": {"leftover": "00"}}))
    (target / "leftover").write_text("old")
    with atomic_folder(target, "bundle") as folder:
        (folder / "manifest.json").write_text("new")
    assert contents(target) == {"manifest.json": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interruption_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "manifest.json").write_text(OLD)
    with pytest.raises(error), atomic_folder(target, "bundle") as folder:
        (folder / "manifest.json").write_text("half")
        raise error
    assert contents(tmp_path) == {"bundle/manifest.json": OLD}


@pytest.mark.parametrize("moment", ["rename 1", "rename 2", "rmtree 1", "rmtree 2"])
def test_an_interruption_of_the_replacement_leaves_one_whole_folder(tmp_path, monkeypatch, moment):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "manifest.json").write_text(OLD)
    calls = []

    def interrupted(name, function):
        def call(*args, **options):
            calls.append(name)
            if f"{name} {calls.count(name)}" == moment:
                raise KeyboardInterrupt
            return function(*args, **options)

        return call

    monkeypatch.setattr(Path, "rename", interrupted("rename", Path.rename))
    monkeypatch.setattr(shutil, "rmtree", interrupted("rmtree", shutil.rmtree))
    with pytest.raises(KeyboardInterrupt), atomic_folder(target, "bundle") as folder:
        (folder / "manifest.json").write_text("new")
    assert contents(tmp_path) == {"bundle/manifest.json": OLD if "rename" in moment else "new"}


def test_an_interruption_leaves_nothing_where_nothing_was(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "bundle", "bundle"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jpg": "a"}, "exists and is not a bundle to replace"),
        ({"manifest.json": '{"name": "my web page"}', "a.jpg": "a"}, "exists and is not a bundle to replace"),
        ({"manifest.json": "damaged", "a.jpg": "a"}, "exists and is not a bundle to replace"),
        ({"manifest.json": '{"kind": "engines", "files": {}}'}, r"exists \('engines'\) and is not a bundle"),
        (
            {"manifest.json": '{"kind": "bundle", "files": {"b": ""}}', "a.jpg": "a"},
            r"holds a\.jpg, which is no",
        ),
    ],
)
def test_what_is_somebody_elses_is_never_replaced(tmp_path, files, message):
    target = tmp_path / "target"
    target.mkdir()
    for name, text in files.items():
        (target / name).write_text(text)
    with pytest.raises(InputError, match=message), atomic_folder(target, "bundle"):
        pass
    assert contents(target) == files
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_file_is_never_replaced(tmp_path):
    (tmp_path / "file").write_text("f")
    with pytest.raises(InputError, match="is a file"), atomic_folder(tmp_path / "file", "bundle"):
        pass
    assert contents(tmp_path) == {"file": "f"}


def test_a_damaged_bundle_is_replaced(tmp_path):
    target = tmp_path / "bundle"
    target.mkdir()
    for name in ("manifest.json", "schedules.safetensors"):
        (target / name).write_text("damaged")
    with atomic_folder(target, "bundle") as folder:
        (folder / "manifest.json").write_text("new")
    assert contents(tmp_path) == {"bundle/manifest.json": "new"}


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (real / "manifest.json").write_text(OLD)
    (tmp_path / "link").symlink_to(real)
    with atomic_folder(tmp_path / "link", "bundle") as folder:
        (folder / "manifest.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert contents(real) == {"manifest.json": "new"}
    assert {path.name for path in tmp_path.iterdir()} == {"link", "real"}


def test_the_folder_a_command_runs_in_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "manifest.json").write_text(OLD)
    with pytest.raises(InputError, match="is in use"), atomic_folder(Path(), "bundle"):
        pass
    assert contents(tmp_path) == {"manifest.json": OLD}


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "bundle").mkdir()
    with atomic_folder(tmp_path / "bundle", "bundle") as folder:
        (folder / "a").write_text("a")
    assert contents(tmp_path) == {"bundle/a": "a"}


def test_an_impossible_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot write to .*file"),
        atomic_folder(tmp_path / "file" / "bundle", "bundle"),
    ):
        pass


def test_files_take_their_places_together_or_not_at_all(tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.PNG"]
    paths[0].write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_files(paths) as partial:
        partial[0].write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"a.json": "old"}
    with atomic_files(paths) as partial:
        assert [path.suffix for path in partial] == [".json", ".png"]
        for path in partial:
            path.write_text("new")
    assert contents(tmp_path) == {"a.json": "new", "b.PNG": "new"}


def test_no_file_is_replaced_when_one_cannot_be(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    paths[0].write_text("old")
    paths[1].mkdir()
    with pytest.raises(IsADirectoryError), atomic_files(paths) as partial:
        for path in partial:
            path.write_text("new")
    assert contents(tmp_path) == {"a": "old"}
