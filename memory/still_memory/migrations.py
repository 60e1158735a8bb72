"""The schema of the store, as steps that are only ever added to.

docs/store-format.md says what each column holds. Blobs live in a table of their own, so that
reading a row's metadata reads no tensor, and so that no later migration rewrites them. Ids of
sessions, turns and checkpoints are never used twice: a head that names a deleted one can not
come to mean another.
"""

from __future__ import annotations

import secrets

from sqlite_utils import Database, Migrations

from still_memory import words

APPLICATION_ID = 0x5374696C  # "Stil", in the file's header

migrations = Migrations("still_memory")


@migrations()
def m001_conversations(db: Database) -> None:
    for statement in _M001.split(";"):
        db.conn.execute(statement)
    db.conn.execute("insert into meta values ('key', ?)", [secrets.token_bytes(32)])
    db.conn.execute(f"pragma application_id = {APPLICATION_ID}")


@migrations()
def m002_token_ids(db: Database) -> None:
    """Raw spans know their tokens, for compactors that read them once more."""
    db.conn.execute("alter table spans add column ids blob")


@migrations()
def m003_words(db: Database) -> None:
    """What was said can be searched, and what was said before this too."""
    db.conn.execute(words.SCHEMA)
    db.conn.execute(words.REBUILD)


@migrations()
def m004_drafts(db: Database) -> None:
    """A session that is to take another's place, once it stands."""
    db.conn.execute("alter table sessions add column draft_of integer references sessions (id)")
    db.conn.execute(
        "create unique index sessions_draft_of on sessions (draft_of) where draft_of not null"
    )


@migrations()
def m005_tenants(db: Database) -> None:
    """Every name, model and turn is a tenant's; those from before are the default tenant's."""
    for statement in _M005.split(";"):
        db.conn.execute(statement)


@migrations()
def m006_recognition(db: Database) -> None:
    """A conversation is found by what was said in it; sessions are branches of one."""
    for statement in _M006.split(";"):
        db.conn.execute(statement)


@migrations()
def m007_graphs(db: Database) -> None:
    """What a graph engine keeps of a thread, beside the thread's sessions."""
    for statement in _M007.split(";"):
        db.conn.execute(statement)


_M001 = """
create table meta (
    name text primary key,
    value blob not null
) strict;

create table models (
    id integer primary key,
    address text not null unique,
    identity text not null
) strict;

create table turns (
    id integer primary key autoincrement,
    parent integer references turns (id),
    role text not null,
    created text not null,
    usage text not null,
    digest blob not null,
    tokens blob not null,
    text text not null
) strict;
create index turns_parent on turns (parent);

create table sessions (
    id integer primary key autoincrement,
    name text not null unique,
    generation integer not null,
    model integer not null references models (id),
    created text not null,
    updated text not null,
    settings text not null
) strict;

create table checkpoints (
    id integer primary key autoincrement,
    session integer not null references sessions (id) on delete cascade,
    generation integer not null,
    turn integer references turns (id),
    turns integer not null,
    tokens integer not null,
    slots integer not null,
    bytes integer not null,
    digest blob not null,
    entries text not null,
    extra text not null,
    unique (session, generation)
) strict;
create index checkpoints_turn on checkpoints (turn);

create table spans (
    id integer primary key,
    address text not null unique,
    model integer not null references models (id),
    start integer not null,
    "end" integer not null,
    rotated_at integer,
    rounds integer not null,
    compactor text,
    codec text not null,
    layers integer not null,
    bytes integer not null
) strict;

create table span_layers (
    id integer primary key,
    span integer not null references spans (id) on delete cascade,
    layer integer not null,
    digest blob not null,
    data blob not null,
    unique (span, layer)
) strict;

create table checkpoint_spans (
    checkpoint integer not null references checkpoints (id) on delete cascade,
    span integer not null references spans (id),
    primary key (checkpoint, span)
) strict, without rowid;
create index checkpoint_spans_span on checkpoint_spans (span)
"""

# Names and models are unique within a tenant now, which SQLite can only say of a new table.
# Neither is large.
_M005 = """
create table tenants (
    id integer primary key,
    name text not null unique
) strict;
insert into tenants values (1, '');

create table new_models (
    id integer primary key,
    tenant integer not null references tenants (id),
    address text not null,
    identity text not null,
    unique (tenant, address)
) strict;
insert into new_models select id, 1, address, identity from models;
drop table models;
alter table new_models rename to models;

create table new_sessions (
    id integer primary key autoincrement,
    tenant integer not null references tenants (id),
    name text not null,
    generation integer not null,
    model integer not null references models (id),
    created text not null,
    updated text not null,
    settings text not null,
    draft_of integer references sessions (id),
    unique (tenant, name)
) strict;
insert into new_sessions
    select id, 1, name, generation, model, created, updated, settings, draft_of from sessions;
delete from sqlite_sequence where name = 'new_sessions';
insert into sqlite_sequence select 'new_sessions', seq from sqlite_sequence where name = 'sessions';
drop table sessions;
alter table new_sessions rename to sessions;
create unique index sessions_draft_of on sessions (draft_of) where draft_of not null;

alter table turns add column tenant integer not null default 1 references tenants (id)
"""

# Turns from before have no such digest, and are not found by it.
_M006 = """
alter table turns add column said blob;
create index turns_said on turns (said) where said not null;
alter table sessions add column thread text;
create index sessions_thread on sessions (tenant, thread) where thread not null
"""

# What was said twice is kept once: a value's row names the one that it goes on from.
_M007 = """
create table graph_states (
    id integer primary key,
    tenant integer not null references tenants (id),
    thread text not null,
    space text not null,
    name text not null,
    parent text,
    run text not null,
    digest blob not null,
    holds text not null,
    about blob not null,
    body blob not null,
    unique (tenant, thread, space, name)
) strict;
create index graph_states_run on graph_states (tenant, run) where run != '';

create table graph_values (
    id integer primary key,
    tenant integer not null references tenants (id),
    parent integer references graph_values (id),
    address blob not null unique,
    data blob not null
) strict;
create index graph_values_parent on graph_values (parent) where parent not null;

create table graph_holds (
    state integer not null references graph_states (id) on delete cascade,
    value integer not null references graph_values (id),
    primary key (state, value)
) strict, without rowid;
create index graph_holds_value on graph_holds (value);

create table graph_writes (
    tenant integer not null references tenants (id),
    thread text not null,
    space text not null,
    state text not null,
    name text not null,
    digest blob not null,
    data blob not null,
    primary key (tenant, thread, space, state, name)
) strict, without rowid
"""
