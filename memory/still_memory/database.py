"""One SQLite file, opened with care and shared by threads, processes and forks.

WAL with synchronous FULL: when a transaction has returned, it is on disk. Large pages, since
most bytes are tensors. Writers begin with the write lock, so that what they read is what they
change. Whatever SQLite reports comes out as a StoreError that says what to do.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlite_utils

from still_memory.errors import DamageError, StoreError
from still_memory.migrations import APPLICATION_ID, migrations

PAGE = 65536
FREE_PAGES = 64  # kept for the next turns: fewer are not worth moving pages for
VACUUM_PAGES = 32  # given back at most, for each transaction: 2 MiB
_SMALLEST = 512  # bytes of a SQLite file

# A damaged schema makes sqlite3 raise messages that it cannot decode, lacks columns that
# sqlite-utils looks for, and has values of other types in them.
_FAULTS = (sqlite3.Error, UnicodeDecodeError)
_FAULTS_OF_A_SCHEMA = (*_FAULTS, LookupError, TypeError, ValueError)

# Connections inherited through a fork. SQLite forbids even closing them, so they are kept.
_inherited: list[sqlite3.Connection] = []


class StoreFile:
    """The connection to a store's file: `reading()` and `writing()` are its transactions.

    founding: what is done to a file that is made here, in the transaction that makes it.
    admitting: raises what keeps a file of an older schema from being brought to this one.
    """

    def __init__(
        self,
        path: str | Path,
        synchronous: str,
        timeout: float,
        founding: Callable[[sqlite3.Connection], None] | None = None,
        admitting: Callable[[sqlite3.Connection], object] | None = None,
    ) -> None:
        if synchronous.upper() not in ("NORMAL", "FULL", "EXTRA"):
            raise StoreError(f"synchronous must be NORMAL, FULL or EXTRA, not {synchronous!r}")
        self.path = Path(path).absolute()  # after a chdir too; and ":memory:" is a file
        self._synchronous = synchronous.upper()
        self._timeout, self._founding, self._admitting = timeout, founding, admitting
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._conn: sqlite3.Connection | None = self._open()
        self._founding = self._admitting = None  # they know the user's key

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """This thread's turn with the connection, outside a transaction."""
        if self._pid != os.getpid():
            if self._conn is not None:
                _inherited.append(self._conn)
                self._conn = self._open()
            self._lock, self._pid = threading.RLock(), os.getpid()
        with self._lock:
            if self._conn is None:
                raise StoreError(f"the store {self.path} is closed; open it again")
            try:
                yield self._conn
            except _FAULTS as error:
                raise self._explain(error) from error

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A transaction that sees one moment of the store, whatever others write."""
        with self.connection() as conn:
            try:
                conn.execute("begin")
                yield conn
            finally:
                if conn.in_transaction:
                    conn.execute("rollback")

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock: all of it is on disk afterwards, or none."""
        with self.connection() as conn:
            try:
                conn.execute("begin immediate")
                yield conn
                conn.execute("commit")
            except BaseException:
                if conn.in_transaction:  # some errors have already ended it
                    conn.execute("rollback")
                raise

    @contextmanager
    def erasing(self) -> Iterator[sqlite3.Connection]:
        """A writing transaction after which what it deleted is nowhere in the file.

        The log is emptied too, unless another process is reading just then.
        """
        with self.connection() as conn:
            with self.overwriting():
                yield conn
            conn.executescript("pragma incremental_vacuum")
            conn.execute("pragma wal_checkpoint(truncate)").fetchall()

    @contextmanager
    def overwriting(self) -> Iterator[sqlite3.Connection]:
        """A writing transaction that overwrites what it deletes, where it stood in the file."""
        with self.connection() as conn:
            conn.execute("pragma secure_delete = on")
            try:
                with self.writing():
                    yield conn
            finally:
                conn.execute("pragma secure_delete = fast")

    @contextmanager
    def waiting(self, seconds: float | None) -> Iterator[None]:
        """For others no longer than so; None: as long as ever."""
        with self.connection() as conn:
            try:
                if seconds is not None:
                    conn.execute(f"pragma busy_timeout = {int(1000 * seconds)}")
                yield
            finally:
                conn.execute(f"pragma busy_timeout = {int(1000 * self._timeout)}")

    def close(self) -> None:
        if self._pid != os.getpid():  # a fork's lock may be held by a thread it does not have
            if self._conn is not None:
                _inherited.append(self._conn)
            self._conn = None
            return
        with self._lock:
            if self._conn is not None:
                self._conn.close()
            self._conn = None

    def _open(self) -> sqlite3.Connection:
        self._prepare_file()
        conn = sqlite3.connect(
            self.path, timeout=self._timeout, isolation_level=None, check_same_thread=False
        )
        try:
            self._configure(conn)
            self._migrate(conn)
        except _FAULTS_OF_A_SCHEMA as error:
            conn.close()
            raise self._explain(error) from error
        except BaseException:
            conn.close()
            raise
        return conn

    def _prepare_file(self) -> None:
        """Make the file, for its owner alone, if it is not there.

        A file that is there is not opened here, not even to look: closing it would drop the
        locks that other connections of this process hold on it, and another process could
        then delete the log under them (sqlite.org/howtocorrupt.html, section 2.2).
        """
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            if self.path.is_dir():
                raise StoreError(
                    f"cannot open the store {self.path}: it is a folder; name a file in it"
                ) from None
            if self.path.exists() and 0 < self.path.stat().st_size < _SMALLEST:
                raise self._not_sqlite() from None  # SQLite takes one byte for an empty file
        except PermissionError:
            raise self._read_only() from None
        except OSError as error:
            if error.errno == errno.EROFS:
                raise self._read_only() from None
            raise StoreError(
                f"cannot open the store {self.path}: {error.strerror}; name a file in a folder "
                "that exists"
            ) from None
        except ValueError as error:
            raise StoreError(
                f"cannot open the store {str(self.path)!r}: {error}; name another file"
            ) from None
        # the log is a file beside it
        if not (os.access(self.path, os.R_OK | os.W_OK) and os.access(self.path.parent, os.W_OK)):
            raise self._read_only()

    def _configure(self, conn: sqlite3.Connection) -> None:
        try:
            # Tables first: another process may be making them now, its name in the same commit.
            (tables,) = conn.execute("select count(*) from sqlite_master").fetchone()
            (application,) = conn.execute("pragma application_id").fetchone()
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorname != "SQLITE_NOTADB":
                raise
            raise self._not_sqlite() from None
        if tables and application != APPLICATION_ID:
            raise StoreError(
                f"{self.path} is a SQLite file of another program; name another file as the store"
            )
        if not tables:
            conn.execute(f"pragma page_size = {PAGE}")
            conn.execute("pragma auto_vacuum = incremental")
        self._enter_wal(conn)
        for setting in (
            f"synchronous = {self._synchronous}",
            "foreign_keys = on",
            "trusted_schema = off",
            "cell_size_check = on",
            "temp_store = memory",  # what is deleted must not get into files elsewhere
            "secure_delete = fast",  # overwrite what is deleted, where it costs no extra write
            "wal_autocheckpoint = 256",
            "journal_size_limit = 67108864",
        ):
            conn.execute(f"pragma {setting}").fetchall()

    def _enter_wal(self, conn: sqlite3.Connection) -> None:
        # SQLite does not wait here when another process opens the same new file.
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                conn.execute("pragma journal_mode = wal").fetchall()
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _migrate(self, conn: sqlite3.Connection) -> None:
        db = sqlite_utils.Database(conn, execute_plugins=False)
        known = {m.name for m in migrations.pending(db)}
        if not known:
            return self._refuse_newer(db)
        # A table that is written anew is not to take with it what refers to it.
        conn.execute("pragma foreign_keys = off")
        conn.execute("begin immediate")
        try:
            self._refuse_newer(db)
            new = not migrations.applied(db)
            if not new and self._admitting is not None:
                self._admitting(conn)
            migrations.apply(db)
            if new and self._founding is not None:
                self._founding(conn)
            conn.execute("commit")
        except BaseException:
            if conn.in_transaction:
                conn.execute("rollback")
            raise
        conn.execute("pragma foreign_keys = on")

    def _refuse_newer(self, db: sqlite_utils.Database) -> None:
        applied = {m.name for m in migrations.applied(db)}
        if newer := applied - _known_migrations():
            raise StoreError(
                f"{self.path} was written by a newer still-agent ({', '.join(sorted(newer))}); "
                "upgrade still-agent, or name another file as the store"
            )

    def _not_sqlite(self) -> StoreError:
        return StoreError(f"{self.path} is not a SQLite file; name another file as the store")

    def _read_only(self) -> StoreError:
        return StoreError(
            f"the store {self.path} cannot be written: make the file and its folder writable, "
            "or copy it to a place that is"
        )

    def _explain(self, error: Exception) -> StoreError:
        text = str(error)
        if "readonly" in text or "read-only" in text or "unable to open" in text:
            return self._read_only()
        if "full" in text or "disk I/O" in text:
            return StoreError(
                f"the store {self.path} could not be written ({text}); free some space on its "
                "disk and try again. Nothing that was committed is lost"
            )
        if "locked" in text or "busy" in text:
            return StoreError(
                f"another process has held the store {self.path} for {self._timeout:g} seconds; "
                "try again, or open it with a longer timeout"
            )
        damaged = "malformed" in text or "not a database" in text or "UTF-8" in text
        if damaged or not isinstance(error, sqlite3.Error):
            return DamageError(
                f"the store {self.path} is damaged ({text}); restore it from a copy, or save "
                "what can be read with `sqlite3 FILE .recover`"
            )
        return StoreError(
            f"the store {self.path} failed: {text}. Nothing that was committed is lost; open it "
            "again, and report this if it comes back"
        )


def give_back_pages(conn: sqlite3.Connection) -> None:
    """Shrink the file a little, if much of it is free; a bounded number of pages are moved."""
    (pages,) = conn.execute("pragma page_count").fetchone()
    (free,) = conn.execute("pragma freelist_count").fetchone()
    if free > max(FREE_PAGES, pages // 4):
        for _ in range(VACUUM_PAGES):  # one step of this pragma, and so one execute, is a page
            conn.execute("pragma incremental_vacuum(1)")


def _known_migrations() -> set[str]:
    empty = sqlite_utils.Database(memory=True, execute_plugins=False)
    try:
        return {m.name for m in migrations.pending(empty)}
    finally:
        empty.close()
