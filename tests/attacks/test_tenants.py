"""Two tenants in one file: neither names, lists, reads, searches, continues or times the other."""

from __future__ import annotations

import sqlite3
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from still_memory import checkpoints_table, tenants
from still_memory.check import check_store
from still_memory.errors import ConflictError, DamageError, InputError, UnknownSessionError
from still_memory.portable import Portable
from still_memory.records import Head, NewTurn
from still_memory.retention import Retention
from still_memory.store import MemoryStore
from tests.attacks.states import MODEL, check_file, mark, state, told

Opens = Callable[..., MemoryStore]
Change = Callable[[sqlite3.Connection], None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.db"


@pytest.fixture
def opened(path: Path) -> Iterator[Opens]:
    stores = []

    def make(tenant: str, at: Path = path) -> MemoryStore:
        stores.append(MemoryStore(at, tenant=tenant, synchronous="NORMAL"))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def acme(opened: Opens) -> MemoryStore:
    """A tenant with the sessions `alice`, of two turns, and `secret`, and a draft of the first."""
    store = opened("acme")
    alice = begin(store, "alice", "the merger is in Porto", "sign it")
    begin(store, "secret", "the password is heron")
    store.save_draft(alice, replace(alice, turn=None, turns=0), state(3), [])
    return store


@pytest.fixture
def bolt(acme: MemoryStore, opened: Opens) -> MemoryStore:
    """Another tenant, with an `alice` of its own."""
    store = opened("bolt")
    begin(store, "alice", "a plain remark")
    return store


def begin(store: MemoryStore, name: str, *texts: str) -> Head:
    head = store.create(name, MODEL, checkpoint=state(1), turns=[], settings={"system": name})
    for text in texts:
        head = store.commit(head, state(1), [NewTurn("user", text, [len(text)])])
    return head


def at(store: MemoryStore, name: str = "alice") -> Head:
    head = store.head(name)
    assert head is not None
    return head


def names(store: MemoryStore) -> list[str]:
    return sorted(info.name for info in store.sessions())


def raised(work: Callable[[], object]) -> tuple[type[Exception], str]:
    with pytest.raises(Exception) as caught:
        work()
    return type(caught.value), str(caught.value)


def test_the_same_names_are_other_sessions(acme: MemoryStore, bolt: MemoryStore) -> None:
    assert names(acme) == ["alice", "secret"] and names(bolt) == ["alice"]
    assert [t[2] for t in told(bolt, "alice")] == ["a plain remark"]
    assert bolt.head("secret") is None and bolt.search(at(bolt), "porto") == []
    assert [m.excerpt for m in acme.search(at(acme), "porto")] == ["the merger is in Porto"]
    bolt.delete("alice")
    assert names(bolt) == [] and mark(acme.load(at(acme))) == mark(state(1))
    check_file(acme.path)
    assert check_store(acme.path).findings == []


def test_whoever_only_looks_leaves_no_trace(acme: MemoryStore, opened: Opens) -> None:
    nobody = opened("nobody")
    assert nobody.head("alice") is None and nobody.sessions() == []
    assert nobody.stats().spans == nobody.stats().turns == 0
    assert rows(acme, "select name from tenants order by id") == [("",), ("acme",)]


def rows(store: MemoryStore, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(store.path)) as conn:
        return conn.execute(query).fetchall()


def test_equal_content_is_written_anew_and_shares_nothing(tmp_path: Path, opened: Opens) -> None:
    """So how much a write takes tells nothing of what the other tenant holds."""
    written = []
    for file, others in (("alone.db", 0), ("beside.db", 1)):
        for _ in range(others):
            begin(opened("acme", tmp_path / file), "alice", "equal words")
        store = opened("bolt", tmp_path / file)
        begin(store, "alice", "equal words")
        written.append((store.bytes_written, store.stats().spans, store.stats().turns))
    assert written[0] == written[1]
    for query in (
        "select m.tenant, s.address from spans s join models m on m.id = s.model",
        "select m.tenant, l.digest from span_layers l join spans s on s.id = l.span"
        " join models m on m.id = s.model",
        "select tenant, digest from turns",
        "select s.tenant, c.digest from checkpoints c join sessions s on s.id = c.session",
    ):
        keyed = rows(store, query)
        hers, theirs = ({mark for tenant, mark in keyed if tenant == n} for n in (2, 3))
        assert hers and len(hers) == len(theirs) and not hers & theirs


def test_a_model_s_name_is_its_tenant_s(opened: Opens) -> None:
    """The name may be a path of whoever loaded it; an import knows the digest alone."""
    acme, bolt = opened("acme"), opened("bolt")
    named = MODEL.model_copy(update={"name": "/srv/acme/own"})
    acme.create("a", named, checkpoint=state(1), turns=[], settings={})
    bolt.create("a", MODEL.unnamed, checkpoint=state(1), turns=[], settings={})
    (info,) = bolt.sessions()
    assert info.model == at(bolt, "a").model.name == MODEL.unnamed.name
    acme.create("b", MODEL.unnamed, checkpoint=state(1), turns=[], settings={})
    assert {info.model for info in acme.sessions()} == {"/srv/acme/own"}


VERBS: dict[str, Callable[[MemoryStore, Head], object]] = {
    "load": lambda store, head: store.load(head),
    "commit": lambda store, head: store.commit(head, state(2), [NewTurn("user", "x", [1])]),
    "rewind": lambda store, head: store.commit(replace(head, turn=None, turns=0), state(2), []),
    "fork": lambda store, head: store.fork(head, "mine", state(2)),
    "history": lambda store, head: store.history(head),
    "search": lambda store, head: store.search(head, "porto"),
    "save_draft": lambda store, head: store.save_draft(head, head, state(2), []),
    "adopt": lambda store, head: store.adopt(head, head, state(2), []),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
def test_another_s_head_is_as_one_that_never_was(
    verb: Callable[[MemoryStore, Head], object], acme: MemoryStore, bolt: MemoryStore
) -> None:
    hers = at(acme)
    never = replace(hers, session_id=10**9, checkpoint=10**9, turn=10**9)
    before = list(sqlite3.connect(acme.path).iterdump())
    assert raised(lambda: verb(bolt, hers)) == raised(lambda: verb(bolt, never))
    assert raised(lambda: verb(bolt, hers))[0] is UnknownSessionError
    assert list(sqlite3.connect(acme.path).iterdump()) == before
    acme.discard_draft(hers)
    verb(acme, hers)  # which its own tenant may use


def test_another_s_states_and_drafts_are_not_seen(acme: MemoryStore, bolt: MemoryStore) -> None:
    hers = at(acme)
    assert bolt.kept(hers) == [] and bolt.draft(hers) is None
    bolt.discard_draft(hers)
    assert acme.draft(hers) is not None and len(acme.kept(hers)) == 2


@pytest.mark.parametrize("verb", ["commit", "fork", "history", "search"])
def test_another_s_turn_in_one_s_own_head_is_one_that_is_not_there(
    verb: str, acme: MemoryStore, bolt: MemoryStore
) -> None:
    hers = at(acme).turn
    assert hers is not None
    own = at(bolt)
    before = list(sqlite3.connect(acme.path).iterdump())
    error, said = raised(lambda: VERBS[verb](bolt, replace(own, turn=hers)))
    never, other = raised(lambda: VERBS[verb](bolt, replace(own, turn=10**9)))
    assert error is never is DamageError and said.replace(str(hers), str(10**9)) == other
    assert list(sqlite3.connect(acme.path).iterdump()) == before


BY_NAME: dict[str, Callable[[MemoryStore, str], object]] = {
    "head": lambda store, name: store.head(name),
    "ledger": lambda store, name: store.ledger(name),
    "history": lambda store, name: store.history(name),
    "delete": lambda store, name: store.delete(name),
    "export": lambda store, name: Portable.of(store, name),
}


def steps(store: MemoryStore, work: Callable[[], object]) -> tuple[int, list[str], object]:
    """The instructions that SQLite runs, the statements, and what comes of it."""
    count, said = 0, []

    def step() -> int:
        nonlocal count
        count += 1
        return 0

    with store._file.connection() as conn:
        conn.set_trace_callback(said.append)
        conn.set_progress_handler(step, 1)
        try:
            came: object = repr(work())
        except UnknownSessionError as error:
            came = type(error)
        finally:
            conn.set_progress_handler(None, 1)
            conn.set_trace_callback(None)
    return count, said, came


@pytest.mark.parametrize("verb", BY_NAME.values(), ids=BY_NAME.keys())
def test_another_s_name_takes_the_very_work_of_nobody_s(
    verb: Callable[[MemoryStore, str], object], acme: MemoryStore, bolt: MemoryStore
) -> None:
    hers = steps(bolt, lambda: verb(bolt, "secret"))
    nobody = steps(bolt, lambda: verb(bolt, "nobody"))
    assert hers[0] == nobody[0] > 10 and hers[2] == nobody[2]
    assert [s.replace("secret", "nobody") for s in hers[1]] == nobody[1]
    own = steps(bolt, lambda: bolt.head("alice"))
    assert own[2] != nobody[2]  # which finds something, where there is


def test_what_others_say_takes_a_search_no_work(acme: MemoryStore, bolt: MemoryStore) -> None:
    head = at(bolt)

    def work() -> list[tuple[int, list[str], object]]:
        searches = [partial(bolt.search, head, word) for word in ("zebra", "remark")]
        return [steps(bolt, search) for search in searches]

    before = work()
    hers = at(acme)
    for n in range(30):
        said = " ".join(f"zebra remark {k}" for k in range(n))
        hers = acme.commit(hers, state(1), [NewTurn("user", said, [1])])
    assert work() == before
    (none, _, nothing), (found, _, remark) = before
    assert nothing == "[]" and "plain remark" in str(remark) and none > 10 < found


def test_a_list_is_of_its_own_rows(acme: MemoryStore, bolt: MemoryStore) -> None:
    before = steps(bolt, bolt.sessions)
    for n in range(20):
        begin(acme, f"more {n}")
    assert steps(bolt, bolt.sessions)[0] == before[0]


def test_an_export_names_no_tenant_and_any_may_import_it(
    acme: MemoryStore, bolt: MemoryStore, tmp_path: Path
) -> None:
    Portable.of(acme, "alice").write(tmp_path / "x.still")
    data = (tmp_path / "x.still").read_bytes()
    assert b"acme" not in data and b"Porto" in data
    Portable.read(tmp_path / "x.still").save(bolt, "taken")
    assert told(bolt, "taken") == told(acme, "alice") and names(acme) == ["alice", "secret"]
    with pytest.raises(ConflictError):
        Portable.read(tmp_path / "x.still").save(bolt)  # there is an `alice` of its own


def test_limits_are_the_tenant_s_and_the_operator_sees_all(
    acme: MemoryStore, bolt: MemoryStore
) -> None:
    assert {s.name for s in bolt.space().sessions} == {"alice"}
    assert {(s.tenant, s.name) for s in bolt.space(all_tenants=True).sessions} == {
        ("acme", "alice"), ("acme", "draft of alice"), ("acme", "secret"), ("bolt", "alice")
    }  # fmt: skip
    own, every = bolt.space(), bolt.space(all_tenants=True)
    assert own.index_bytes == 0 < every.index_bytes  # all tenants' words
    for figure in ("spans", "turns", "checkpoints", "span_bytes", "turn_bytes"):
        assert getattr(own, figure) + getattr(acme.space(), figure) == getattr(every, figure)
    assert bolt.prune(Retention(max_bytes=0), dry_run=True).sessions == []  # its only one
    planned = bolt.prune(Retention(max_bytes=0), dry_run=True, all_tenants=True)
    assert planned.sessions == ["alice (tenant 'acme')", "secret (tenant 'acme')"]
    begin(bolt, "later")
    assert bolt.prune(Retention(max_bytes=0)).sessions == ["alice (tenant 'bolt')"]
    assert names(acme) == ["alice", "secret"] and acme.draft(at(acme)) is not None


LIKE = [
    "acme", "ACME", "acme ", " acme", "acme\0", "acm\u0065\u0301", "acm\u00e9", "acme\u200b",
    "\u0430cme", "acme'; drop table tenants; --", "' or 1=1 --", "%", "_", "*", "\0", "x" * 512,
    "x" * 511, " ", "\ufb01", "fi", "1", "0", "None",
]  # fmt: skip


def test_a_tenant_s_name_is_its_code_points(opened: Opens) -> None:
    assert len({unicodedata.normalize("NFKC", name).casefold() for name in LIKE}) < len(LIKE)
    stores = {name: opened(name) for name in ["", *LIKE]}
    for n, store in enumerate(stores.values()):
        begin(store, "alice", f"word{n}")
    for n, store in enumerate(stores.values()):
        assert names(store) == ["alice"] and store.stats().turns == 1
        assert [t[2] for t in told(store, "alice")] == [f"word{n}"]
    assert check_store(store.path).findings == [] and len(stores) == len(LIKE) + 1


@pytest.mark.parametrize("tenant", ["x" * 513, "\ud800", "a\udcff", None, 7, b"acme", ["acme"]])
def test_what_is_no_name_is_refused(tenant: Any, path: Path) -> None:
    with pytest.raises(InputError):
        MemoryStore(path, tenant=tenant)
    assert not path.exists()


def hers(name: str, tenant: str = "acme") -> str:
    return (
        "(select s.id from sessions s join tenants n on n.id = s.tenant"
        f" where s.name = '{name}' and n.name = '{tenant}')"
    )


def row(tenant: str) -> str:
    return f"(select id from tenants where name = '{tenant}')"


def newest(name: str, tenant: str, column: str) -> str:
    return (
        f"(select {column} from checkpoints where session = {hers(name, tenant)}"
        " order by generation desc limit 1)"
    )


MOVES: dict[str, tuple[str, str]] = {  # what is done, and as which of bolt's sessions it is read
    "a session": (
        f"update sessions set tenant = {row('bolt')} where id = {hers('secret')}", "secret"
    ),
    "a session with its model": (
        f"update sessions set tenant = {row('bolt')}, model = (select model from sessions where id"
        f" = {hers('alice', 'bolt')}) where id = {hers('secret')}", "secret"
    ),
    "a session, its model and its turns": (
        f"update turns set tenant = {row('bolt')} where id = {newest('secret', 'acme', 'turn')};"
        f"update sessions set tenant = {row('bolt')}, model = (select model from sessions where id"
        f" = {hers('alice', 'bolt')}) where id = {hers('secret')}", "secret"
    ),
    "a checkpoint": (
        f"delete from checkpoints where session = {hers('alice', 'bolt')};"
        f"update checkpoints set session = {hers('alice', 'bolt')} where id ="
        f" {newest('secret', 'acme', 'id')}", "alice"
    ),
    "a checkpoint's entries": (
        f"update checkpoints set entries = {newest('secret', 'acme', 'entries')} where id ="
        f" {newest('alice', 'bolt', 'id')}", "alice"
    ),
    "a checkpoint's turn": (
        f"update checkpoints set turn = {newest('secret', 'acme', 'turn')} where id ="
        f" {newest('alice', 'bolt', 'id')}", "alice"
    ),
    "a turn's parent": (
        f"update turns set parent = {newest('secret', 'acme', 'turn')} where id ="
        f" {newest('alice', 'bolt', 'turn')}", "alice"
    ),
    "a turn": (
        f"update turns set tenant = {row('acme')} where id = {newest('alice', 'bolt', 'turn')}",
        "alice",
    ),
    "a model": (f"update models set tenant = 1 where tenant = {row('bolt')}", "alice"),
    "the names of two tenants": (
        "update tenants set name = 'x' where name = 'acme';"
        "update tenants set name = 'acme' where name = 'bolt';"
        "update tenants set name = 'bolt' where name = 'x'", "alice"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("statements", "name"), MOVES.values(), ids=MOVES.keys())
def test_a_row_of_another_tenant_is_damage_and_a_check_finds_it(
    statements: str, name: str, acme: MemoryStore, bolt: MemoryStore
) -> None:
    acme.close()
    with closing(sqlite3.connect(bolt.path)) as conn:
        for statement in statements.split(";"):
            assert conn.execute(statement).rowcount > 0
        conn.commit()
    with pytest.raises(DamageError):
        head = at(bolt, name)
        bolt.load(head)
        bolt.history(head)
    report = check_store(bolt.path)
    assert report.damaged
    assert any("(tenant 'bolt')" in told for f in report.findings for told in f.sessions)


def test_a_draft_of_another_tenant_s_session_is_found(acme: MemoryStore, bolt: MemoryStore) -> None:
    draft = acme.draft(at(acme))
    assert draft is not None
    with closing(sqlite3.connect(acme.path)) as conn:
        conn.execute(f"update sessions set draft_of = {hers('alice', 'bolt')} where id = ?",
                     (draft.session_id,))  # fmt: skip
        conn.commit()
    assert bolt.draft(at(bolt)) is None
    (finding,) = check_store(acme.path).findings
    assert finding.how == "it is a draft of another tenant's session"


@pytest.mark.parametrize("what", ["entries", "turn"])
def test_a_seal_made_with_the_store_s_key_lends_no_other_s_rows(
    what: str, acme: MemoryStore, bolt: MemoryStore
) -> None:
    """Whoever has the key can seal anything; what the seal names is still another's."""
    own, other = at(bolt), at(acme, "secret")
    key = tenants.key_of(rows(bolt, "select value from meta")[0][0], "bolt")
    with closing(sqlite3.connect(bolt.path)) as conn:
        query = "select slots, bytes, entries, extra, turn from checkpoints where id = ?"
        *content, turn = conn.execute(query, (own.checkpoint,)).fetchone()
        *theirs, foreign = conn.execute(query, (other.checkpoint,)).fetchone()
        if what == "entries":
            content = theirs
        else:
            turn = foreign
        (last,) = conn.execute("select digest from turns where id = ?", (turn,)).fetchone()
        (said,) = conn.execute(
            "select settings from sessions where id = ?", (own.session_id,)
        ).fetchone()
        seal = checkpoints_table.seal(key, own, last, said, tuple(content))
        conn.execute(
            "update checkpoints set slots = ?, bytes = ?, entries = ?, extra = ?, turn = ?,"
            " digest = ? where id = ?",
            (*content, turn, seal, own.checkpoint),
        )
        conn.commit()
    with pytest.raises(DamageError):
        bolt.load(at(bolt))
    assert check_store(bolt.path).damaged


def test_an_index_of_tenants_that_lost_one_begins_none_anew(path: Path, opened: Opens) -> None:
    with MemoryStore(path, tenant="acme") as store:
        begin(store, "alice", "words")
    data = path.read_bytes()
    with closing(sqlite3.connect(path)) as conn:
        (page,) = conn.execute("pragma page_size").fetchone()
        (root,) = conn.execute(
            "select rootpage from sqlite_master where name = 'sqlite_autoindex_tenants_1'"
        ).fetchone()
    index = data[(root - 1) * page : root * page]
    assert index.count(b"acme") == 1
    path.write_bytes(
        data[: (root - 1) * page] + index.replace(b"acme", b"acmf") + data[root * page :]
    )
    store = opened("acme")
    for work in (lambda: store.head("alice"), lambda: begin(store, "alice", "anew")):
        with pytest.raises(DamageError, match="index of tenants"):
            work()


@pytest.mark.parametrize("left", [True, False], ids=["with a session", "empty"])
def test_an_older_store_is_the_default_tenant_s_and_uses_no_id_twice(
    left: bool, path: Path, opened: Opens
) -> None:
    dump = Path(__file__).parents[1] / "memory" / "stores" / "m004_drafts.sql"
    with closing(sqlite3.connect(path)) as conn:
        conn.executescript(dump.read_text("utf-8"))
        conn.execute(f"pragma application_id = {0x5374696C}")
        conn.execute("update sqlite_sequence set seq = 41 where name = 'sessions'")
        if not left:
            conn.executescript("pragma foreign_keys = on; delete from sessions")
        conn.commit()
    acme, default = opened("acme"), opened("")
    assert acme.sessions() == [] and names(default) == (["alice"] if left else [])
    if left:
        head = at(default)
        assert default.load(head).length == 12 and len(default.kept(head)) == 2
        default.commit(head, default.load(head), [NewTurn("user", "and on", [1])])
    assert begin(default, "bob", "b").session_id == 42
    assert begin(acme, "alice", "a").session_id == 43
    check_file(path)
    assert {f.kind for f in check_store(path).findings} <= ({"leftover"} if not left else set())


class TwoTenants(RuleBasedStateMachine):
    """The same names in two tenants of one file, against a plain model of each."""

    path: ClassVar[Path]
    who = st.sampled_from(["", "acme", "bolt"])
    name = st.sampled_from(["a", "b", "c"])

    @initialize()
    def start(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        self.stores = {
            t: MemoryStore(self.path, tenant=t, synchronous="NORMAL") for t in ("", "acme", "bolt")
        }
        self.models: dict[str, dict[str, list[str]]] = {t: {} for t in self.stores}
        self.said = 0

    def new(self, who: str) -> NewTurn:
        """A turn that one tenant says and no other, but for a word that all say."""
        self.said += 1
        return NewTurn("user", f"common {who or 'default'}{self.said}", [self.said])

    @rule(who=who, name=name)
    def create(self, who: str, name: str) -> None:
        store, model = self.stores[who], self.models[who]
        if name in model:
            with pytest.raises(ConflictError):
                store.create(name, MODEL, checkpoint=state(1), turns=[], settings={})
        else:
            store.create(name, MODEL, checkpoint=state(1), turns=[], settings={})
            model[name] = []

    @rule(who=who, name=name, seed=st.integers(0, 2))
    def say(self, who: str, name: str, seed: int) -> None:
        head = self.stores[who].head(name)
        assert (head is None) == (name not in self.models[who])
        if head is not None:
            turn = self.new(who)
            self.stores[who].commit(head, state(seed), [turn])
            self.models[who][name].append(turn.text)

    @rule(who=who, name=name, new=name)
    def fork(self, who: str, name: str, new: str) -> None:
        head = self.stores[who].head(name)
        if head is None or new in self.models[who]:
            return
        self.stores[who].fork(head, new, self.stores[who].load(head))
        self.models[who][new] = list(self.models[who][name])

    @rule(who=who, name=name)
    def delete(self, who: str, name: str) -> None:
        if self.models[who].pop(name, None) is None:
            with pytest.raises(UnknownSessionError):
                self.stores[who].delete(name)
        else:
            self.stores[who].delete(name)

    @rule(who=who, name=name, to=who, new=name)
    def carry(self, who: str, name: str, to: str, new: str) -> None:
        if name not in self.models[who] or new in self.models[to]:
            return
        Portable.of(self.stores[who], name).save(self.stores[to], new)
        self.models[to][new] = list(self.models[who][name])

    @rule(who=who)
    def prune(self, who: str) -> None:
        self.stores[who].prune(Retention(keep_checkpoints=1))

    @invariant()
    def each_sees_its_own(self) -> None:
        for who, model in getattr(self, "models", {}).items():
            store = self.stores[who]
            assert names(store) == sorted(model)
            for name, texts in model.items():
                head = at(store, name)
                assert [t[2] for t in told(store, name)] == texts
                found = store.search(head, "common", 100)
                assert [m.excerpt for m in found] == texts[::-1]
                store.load(head)

    def teardown(self) -> None:
        if hasattr(self, "stores"):
            for store in self.stores.values():
                store.close()
            assert check_store(self.path).findings == []


def test_tenants_live_as_if_alone(tmp_path: Path) -> None:
    class Here(TwoTenants):
        path = tmp_path / "s.db"

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=12, stateful_step_count=16, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
