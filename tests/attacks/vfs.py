"""SQLite's own file system, with a note taken of every write, sync, truncation and deletion.

The default VFS is copied and its open replaced by one that lets the original work and then
puts three methods of ours in the file's table; they take note and call the originals. So SQLite
does what it always does, to real files, and afterwards one can tell what was asked of the disk
in which order. Through ctypes, where Python's `sqlite3` and ctypes share one SQLite library.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

Pointer, Int, Long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
# SQLite keeps more behind the end of a name, so names stay pointers.
_OPEN = ctypes.CFUNCTYPE(Int, Pointer, Pointer, Pointer, Int, Pointer)
_DELETE = ctypes.CFUNCTYPE(Int, Pointer, Pointer, Int)
_WRITE = ctypes.CFUNCTYPE(Int, Pointer, Pointer, Int, Long)
_TRUNCATE = ctypes.CFUNCTYPE(Int, Pointer, Long)
_SYNC = ctypes.CFUNCTYPE(Int, Pointer, Int)


class _Vfs(ctypes.Structure):
    _fields_ = (
        ("version", Int), ("file_size", Int), ("longest_path", Int), ("next", Pointer),
        ("name", ctypes.c_char_p), ("data", Pointer), ("open", _OPEN), ("delete", _DELETE),
        ("others", Pointer * 18),
    )  # fmt: skip


class _Methods(ctypes.Structure):
    _fields_ = (
        ("version", Int), ("close", Pointer), ("read", Pointer), ("write", _WRITE),
        ("truncate", _TRUNCATE), ("sync", _SYNC), ("others", Pointer * 13),
    )  # fmt: skip


@dataclass(frozen=True)
class Event:
    """What was asked of a file: write (at, data), truncate (at), sync, or delete.

    Whoever records may add events of
    other kinds, to tell them apart from what came before and after.
    """

    kind: str
    file: str = ""  # its name, without the folder
    at: int = 0
    data: bytes = b""


def library() -> ctypes.CDLL | None:
    """The SQLite library that `sqlite3` uses, if it is one that ctypes can reach."""
    try:
        found = ctypes.CDLL(ctypes.util.find_library("sqlite3") or "libsqlite3.so.0")
    except OSError:
        return None
    version = ctypes.string_at
    found.sqlite3_libversion.restype = Pointer
    linked = "libsqlite3" in Path("/proc/self/maps").read_text()
    same = version(found.sqlite3_libversion()).decode() == sqlite3.sqlite_version
    return found if linked and same else None


def _name(pointer: int) -> str:
    return Path(ctypes.string_at(pointer).decode()).name


@contextmanager
def recorded(events: list[Event]) -> Iterator[None]:
    """Notes what every database opened within asks of the disk."""
    sqlite = library()
    assert sqlite is not None, "this Python's SQLite cannot be reached through ctypes"
    sqlite.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
    real = sqlite.sqlite3_vfs_find(None).contents
    ours = _Vfs.from_buffer_copy(real)
    ours.name = b"recorded"
    names: dict[int, str] = {}  # of open files, by the address of their handle
    tables: dict[int, _Methods] = {}  # originals and ours, by the original's address

    @_WRITE
    def write(file: int, data: int, count: int, at: int) -> int:
        events.append(Event("write", names[file], at, ctypes.string_at(data, count)))
        return original(file).write(file, data, count, at)

    @_TRUNCATE
    def truncate(file: int, size: int) -> int:
        events.append(Event("truncate", names[file], size))
        return original(file).truncate(file, size)

    @_SYNC
    def sync(file: int, flags: int) -> int:
        done = original(file).sync(file, flags)
        events.append(Event("sync", names[file]))
        return done

    originals: dict[int, _Methods] = {}  # by the address of our table

    def original(file: int) -> _Methods:
        return originals[Pointer.from_address(file).value or 0]

    @_OPEN
    def open_file(_: int, name: int | None, file: int, flags: int, out: int) -> int:
        code = real.open(ctypes.addressof(real), name, file, flags, out)
        where = Pointer.from_address(file)
        if code == 0 and where.value:
            if where.value not in tables:
                table = _Methods.from_address(where.value)
                mine = _Methods.from_buffer_copy(table)
                mine.write, mine.truncate, mine.sync = write, truncate, sync
                tables[where.value] = mine
                originals[ctypes.addressof(mine)] = table
            names[file] = _name(name) if name else ""
            where.value = ctypes.addressof(tables[where.value])
        return code

    @_DELETE
    def delete(_: int, name: int, sync_folder: int) -> int:
        code = real.delete(ctypes.addressof(real), name, sync_folder)
        if code == 0:
            events.append(Event("delete", _name(name)))
        return code

    ours.open, ours.delete = open_file, delete
    assert sqlite.sqlite3_vfs_register(ctypes.byref(ours), 1) == 0
    try:
        yield
    finally:
        sqlite.sqlite3_vfs_unregister(ctypes.byref(ours))
        sqlite.sqlite3_vfs_register(ctypes.byref(real), 1)
