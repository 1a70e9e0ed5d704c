"""Folders appear whole or not at all, and damage to any file is noticed."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from reelrt.bundle.files import BLOCK_BYTES, atomic_files, atomic_folder, hash_folder, sha256, verify
from reelrt.errors import InputError, IntegrityError


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
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
        assert not target.exists()
    assert contents(target) == {"sub/a": "a"}
    assert [p.name for p in target.parent.iterdir()] == ["bundle"]


def test_a_bundle_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "manifest.json").write_text("old")
    (target / "leftover").write_text("old")
    with atomic_folder(target) as folder:
        (folder / "manifest.json").write_text("new")
    assert contents(target) == {"manifest.json": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interruption_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "manifest.json").write_text("old")
    with pytest.raises(error), atomic_folder(target) as folder:
        (folder / "manifest.json").write_text("half")
        raise error
    assert contents(tmp_path) == {"bundle/manifest.json": "old"}


@pytest.mark.parametrize("moment", ["rename 1", "rename 2", "rmtree 1", "rmtree 2"])
def test_an_interruption_of_the_replacement_leaves_one_whole_folder(tmp_path, monkeypatch, moment):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "manifest.json").write_text("old")
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
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as folder:
        (folder / "manifest.json").write_text("new")
    assert contents(tmp_path) == {"bundle/manifest.json": "old" if "rename" in moment else "new"}


def test_an_interruption_leaves_nothing_where_nothing_was(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "bundle"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_foreign_folders_and_files_are_never_replaced(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_text("a")
    (tmp_path / "file").write_text("f")
    for target in (photos, tmp_path / "file"):
        with pytest.raises(InputError, match="neither empty nor a bundle"), atomic_folder(target):
            pass
    assert contents(tmp_path) == {"photos/a.jpg": "a", "file": "f"}


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "bundle").mkdir()
    with atomic_folder(tmp_path / "bundle") as folder:
        (folder / "a").write_text("a")
    assert contents(tmp_path) == {"bundle/a": "a"}


def test_an_impossible_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot write to .*file"),
        atomic_folder(tmp_path / "file" / "bundle"),
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
