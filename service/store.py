"""Jobs in SQLite: what was accepted, how it stands, and how it ended.

Every change is on the disk when its method returns. A job's end is written by whoever comes first, and
by nobody else: `finish` says who that was. Knows nothing of files, queues or engines.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reelrt.errors import StorageError
from reelrt.service.disk import refused, unusable
from reelrt.service.jobs import Job, JobError, VideoRequest

SCHEMA = 1
REFUSED = "the job store cannot be used"
TABLES = """
CREATE TABLE jobs (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    status TEXT NOT NULL,
    request TEXT NOT NULL,
    created_at REAL NOT NULL,
    started_at REAL,
    completed_at REAL,
    expires_at REAL,
    error TEXT,
    timings TEXT NOT NULL DEFAULT '{}',
    peak_memory INTEGER NOT NULL DEFAULT 0,
    reused TEXT NOT NULL DEFAULT '[]',
    files TEXT NOT NULL DEFAULT '{}',
    attempts INTEGER NOT NULL DEFAULT 0,
    fingerprint TEXT NOT NULL,
    idempotency_key TEXT,
    asked TEXT NOT NULL
);
CREATE UNIQUE INDEX jobs_by_key ON jobs (owner, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_by_owner ON jobs (owner, sequence);
CREATE INDEX jobs_by_status ON jobs (status);
CREATE INDEX jobs_by_fingerprint ON jobs (fingerprint, owner);
CREATE INDEX jobs_by_expiry ON jobs (expires_at);
CREATE TABLE latents (
    owner TEXT NOT NULL,
    name TEXT NOT NULL,
    seed TEXT NOT NULL,
    used INTEGER NOT NULL,
    PRIMARY KEY (owner, name)
);
"""
CACHE_KIB = 256
"""Pages that SQLite keeps: a look-up needs a handful, and the system caches the file anyway."""
NAMES_PER_OWNER = 1000
"""Names of starting noise that are kept; the ones unused longest go."""

COLUMNS = """id, owner, status, request, created_at, started_at, completed_at, expires_at, error, timings,
    peak_memory, reused, files, attempts"""
LIVE = "status IN ('queued', 'in_progress')"


class JobStore:
    """The database of a service. Its methods may be called from any thread.

    Args:
        path: The database file; made if missing.

    Raises:
        StorageError: It cannot be opened, is damaged, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        try:
            self._connection = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=10
            )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")  # a commit is on the disk
            self._connection.execute(f"PRAGMA cache_size = {-CACHE_KIB}")
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, SCHEMA):
                raise StorageError(
                    f"{path} is of version {version}; this one reads version {SCHEMA}.", "Use another folder."
                )
            if not version:
                with self._transaction() as connection:
                    for statement in (*TABLES.split(";")[:-1], f"PRAGMA user_version = {SCHEMA}"):
                        connection.execute(statement)
        except sqlite3.Error as error:
            raise unusable(path, error) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it is on the disk afterwards, or nothing."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """The same; what fails is told as clients may read it."""
        try:
            with self._transaction() as connection:
                yield connection
        except sqlite3.Error as error:
            raise refused(REFUSED, self._path, error) from error

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._connection.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise refused(REFUSED, self._path, error) from error

    def add(self, job: Job, fingerprint: str, asked: str, idempotency_key: str | None) -> None:
        """Write a new job, with all that makes it the one it is, and keep its seed under its name.

        Args:
            job: The job, in any status.
            fingerprint: What its result depends on.
            asked: What the client had asked for.
            idempotency_key: The client's, if any.
        """
        row = {
            **_columns(job),
            "id": job.id,
            "owner": job.owner,
            "request": json.dumps(job.request.to_json()),
            "created_at": job.created_at,
            "fingerprint": fingerprint,
            "idempotency_key": idempotency_key,
            "asked": asked,
        }
        names = ", ".join(row)
        query = f"INSERT INTO jobs ({names}) VALUES ({', '.join('?' * len(row))})"  # noqa: S608 (our names)
        with self._writing() as connection:
            connection.execute(query, tuple(row.values()))
            if job.request.latents is not None:
                _name_seed(connection, job.owner, job.request.latents, str(job.request.seed))

    def started(self, job_id: str, at: float) -> None:
        """A job joined the batch."""
        query = f"""UPDATE jobs SET status = 'in_progress', started_at = ?, attempts = attempts + 1
            WHERE id = ? AND {LIVE}"""  # noqa: S608 (our own text)
        with self._writing() as connection:
            connection.execute(query, (at, job_id))

    def put_back(self, job_id: str) -> None:
        """A job that was started waits again, as if it had not been."""
        query = """UPDATE jobs SET status = 'queued', started_at = NULL, attempts = max(attempts - 1, 0)
            WHERE id = ? AND status = 'in_progress'"""
        with self._writing() as connection:
            connection.execute(query, (job_id,))

    def wait_again(self, job_id: str) -> None:
        """A job that was interrupted waits again; that it was started counts."""
        with self._writing() as connection:
            connection.execute(f"UPDATE jobs SET status = 'queued' WHERE id = ? AND {LIVE}", (job_id,))  # noqa: S608

    def finish(self, job: Job) -> bool:
        """Write how a job ended.

        Returns:
            Whether it was not over before; False also when it was deleted. Then nothing is changed.
        """
        columns = _columns(job)
        del columns["attempts"]
        sets = ", ".join(f"{name} = ?" for name in columns)
        query = f"UPDATE jobs SET {sets} WHERE id = ? AND {LIVE}"  # noqa: S608 (our own names)
        with self._writing() as connection:
            return connection.execute(query, (*columns.values(), job.id)).rowcount == 1

    def lost(self, job_id: str, error: JobError) -> None:
        """A completed job's file is not there any more."""
        query = "UPDATE jobs SET status = 'failed', files = '{}', error = ? WHERE id = ?"
        with self._writing() as connection:
            connection.execute(query, (_error(error), job_id))

    def remove(self, job_id: str) -> bool:
        """Forget a job; whether there was one."""
        with self._writing() as connection:
            return connection.execute("DELETE FROM jobs WHERE id = ?", (job_id,)).rowcount == 1

    def get(self, job_id: str) -> Job | None:
        """A job, if there is one of that id."""
        rows = self._rows(f"SELECT {COLUMNS} FROM jobs WHERE id = ?", job_id)  # noqa: S608
        return _job(rows[0]) if rows else None

    def fingerprint(self, job_id: str) -> str:
        """What a job's result depends on; "" when there is no such job."""
        rows = self._rows("SELECT fingerprint FROM jobs WHERE id = ?", job_id)
        return rows[0][0] if rows else ""

    def by_key(self, owner: str, key: str) -> tuple[Job, str] | None:
        """The job of an idempotency key, and what the client had asked for."""
        query = f"SELECT {COLUMNS}, asked FROM jobs WHERE owner = ? AND idempotency_key = ?"  # noqa: S608
        rows = self._rows(query, owner, key)
        return (_job(rows[0][:-1]), rows[0][-1]) if rows else None

    def with_result(self, owner: str, fingerprint: str) -> Job | None:
        """A completed job of an owner whose result is that of a fingerprint."""
        query = f"""SELECT {COLUMNS} FROM jobs WHERE fingerprint = ? AND owner = ? AND status = 'completed'
            ORDER BY sequence DESC LIMIT 1"""  # noqa: S608
        rows = self._rows(query, fingerprint, owner)
        return _job(rows[0]) if rows else None

    def page(self, owner: str, after: str | None, limit: int, newest_first: bool) -> list[Job] | None:
        """Jobs of an owner in order of submission, behind a given one; None when that one is not theirs."""
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        bound, values = "", [owner]
        if after is not None:
            rows = self._rows("SELECT sequence FROM jobs WHERE id = ? AND owner = ?", after, owner)
            if not rows:
                return None
            bound, values = f"AND sequence {sign} ?", [owner, rows[0][0]]
        query = f"""SELECT {COLUMNS} FROM jobs WHERE owner = ? {bound}
            ORDER BY sequence {order} LIMIT ?"""  # noqa: S608 (our own text)
        return [_job(row) for row in self._rows(query, *values, limit)]

    def live(self) -> list[Job]:
        """Jobs that are not over, in order of submission."""
        rows = self._rows(f"SELECT {COLUMNS} FROM jobs WHERE {LIVE} ORDER BY sequence")  # noqa: S608
        return [_job(row) for row in rows]

    def completed(self) -> dict[str, dict[str, int]]:
        """Id to files of every completed job."""
        rows = self._rows("SELECT id, files FROM jobs WHERE status = 'completed'")
        return {job_id: json.loads(files) for job_id, files in rows}

    def expired(self, now: float) -> Sequence[str]:
        """Ids of jobs whose time is over."""
        return [row[0] for row in self._rows("SELECT id FROM jobs WHERE expires_at <= ?", now)]

    def named_seed(self, owner: str, name: str) -> int | None:
        """The seed that an owner gave a name, if it has one."""
        rows = self._rows("SELECT seed FROM latents WHERE owner = ? AND name = ?", owner, name)
        return int(rows[0][0]) if rows else None

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._connection.close()


def _name_seed(connection: sqlite3.Connection, owner: str, name: str, seed: str) -> None:
    """Keep a seed under a name, or say that it was used again; the names unused longest go."""
    (newest,) = connection.execute("SELECT coalesce(max(used), 0) + 1 FROM latents").fetchone()
    connection.execute("INSERT OR REPLACE INTO latents VALUES (?, ?, ?, ?)", (owner, name, seed, newest))
    connection.execute(
        """DELETE FROM latents WHERE owner = ?1 AND name NOT IN
        (SELECT name FROM latents WHERE owner = ?1 ORDER BY used DESC LIMIT ?2)""",
        (owner, NAMES_PER_OWNER),
    )


def _error(error: JobError | None) -> str | None:
    return None if error is None else json.dumps([error.code, error.message])


def _columns(job: Job) -> dict[str, Any]:
    """What changes in a job's life."""
    return {
        "status": job.status,
        "started_at": job.started_at,
        "completed_at": job.completed_at,
        "expires_at": job.expires_at,
        "error": _error(job.error),
        "timings": json.dumps(dict(job.timings)),
        "peak_memory": job.peak_memory,
        "reused": json.dumps(job.reused),
        "files": json.dumps(dict(job.files)),
        "attempts": job.attempts,
    }


def _job(row: tuple[Any, ...]) -> Job:
    job_id, owner, status, request, created, started, completed, expires, error, *rest = row
    timings, peak_memory, reused, files, attempts = rest
    return Job(
        id=job_id,
        owner=owner,
        request=VideoRequest(**json.loads(request)),
        status=status,
        progress=100 if status == "completed" else 0,
        created_at=created,
        started_at=started,
        completed_at=completed,
        expires_at=expires,
        error=None if error is None else JobError(*json.loads(error)),
        timings=json.loads(timings),
        peak_memory=peak_memory,
        reused=tuple(json.loads(reused)),
        files=json.loads(files),
        attempts=attempts,
    )
