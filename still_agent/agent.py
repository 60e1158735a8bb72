"""An agent: a frozen model, a compactor and a store. It opens sessions."""

from __future__ import annotations

import shlex
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakValueDictionary

import torch
from pydantic import JsonValue

from still_agent.answering import Answering, Place, branch_name, check_thread, turns_of
from still_agent.batch import thread_of
from still_agent.budget import Budget
from still_agent.compactor import choose_compactor
from still_agent.ephemeral import EphemeralStore, Store
from still_agent.events import OnCompaction, OnReplay, OnToken
from still_agent.forget import Forgotten, forget
from still_agent.messages import Message
from still_agent.models.frozen import FrozenModel
from still_agent.models.loading import load_model
from still_agent.past import stand_at
from still_agent.rebuild import rebuild
from still_agent.rolling import RollingState, require_fitting
from still_agent.sampling import Sampling
from still_agent.session import Session
from still_agent.steps import Steps
from still_agent.text import LONGEST, check_message
from still_agent.tools import Tool, format_for
from still_memory.checkpoint import Checkpoint
from still_memory.codec import EXACT
from still_memory.compactors.base import Compactor
from still_memory.errors import (
    ConflictError,
    DamageError,
    InputError,
    StillError,
    UnknownSessionError,
)
from still_memory.portable import UNVERIFIED, Portable
from still_memory.prune import Pruned
from still_memory.recognition import THREAD
from still_memory.records import Head, NewTurn, SessionInfo, TurnRecord
from still_memory.retention import Retention
from still_memory.store import MemoryStore
from still_memory.taint import Deleted, Forks, Later
from still_memory.vault import Key

if TYPE_CHECKING:
    from still_agent.grammar import Grammars

OPEN = 16  # sessions that stay open between calls of `answer`
_TRIES = 8  # for sessions that others move on meanwhile


class Agent:
    """Opens sessions of one model in one store. See `load`."""

    def __init__(
        self,
        model: FrozenModel,
        compactor: Compactor,
        store: Store,
        *,
        budget: Budget | None = None,
        sampling: Sampling | None = None,
        on_compaction: OnCompaction | None = None,
        longest_message: int = LONGEST,
        open_sessions: int = OPEN,
    ) -> None:
        self.model, self.compactor, self.store = model, compactor, store
        self.budget = budget or Budget()
        self.budget.require_window(model.window)
        self.sampling = sampling or Sampling()
        self._on_compaction = on_compaction
        self._command: list[str] | None = None  # options of the command line that load the like
        self._longest = longest_message
        # One live object a session: two would race for its head within one process.
        self._sessions: WeakValueDictionary[int, Session] = WeakValueDictionary()
        # Those that `answer` used last stay open, for nobody else holds them between calls.
        self._recent: deque[Session] = deque(maxlen=open_sessions)
        self._lock = threading.RLock()
        self._naming = threading.Lock()  # while a branch's name is found free and taken
        self._form = format_for(model.model.config.model_type)

    @classmethod
    def load(
        cls,
        name: str | Path = "reference",
        *,
        store: str | Path | None = None,
        tenant: str = "",
        budget: Budget | None = None,
        compactor: str | Path | Compactor | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        sampling: Sampling | None = None,
        on_compaction: OnCompaction | None = None,
        keep_checkpoints: int = 2,
        codec: str | None = None,
        key: Key | None = None,
        longest_message: int = LONGEST,
        open_sessions: int = OPEN,
    ) -> Self:
        """Load a model and open a store.

        name: "reference", a folder, or a hub id.
        store: a SQLite file, made if it is not there; None keeps conversations in memory only,
            for as long as the agent lives.
        tenant: whose conversations in that file; this agent sees no other's.
        compactor: a folder that training wrote, a name in `TRAINING_FREE` such as "kvzip" (any
            model), or a `Compactor`; None is the one packaged with the reference model.
        on_compaction: called after each compaction, see `events.OnCompaction`.
        keep_checkpoints: how many saved states of a session stay in the store.
        codec: how memory is kept from now on, "exact", "int8" or "int4"; None is the store's own,
            at first "exact". The others round what a model reads, in memory as in the file.
        key: 32 bytes, these as hex or base64, or a function that returns them, to encrypt a store
            that is made here or to open one that is encrypted; None is what the environment's
            STILL_AGENT_KEY says, if it is set.
        longest_message: characters that `send` and `stream` accept.
        open_sessions: how many of the sessions that `answer` used last keep their live cache.

        Raises InputError, BudgetError, CompactorError, IdentityError, StoreError.
        """
        if store is None and key is not None:
            raise InputError("a key encrypts a store, and there is none: give store= as well")
        model = load_model(name, device=device, dtype=dtype)
        (budget or Budget()).require_window(model.window)
        chosen = thread_of(model).run(lambda: choose_compactor(compactor, name, model))
        kept: Store = (
            EphemeralStore(EXACT if codec is None else codec)
            if store is None
            else MemoryStore(
                store, tenant=tenant, keep_checkpoints=keep_checkpoints, codec=codec, key=key
            )
        )
        agent = cls(
            model,
            chosen,
            kept,
            budget=budget,
            sampling=sampling,
            on_compaction=on_compaction,
            longest_message=longest_message,
            open_sessions=open_sessions,
        )
        agent._command = _options(name, compactor, agent.budget, device, dtype)
        return agent

    def of_tenant(self, tenant: str) -> Agent:
        """An agent of the same parts for another tenant's conversations in the same file.

        InputError for an agent without a file; StoreError.
        """
        if not isinstance(self.store, MemoryStore):
            raise InputError("tenants share a file: load the agent with store='memory.db'")
        return Agent(
            self.model,
            self.compactor,
            self.store.of_tenant(tenant),
            budget=self.budget,
            sampling=self.sampling,
            on_compaction=self._on_compaction,
            longest_message=self._longest,
            open_sessions=self._recent.maxlen or 0,
        )

    @property
    def open_sessions(self) -> int:
        """How many sessions hold a live cache."""
        with self._lock:
            return sum(not session.closed for session in self._sessions.values())

    def session(self, id: str, system: str | None = None) -> Session:
        """Open a conversation: resumed if the store holds it, else begun.

        system: the system prompt, pinned for good when the session begins.

        InputError if the session was begun with another system prompt; IdentityError, before
        a tensor is read, if it was made by another model; DamageError if it does not come
        back as it was saved.
        """
        if system is not None:
            check_message(system, self._longest)
        for _ in range(2):  # again, if another process makes the session meanwhile
            head = self.store.head(id)
            try:
                return self._begin(id, system) if head is None else self._resume(head, system)
            except ConflictError:
                continue
        raise ConflictError(f"session {id!r} is being made or moved on elsewhere; try again")

    def resume(self, id: str) -> Session:
        """Open a conversation that is there, else UnknownSessionError: see `session`."""
        head = self.store.head(id)
        if head is None:
            raise UnknownSessionError(f"there is no session {id!r}; sessions() lists them")
        return self._resume(head)

    def answer(
        self,
        messages: Sequence[Message],
        *,
        session: str | None = None,
        tools: Sequence[Tool] = (),
        tool_choice: str = "auto",
        parallel_tool_calls: bool = True,
        schema: dict[str, Any] | None = None,
        on_token: OnToken | None = None,
        **sampling: Any,
    ) -> Answering:
        """The reply to a conversation that is given whole, as clients that keep no state send it.

        What a session has had of it is recognised, and only the rest is read, with the reply in
        one turn. Where the list is no continuation (a message was edited or left out, the system
        prompt or the tools are others), a branch of the conversation is forked from the last turn
        in common, or begun anew; `Answering.place` tells.

        session: the conversation's name; its branches are called `name~2`, `name~3`, ... None: it
            has none, and goes on in whichever nameless one has the same beginning.
        tools: what the model may call. `tool_choice`: "auto", "required", "none", or a tool's name.
            `parallel_tool_calls`: whether it may call several at once.
        schema: a JSON schema that the reply is to be a value of; {} is any JSON.
        on_token: see `events.OnToken`.
        sampling: options of `Sampling` for this call.

        InputError for a list that asks for no reply, an unknown tool, or a schema that cannot be
        kept to; IdentityError if the conversation is of another model.
        """
        thread, drawn = check_thread(session), self.sampling.but(**sampling)
        told = turns_of(messages, tools, self._form, self._longest)
        choose = None
        if tools or schema is not None or tool_choice not in ("auto", "none"):
            choose = self._grammars.constrain(
                drawn,
                schema=schema,
                tools=tools,
                choice=tool_choice,
                format=self._form,
                parallel=parallel_tool_calls,
            )
        form = self._form if tools else None
        return Answering(self, thread, told, drawn, choose, form, on_token)

    def place(self, thread: str, told: Sequence[tuple[str, str]]) -> Place:
        """Where a conversation goes on; see `answering.Sessions`."""
        pinned = told[0][1] if told[0][0] == "system" else None
        had = int(pinned is not None)
        for _ in range(_TRIES):  # again, if another writer moves on what was just recognised
            # Strangers' nameless lists begin with one system prompt: each has a session of its own.
            alike = thread or len(told) - 1 > had
            known = self.store.recognise(told[:-1], thread, self.model.identity) if alike else None
            if known is None and had == 0 and (unsaid := self._unsaid(thread)) is not None:
                opened = self._resume(unsaid)
                place = Place(opened, unsaid, 0)
            elif known is None or (known.turns == had and not (thread and known.stands)):
                self._require_own(thread)
                opened = self._begun(thread, pinned)
                place = Place(opened, opened.head, had, opened.head.tokens)
            elif (head := self.store.head(known.session)) is None:
                continue
            elif known.stands and head.turn == known.turn and (thread or self._idle(head)):
                opened = self._resume(head)
                place = Place(opened, head, known.turns)
            elif [t.id for t in self.store.history(head)[: known.turns]][-1:] == [known.turn]:
                try:
                    opened = self._fork(head, None, known.turns, thread, None)
                except ConflictError:
                    continue
                read = 0 if opened.restored is None else opened.restored.replayed_tokens
                place = Place(opened, opened.head, known.turns, read, known.session)
            else:
                continue
            self.keep_open(opened)
            return place
        raise ConflictError(f"conversation {thread!r} is written by others all the while")

    def branches(self, name: str) -> list[str]:
        """The sessions of the conversation `name`, oldest first: see `answer`."""
        return self.store.branches(check_thread(name))

    def delete_thread(
        self, name: str, *, erase: bool = False, forks: Forks | None = None
    ) -> Deleted:
        """Forget a conversation: all its branches, and its graph's states. See `delete`."""
        deleted = self.store.delete_thread(
            check_thread(name), erase=erase, forks=forks or ("refuse" if erase else "keep")
        )
        self._close_deleted(deleted.session_ids)
        if erase:
            self.store.scrub()
        return deleted

    def sessions(self) -> list[SessionInfo]:
        """The tenant's conversations, newest first."""
        return self.store.sessions()

    def delete(self, id: str, *, erase: bool = False, forks: Forks | None = None) -> Deleted:
        """Forget a conversation: its text and its memory.

        erase: also every copy of it that the file may still hold, and of all that was deleted
            before: nothing of that is in the file's bytes, or its log's, when this returns.
        forks: what becomes of sessions that share its turns (forks, and copies by an import or a
            rebuild). "keep", the default without `erase`: they keep what they share, which then
            stays in the store; the result lists it. "refuse", the default with `erase`: a
            TaintedError lists them, if there are any. "delete": they are deleted too.

        Whoever still holds the session, in any process, gets UnknownSessionError from then on;
        so does this call if there is none. ErasureError, when all is done but for the bytes, if
        another process was reading the store.
        """
        deleted = self.store.delete(id, erase=erase, forks=forks or ("refuse" if erase else "keep"))
        self._close_deleted(deleted.session_ids)
        if erase:
            self.store.scrub()
        return deleted

    def rebuild(self, id: str, *, on_progress: OnReplay | None = None) -> Session:
        """Compute a conversation's memory anew from its text, with this agent's parts; open it.

        For another model, compactor or budget than it has had, or where its state is damaged: the
        ledger is all that is read. With the parts that it has had, the state is the same bit for
        bit, and damaged spans are mended also for the sessions that share them; but for what
        follows a reply that was decoded in one batch with other sessions', which comes out
        otherwise in its last bits. `restored` tells what was done, and in `differs` what is
        otherwise than the ledger had it.

        on_progress: called with the tokens taken in so far, and in all.

        The old state stays until the new one stands, and then goes, with those kept of earlier
        turns. An interrupted rebuild goes on where it was saved last, a few seconds before, when
        it is called again with the same parts; other parts begin anew. Forks keep their own states.

        UnknownSessionError if there is no such session; DamageError if its ledger is damaged too;
        BudgetError if the budget cannot hold its system prompt, or, in the schedule "append", all
        of it; InputError if the model's template lacks a role that was used; ConflictError if
        others write the session all the while.
        """
        state, steps = self._state()
        head, restored = rebuild(state, steps, self.store, id, on_progress)
        chat = self._open_here(head)
        if chat is None:
            chat = self._opened(state, steps, head)
        else:
            chat.refresh()
        chat.restored = restored
        return chat

    def prune(self, retention: Retention, *, dry_run: bool = False) -> Pruned:
        """Take out what `retention` does not let stay of the tenant's; see `MemoryStore.prune`.

        Whoever holds a session that goes is told as after `delete`. InputError for an agent
        without a store's file.
        """
        if not isinstance(self.store, MemoryStore):
            raise InputError("there is no file to prune: load the agent with store='memory.db'")
        pruned = self.store.prune(retention, dry_run=dry_run)
        if not dry_run:
            self._close_deleted([drop.session_id for drop in pruned.drops if drop.whole])
        return pruned

    def export(self, id: str, path: str | Path, *, plain: bool = False) -> None:
        """Write a conversation as one new file, which `import_session` reads anywhere.

        Its turns and its newest state go with it: treat the file as the conversation. Out of an
        encrypted store it is sealed with the store's key, unless it is to be `plain`.
        UnknownSessionError; InputError if the file exists or cannot be written.
        """
        Portable.of(self.store, id).write(path, None if plain else self._secret)

    def import_session(
        self, path: str | Path, name: str | None = None, *, key: Key | None = None
    ) -> Session:
        """Open a conversation from a file that `export` wrote, under its name or another.

        Its state is equal bit for bit. Every byte is checked before any is saved: InputError for
        another kind of file, DamageError for a broken or forged one, IdentityError for one of
        another model, BudgetError for one that this budget cannot hold, ConflictError if the name
        is taken. The store is then as it was.

        key: of a sealed file, where it is not this store's.
        """
        found = Portable.read(path, self._secret if key is None else key)
        remedy = "Load that model to import it."
        self.model.identity.require(found.model, f"the session in {str(path)!r}", remedy)
        for entry in found.checkpoint.entries:
            require_fitting(entry.span, self.model)
        self._require_known_tokens(found.checkpoint, found.turns, repr(str(path)))
        self._state()[0].restore(found.checkpoint)  # what cannot stand here is not saved
        return self._resume(found.save(self.store, name, self.model.identity))

    def close(self) -> None:
        """Close the sessions and the store; what was saved stays."""
        with self._lock:
            sessions = list(self._sessions.values())
            self._sessions.clear()
        for session in sessions:
            session.close()
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _resume(self, head: Head, system: str | None = None) -> Session:
        """The session of this very record: one made anew under its name is another."""
        what = f"session {head.session!r}"
        remedy = f"Load that model to resume it, or {self._to_rebuild(head.session)}"
        self.model.identity.require(head.model, what, remedy)
        if system is not None and system != head.settings.get("system"):
            raise InputError(
                f"{what} was begun with another system prompt, which is pinned: leave `system` "
                "out to resume it, or choose another session id"
            )
        if (open_here := self._open_here(head)) is not None:
            open_here.refresh()  # waits for its turn, so the agent's lock must not be held
            return open_here
        state, steps = self._state()
        try:
            saved = self.store.load(head, device=self.model.device)
        except DamageError as damage:
            raise DamageError(f"{damage}. Or {self._to_rebuild(head.session)}") from damage
        state.restore(saved)
        if UNVERIFIED in saved.extra:  # imported where no model was loaded: nobody has looked
            self._require_known_tokens(saved, self.store.history(head), what)
            named = replace(head, model=self.model.identity)
            head = self.store.commit(named, state.checkpoint(), [])
        return self._opened(state, steps, head)

    def _forget(
        self, id: str, turns: Sequence[int], later: Later, on_replay: OnReplay | None
    ) -> Forgotten:
        state, steps = self._state()
        forgotten = forget(state, steps, self.store, id, turns, later, on_replay)
        try:
            self.store.scrub()
        finally:
            for taint, how in zip(forgotten.sessions, forgotten.restored, strict=True):
                with self._lock:
                    session = self._sessions.get(taint.session_id)
                if session is not None and not session.closed:
                    with suppress(StillError):  # it tells by itself, when it is next used
                        session.refresh()
                        session.last_reply, session.restored = None, how
        return forgotten

    @cached_property
    def _grammars(self) -> Grammars:
        from still_agent.grammar import Grammars  # its library is an extra

        return Grammars(self.model.tokenizer, self.model.vocab_size)

    @property
    def _secret(self) -> bytes | None:
        return self.store.secret if isinstance(self.store, MemoryStore) else None

    def _to_rebuild(self, id: str) -> str:
        """What to do about a state that this agent cannot use, as words and as a command."""
        told = f"have this one read its text again, in place of that memory: agent.rebuild({id!r})"
        if self._command is None or not isinstance(self.store, MemoryStore):
            return told
        options = ["--store", str(self.store.path), *self._command]
        options += ["--tenant", self.store.tenant] if self.store.tenant else []
        command = shlex.join(["still-agent", "sessions", "rebuild", *options, "--", id])
        return f"{told}, or `{command}`"

    def _require_known_tokens(
        self, checkpoint: Checkpoint, turns: Sequence[NewTurn | TurnRecord], what: str
    ) -> None:
        known = range(self.model.vocab_size)
        told = [turn.tokens for turn in turns]
        told += [entry.span.ids or () for entry in checkpoint.entries]
        if not all(token in known for tokens in told for token in tokens):
            raise DamageError(
                f"{what} holds token ids that {self.model.name!r} has not: export it again where "
                "it was made"
            )

    def _fork(
        self, head: Head, name: str | None, at: int, thread: str | None, on_replay: OnReplay | None
    ) -> Session:
        """A new session that begins as the one at `head` stood after turn `at`.

        name: None for the next of the conversation `thread`.
        """
        state, steps = self._state()
        past, restored = stand_at(state, steps, self.store, head, at, on_replay)
        checkpoint = state.checkpoint()
        with self._naming:
            name = self._free_name(thread or "") if name is None else name
            made = self.store.fork(past, name, checkpoint, thread)
        forked = self._opened(state, steps, made)
        forked.restored = restored
        return forked

    def _begun(self, thread: str, system: str | None) -> Session:
        """A conversation's next session."""
        for _ in range(_TRIES):  # again, if another process takes the name meanwhile
            try:
                return self._begin(None, system, thread)
            except ConflictError:
                continue
        raise ConflictError(f"conversation {thread!r} is being begun elsewhere; try again")

    def _free_name(self, thread: str) -> str:
        """What a conversation's next session is called."""
        number = len(self.store.branches(thread)) + 1 if thread else 1
        while self.store.head(name := branch_name(thread, number)) is not None:
            number += 1
        return name

    def _close_deleted(self, sessions: Sequence[int]) -> None:
        with self._lock:
            gone = [self._sessions.pop(session, None) for session in sessions]
        for session in gone:
            if session is not None:
                session.close_deleted()

    def keep_open(self, session: Session) -> None:
        """Let a session keep its live cache for a while, though nobody may hold it."""
        with self._lock:
            with suppress(ValueError):
                self._recent.remove(session)
            self._recent.append(session)

    def _require_own(self, thread: str) -> None:
        """IdentityError if the conversation's sessions are all of another model."""
        if not thread:  # it has any number of them, and strangers' are no concern
            return
        heads = [h for h in map(self.store.head, self.store.branches(thread)) if h is not None]
        if heads and all(h.model.address != self.model.identity.address for h in heads):
            remedy = f"Load that model to go on, or {self._to_rebuild(heads[0].session)}"
            self.model.identity.require(heads[0].model, f"session {heads[0].session!r}", remedy)

    def _unsaid(self, thread: str) -> Head | None:
        """A conversation's session in which nothing was said yet: its first turn was undone."""
        head = self.store.head(thread) if thread else None
        if head is None or head.turns or THREAD in head.settings:
            return None
        return head if head.model.address == self.model.identity.address else None

    def _idle(self, head: Head) -> bool:
        session = self._open_here(head)
        return session is None or session.idle

    def _begin(self, id: str | None, system: str | None, thread: str | None = None) -> Session:
        """A new session. id: None for the next of the conversation `thread`."""
        tokenizer, (state, steps) = self.model.tokenizer, self._state()
        said = [] if system is None else tokenizer.message("system", system)
        state.pin([*tokenizer.start, *said])
        turns: Sequence[NewTurn] = [] if system is None else [NewTurn("system", system, said)]
        checkpoint = state.checkpoint()
        with self._naming:
            name = self._free_name(thread or "") if id is None else id
            settings: dict[str, JsonValue] = {"system": system}
            if thread not in (None, name):
                settings[THREAD] = thread
            head = self.store.create(
                name,
                self.model.identity,
                checkpoint=checkpoint,
                turns=turns,
                settings=settings,
            )
        return self._opened(state, steps, head)

    def _state(self) -> tuple[RollingState, Steps]:
        """An empty state, and what notes its compactions."""
        codec = self.store.codec
        steps = Steps(
            self.budget, lambda: self.compactor.identity.address, self._on_compaction, codec
        )
        return RollingState(self.model, self.compactor, self.budget, steps, codec), steps

    def _opened(self, state: RollingState, steps: Steps, head: Head) -> Session:
        """One object for one session, also when several threads open it at once."""
        session = Session(
            state,
            steps,
            self.store,
            head,
            state.checkpoint(),
            fork=self._fork,
            forget=self._forget,
            sampling=self.sampling,
            longest_message=self._longest,
        )
        with self._lock:
            first = self._sessions.setdefault(head.session_id, session)
            if first.closed:
                first = self._sessions[head.session_id] = session
        return first

    def _open_here(self, head: Head) -> Session | None:
        with self._lock:
            session = self._sessions.get(head.session_id)
        return None if session is None or session.closed else session


def _options(
    name: str | Path,
    compactor: str | Path | Compactor | None,
    budget: Budget,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
) -> list[str] | None:
    """The command line's options for an agent like this; None if they cannot tell it."""
    if not isinstance(compactor, str | Path | None):
        return None
    told = {
        "model": None if name == "reference" else name,
        "compactor": compactor,
        "slots": budget.slots,
        "schedule": budget.schedule,
        "horizon": budget.horizon,
        "device": device,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
    }
    plain = Budget(slots=budget.slots, schedule=budget.schedule, horizon=budget.horizon)
    if plain != budget:  # shares that have no option
        return None
    usual = {"slots": Budget().slots, "schedule": Budget().schedule}
    return [
        word
        for key, value in told.items()
        if value is not None and value != usual.get(key)
        for word in (f"--{key}", str(value))
    ]
