"""Does a store hold what was written into it? Reads everything once, and changes nothing.

The file is opened for reading alone, in one transaction: writers go on meanwhile, and their log
is only emptied afterwards. In memory at once: a turn, or a layer of a span. Each fault is told
with its place and with the sessions that it harms; nothing that SQLite or this package raises
about damaged bytes ends the check.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import sqlite_utils

from still_memory import check_graphs, check_rows, check_words
from still_memory.errors import DamageError, StoreError
from still_memory.findings import Enough, Noted, Report, shown
from still_memory.migrations import APPLICATION_ID, migrations
from still_memory.vault import Key, Vault, unlocked, user_key

MOST = 1000  # findings

OnProgress = Callable[[str, int, int], None]  # what is read, how much of it, of how much

_REFERRING = (
    "models", "turns", "sessions", "checkpoints", "spans", "span_layers", "checkpoint_spans"
)  # fmt: skip
_TABLES = ("meta", "tenants", *_REFERRING, *check_graphs.TABLES)
_COUNTED = ("sessions", "turns", "checkpoints", "spans", "span_bytes")
_KINDS = {"turns": "turn", "checkpoints": "checkpoint", "spans": "span", "sessions": "session"}
# What is no damage, but a reason why nothing can be said.
_ELSEWHERE = ("BUSY", "LOCKED", "NOMEM", "FULL", "CANTOPEN", "PERM", "AUTH", "INTERRUPT")


def check_store(
    path: str | Path,
    *,
    on_progress: OnProgress | None = None,
    timeout: float = 30.0,
    key: Key | None = None,
) -> Report:
    """Everything in the store at `path` that is not as it was written, with its place.

    Stores of older schemas are checked as they are. After 1,000 findings it stops looking.
    Takes about as long as reading the file and hashing it. Leaves the file as it is; SQLite may
    put an empty log beside it, which the next opening takes away.

    key: as of `MemoryStore`; without it nothing that is encrypted could be checked.

    StoreError if there is no store to check: no such file, not a SQLite file, one of another
    program, a newer schema, or one that cannot be read just now. EncryptionError for a key that is
    missing or wrong.
    """
    secret = user_key(key)
    path = Path(path).absolute()
    tell = on_progress or (lambda what, done, of: None)
    with closing(_open(path, timeout)) as conn:
        try:
            return _check(conn, path, secret, tell)
        except sqlite3.Error as error:
            raise StoreError(
                f"the store {path} cannot be checked now ({error}); try again when no process "
                "holds it, with room for temporary files"
            ) from error


def _check(conn: sqlite3.Connection, path: Path, secret: bytes | None, tell: OnProgress) -> Report:
    conn.execute("begin")
    noted = Noted(conn, MOST)
    counts = dict.fromkeys((*_COUNTED, "graph_states"), 0)
    complete, readable = True, False
    applied: set[str] = set()
    try:
        with _noting(noted, "the schema"):
            applied = _applied(conn, path, noted)
            readable = _compare_schema(conn, applied, noted)
        tell("pages", 0, 0)
        with _noting(noted, "a table"):
            rows = conn.execute(f"pragma integrity_check({MOST})")
            for (said,) in (row for row in rows if row != ("ok",)):
                noted.add("file", str(said).replace("\n", " "))
        if readable:
            with _noting(noted, "a reference"):
                _dangling(conn, noted)
            with _noting(noted, "a table"):
                counts |= _counted(conn)
            _as_now(conn, applied)
            vault = _unlocked(conn, path, secret, noted)
            if vault is not None:
                noted.vault = vault
                _check_rows(conn, vault, noted, counts, tell, applied)
    except Enough:
        complete = False
    return Report(
        noted.findings, **counts, complete=complete, unharmed=noted.unharmed()
    )  # fmt: skip


def _unlocked(
    conn: sqlite3.Connection, path: Path, secret: bytes | None, noted: Noted
) -> Vault | None:
    with _noting(noted, "the table of settings"):
        try:
            return unlocked(conn, secret, path)
        except DamageError:
            noted.add("key", "the store has lost its key")
    return None


def _check_rows(
    conn: sqlite3.Connection,
    vault: Vault,
    noted: Noted,
    counts: dict[str, int],
    tell: OnProgress,
    applied: set[str],
) -> None:
    vaults: dict[int, Vault] = {}
    with _noting(noted, "the table of tenants"):
        vaults = check_rows.tenants(conn, vault, noted)
    with _noting(noted, "the table of models"):
        models = check_rows.models(conn, noted)
        with _noting(noted, "the table of sessions"):
            check_rows.sessions(conn, vault, noted)
        with _noting(noted, "the table of turns"):
            for done in check_rows.turns(conn, vaults, noted):
                tell("turns", done, counts["turns"])
        with _noting(noted, "the table of checkpoints"):
            for done in check_rows.checkpoints(conn, vaults, models, noted):
                tell("checkpoints", done, counts["checkpoints"])
        with _noting(noted, "the table of spans"):
            for done in check_rows.spans(conn, vaults, noted):
                tell("bytes of spans", done, counts["span_bytes"])
        if "m007_graphs" in applied:
            _check_graphs(conn, vaults, noted, counts, tell)
        indexed = "m003_words" in applied
        if indexed and vault.encrypted:
            with _noting(noted, "the index of words"):
                check_words.none(conn, noted)
        elif indexed:
            with _noting(noted, "the index of words"):
                for done in check_words.compare(conn, noted):
                    tell("turns in the index of words", done, counts["turns"])
        with _noting(noted, "what nothing leads to"):
            check_rows.leftovers(conn, noted)


def _check_graphs(
    conn: sqlite3.Connection,
    vaults: Mapping[int, Vault],
    noted: Noted,
    counts: dict[str, int],
    tell: OnProgress,
) -> None:
    with _noting(noted, "the table of graphs' states"):
        (counts["graph_states"],) = conn.execute("select count(*) from graph_states").fetchone()
        for done in check_graphs.states(conn, vaults, noted):
            tell("states of graphs", done, counts["graph_states"])
    with _noting(noted, "the table of graphs' values"):
        check_graphs.values(conn, vaults, noted)
        if many := check_graphs.leftovers(conn):
            noted.add("leftover", f"{many} values of graphs, which no state holds")
    with _noting(noted, "the table of graphs' writes"):
        check_graphs.writes(conn, vaults, noted)


def _as_now(conn: sqlite3.Connection, applied: set[str]) -> None:
    """For this connection alone, the tables as the newest migration would leave them."""
    later = {
        "m002_token_ids": {"spans": {"ids": "null"}},
        "m004_drafts": {"sessions": {"draft_of": "null"}},
        "m005_tenants": {t: {"tenant": "1"} for t in ("models", "sessions", "turns")},
        "m006_recognition": {"turns": {"said": "null"}, "sessions": {"thread": "null"}},
    }
    if "m005_tenants" not in applied:
        conn.execute("create temp view tenants as select 1 as id, '' as name")
    missing: dict[str, list[str]] = {}
    for migration, tables in later.items():
        for table, columns in tables.items() if migration not in applied else ():
            missing.setdefault(table, []).extend(f"{v} as {c}" for c, v in columns.items())
    for table, added in missing.items():
        view = f"select *, {', '.join(added)} from main.{table}"
        conn.execute(f"create temp view {table} as {view}")


def _open(path: Path, timeout: float) -> sqlite3.Connection:
    if not path.is_file():
        raise StoreError(f"there is no store at {path}; name a store's file")
    # Where no log can be made beside the file, nobody can be writing it either.
    log = path.with_name(path.name + "-wal")
    frozen = not os.access(path.parent, os.W_OK) and not log.exists()
    try:
        conn = sqlite3.connect(
            f"{path.as_uri()}?mode=ro{'&immutable=1' if frozen else ''}",
            uri=True, timeout=timeout, isolation_level=None,
        )  # fmt: skip
    except sqlite3.Error as error:
        raise StoreError(f"cannot read the store {path}: {error}; make it readable") from None
    try:
        # What is no UTF-8 is to be told, and not to end the reading of its table.
        conn.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        for setting in ("trusted_schema = off", "cell_size_check = on", "temp_store = file"):
            conn.execute(f"pragma {setting}")
        (application,) = conn.execute("pragma application_id").fetchone()
    except sqlite3.Error as error:
        conn.close()
        if error.sqlite_errorname == "SQLITE_NOTADB":
            raise StoreError(
                f"{path} is not a SQLite file; name another file as the store"
            ) from None
        raise StoreError(f"cannot read the store {path}: {error}; make it readable") from None
    if application != APPLICATION_ID:
        conn.close()
        raise StoreError(
            f"{path} is a SQLite file of another program; name another file as the store"
        )
    return conn


@contextmanager
def _noting(noted: Noted, what: str) -> Iterator[None]:
    """What SQLite cannot read of `what` is a finding, and the check goes on after it."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.removeprefix("SQLITE_").startswith(_ELSEWHERE):
            raise
        noted.add("file", f"{what} cannot be read to its end: {error}")
    except UnicodeDecodeError as error:  # a damaged schema makes messages that are not UTF-8
        noted.add("file", f"{what} cannot be read: {error}")


def _applied(conn: sqlite3.Connection, path: Path, noted: Noted) -> set[str]:
    """The migrations that the file has had."""
    query = "select name from _sqlite_migrations where migration_set = ?"
    try:
        applied = {name for (name,) in conn.execute(query, (migrations.name,))}
    except sqlite3.OperationalError as error:
        noted.add("schema", f"it does not tell its migrations: {error}")
        return set()
    known = [m.name for m in migrations.pending(_empty())]
    if newer := sorted(applied - set(known)):
        raise StoreError(
            f"{path} was written by a newer still-agent ({', '.join(newer)}); upgrade still-agent"
        )
    if not applied or applied != set(known[: len(applied)]):
        noted.add("schema", f"its migrations are {sorted(applied)}")
    with suppress(sqlite3.OperationalError):  # read when it is opened, and used by nobody
        for (when,) in conn.execute("select applied_at from _sqlite_migrations"):
            if shown(f"{when}") != f"{when}":
                noted.add("schema", "the time of a migration is no text, so it cannot be opened")
    return applied


def _compare_schema(conn: sqlite3.Connection, applied: set[str], noted: Noted) -> bool:
    """Its tables, columns and indexes are those of its migrations, and nothing acts by itself.

    Whether the tables can be read for what they should hold.
    """
    readable = True
    db = _empty()
    with closing(db):
        later = [m.name for m in migrations.pending(db) if m.name not in applied]
        migrations.apply(db, stop_before=later)
        ours = _objects(db.conn)
        theirs = _objects(conn)
        for (kind, name), table in ours.items():
            if (kind, name) not in theirs:
                noted.add("schema", f"the {kind} {name} is missing")
                readable &= kind != "table"
            elif name in _TABLES and _columns(conn, name) != _columns(db.conn, name):
                noted.add("schema", f"the columns of {name} are not those of a store")
                readable = False
            elif kind == "index" and table != theirs[kind, name]:
                noted.add("schema", f"the index {name} is one of another table")
    for kind, name in theirs.keys() - ours.keys():
        if kind in ("trigger", "view"):
            noted.add("schema", f"it has a {kind} {name!r}, which still-agent did not make")
    return readable


def _objects(conn: sqlite3.Connection) -> dict[tuple[str, str], str]:
    rows = conn.execute("select type, name, tbl_name from sqlite_master where name not like ?",
                        ("sqlite_%",))  # fmt: skip
    return {(kind, name): table for kind, name, table in rows if name != "_sqlite_migrations"}


def _columns(conn: sqlite3.Connection, table: str) -> list[tuple[object, ...]]:
    (kind,) = conn.execute("select strict from pragma_table_list(?)", (table,)).fetchone()
    query = 'select name, type, "notnull", pk from pragma_table_info(?)'
    return [(kind,), *conn.execute(query, (table,))]


def _empty() -> sqlite_utils.Database:
    return sqlite_utils.Database(memory=True, execute_plugins=False)


def _dangling(conn: sqlite3.Connection, noted: Noted) -> None:
    """Rows that refer to one that is not there."""
    for table in _REFERRING:
        keys = {row[0]: row for row in conn.execute(f"pragma foreign_key_list({table})")}
        for _, row, parent, number in conn.execute(f"pragma foreign_key_check({table})"):
            how = f"in {table}: the {keys[number][3]} it belongs to is missing in {parent}"
            if keys[number][3] == "parent":
                noted.turn("the turn before it is missing", row)
            elif table == "checkpoints":
                noted.checkpoint(f"the {keys[number][3]} it names is missing", row)
            elif table == "checkpoint_spans":
                continue  # has no row ids: told with the checkpoint
            else:
                noted.add("reference", how, row=row)
    gone = conn.execute(
        "select checkpoint, span, s.id from checkpoint_spans r"
        " left join checkpoints c on c.id = r.checkpoint left join spans s on s.id = r.span"
        " where c.id is null or s.id is null"
    )
    for checkpoint, span, there in gone:
        how = f"it refers to span row {span}, which is missing"
        if there is None:
            noted.checkpoint(how, checkpoint)
        else:
            noted.add("reference", f"checkpoint row {checkpoint} of a reference is missing")


def _counted(conn: sqlite3.Connection) -> dict[str, int]:
    row = conn.execute(
        "select (select count(*) from sessions), (select count(*) from turns),"
        " (select count(*) from checkpoints), (select count(*) from spans),"
        " (select coalesce(sum(bytes), 0) from spans)"
    ).fetchone()
    return dict(zip(_COUNTED, row, strict=True))
