"""Bytes of a store altered, one at a time: what is read is what was saved, or a typed error.

    python -m tests.attacks.flips --count 20000

Every byte that is not zero is altered first, as far as `--count` reaches, then bytes of the
empty space. Each altered store is opened, listed, read, searched and written to, in a process
that may take 64 MiB more than it has. What may come of it:

    typed       an error of ours told that something is wrong
    unharmed    state, turns and list are what they were, and a turn can be added
    wrong       anything else: an altered state, an untyped error, an allocation past the
                ceiling, a dead interpreter, a session that is silently missing or older

With `--log`, the bytes are those of a log that is not yet in the main file. SQLite ends a log
at the first frame that does not match its checksum, as after a power cut, and nothing in the
file can tell one from the other: there a session may stand at an *earlier* answered turn, whole.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sqlite3
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from still_memory.errors import StillError
from still_memory.records import NewTurn
from still_memory.store import MemoryStore
from tests.attacks.states import fill, mark, state, told

NAMES, TURNS = ("alice", "bob"), 2
NEXT = state(999)
NEXT_MARK = mark(NEXT)
CEILING = 64 << 20  # bytes that a damaged store of about a megabyte may make us allocate
BATCH = 250  # alterations a process

Change = tuple[int, int]  # where, and what is XORed in
Moments = list[tuple[str, list[tuple[object, ...]]]]  # a state and what was said, turn by turn
Truth = dict[str, Moments]  # of each session


def build(folder: Path, log: bool) -> dict[str, bytes]:
    """The files of a small store; with `log`, all of it is in the log."""
    path = folder / "good.db"
    store = MemoryStore(path)
    fill(store, NAMES, TURNS)
    if not log:
        store.close()
    files = {"": path.read_bytes()}
    if log:
        files["-wal"] = (folder / "good.db-wal").read_bytes()
        store.close()
    return files


def truth() -> Truth:
    """What each session holds and has said after each of its turns."""
    found: Truth = {name: [] for name in NAMES}
    for place, name in enumerate(NAMES):
        said: list[tuple[object, ...]] = []
        for n in range(TURNS + 1):
            found[name].append((mark(state(100 * place + n)), list(said)))
            said.append((n + 1, "user", f"{name} says heron {n}", [n, place], {"n": n}))
    return found


def changes(data: bytes, count: int, seed: int) -> list[Change]:
    """So many alterations: of bytes that hold something first, in random order."""
    chance = random.Random(seed)
    used = [at for at, byte in enumerate(data) if byte]
    chance.shuffle(used)
    rest = max(0, count - len(used))
    places = used[:count] + [chance.randrange(len(data)) for _ in range(rest)]
    return [(at, chance.randrange(1, 256)) for at in places]


def judge(path: Path, right: Truth, older: bool) -> str:
    """`typed`, `unharmed`, `older` or, with what happened, `wrong: ...`."""
    seen = []
    try:
        with MemoryStore(path, synchronous="NORMAL", timeout=0.2) as store:
            seen.append(_typed(lambda: _look(store)))
            for name in NAMES:
                seen.append(_typed(lambda name=name: _session(store, name, right[name], older)))
    except StillError as error:
        seen.append(_kind(error))
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"wrong: {type(error).__name__}: {error} at {Path(where.filename).name}"
    worst = [v for v in seen if v.startswith("wrong")]
    return (worst or [v for v in ("typed", "older", "unharmed") if v in seen])[0]


def _typed(work: Callable[[], str]) -> str:
    try:
        return work()
    except StillError as error:
        return _kind(error)


def _kind(error: StillError) -> str:
    return f"wrong: {error}" if "out of memory" in str(error) else "typed"


def _look(store: MemoryStore) -> str:
    """What asks for no session by its name. A list has no digest: it must only not break."""
    store.stats()
    store.sessions()
    return "unharmed"


def _session(store: MemoryStore, name: str, right: Moments, older: bool) -> str:
    """Read a session, search it, add a turn to it and read that."""
    head = store.head(name)
    if head is None:
        return "older" if older else f"wrong: {name} is missing"
    held, said = mark(store.load(head)), told(store, name)
    if (held, said) not in right:
        return "wrong: a state that never was"
    n = right.index((held, said))
    if n < len(right) - 1 and not older:
        return "wrong: an older state"
    if any(match.number > n for match in store.search(head, "heron")):
        return "wrong: a match that is not of this session"
    for kept in store.kept(head):
        if kept != head and mark(store.load(kept)) not in [m for m, _ in right]:
            return "wrong: a kept state that never was"
    head = store.commit(head, NEXT, [NewTurn("user", "one more", [1])])
    if mark(store.load(head)) != NEXT_MARK:
        return "wrong: a state that was not saved as given"
    now = told(store, name)
    if now[:-1] != said or now[-1][2] != "one more":
        return "wrong: turns that were not saved as given"
    return "unharmed" if n == len(right) - 1 else "older"


def batch(
    folder: Path, files: dict[str, bytes], part: str, changes: Sequence[Change], right: Truth
) -> Iterator[tuple[Change, str]]:
    """What came of each alteration, tried in one child; a dead child is told as `wrong`."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(out)
        _try_all(folder, files, part, changes, right, into)
    os.close(into)
    done = 0
    with open(out) as pipe:
        for line in pipe:
            yield changes[done], line.strip()
            done += 1
    status = os.waitpid(pid, 0)[1]
    if done < len(changes):
        yield changes[done], f"wrong: the interpreter ended with status {status}"
        yield from batch(folder, files, part, changes[done + 1 :], right)


def _try_all(
    folder: Path,
    files: dict[str, bytes],
    part: str,
    changes: Sequence[Change],
    right: Truth,
    into: int,
) -> None:
    try:
        path = folder / "bad.db"
        held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (held + CEILING, held + CEILING))
        for at, mask in changes:
            for leftover in folder.glob("bad.db*"):
                leftover.unlink()
            for suffix, good in files.items():
                bad = bytearray(good)
                if suffix == part:
                    bad[at] ^= mask
                Path(f"{path}{suffix}").write_bytes(bad)
            verdict = judge(path, right, older=part == "-wal")
            os.write(into, (verdict.replace("\n", " ") + "\n").encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def run(count: int, seed: int, log: bool) -> dict[str, object]:
    shared = Path("/dev/shm")  # a file for each alteration: no disk need see them
    folder = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
    try:
        files, part = build(folder, log), "-wal" if log else ""
        right = truth()
        if (verdict := dict(batch(folder, files, part, [(0, 0)], right))[0, 0]) != "unharmed":
            raise AssertionError(f"the good store is not read back: {verdict}")
        todo, found = changes(files[part], count, seed), Counter[str]()
        wrong: list[str] = []
        for low in range(0, len(todo), BATCH):
            for (at, mask), verdict in batch(folder, files, part, todo[low : low + BATCH], right):
                kind = verdict.split(":")[0]
                found[kind] += 1
                if kind == "wrong":
                    wrong.append(f"byte {at} ^ {mask:#04x}: {verdict[7:]}")
                    print(wrong[-1], file=sys.stderr)
            print(f"{low + BATCH:,} of {len(todo):,}: {dict(found)}", file=sys.stderr)
        used = sum(byte != 0 for byte in files[part])
        return {
            "alterations": len(todo), "bytes": len(files[part]), "not_zero": used,
            **{kind: found[kind] for kind in ("typed", "unharmed", "older", "wrong")},
            "wrong_ones": wrong,
        }  # fmt: skip
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", action="store_true", help="alter the log, not the file")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    result = run(args.count, args.seed, args.log)
    if args.json:
        print(json.dumps(result))
        return
    print(f"SQLite {sqlite3.sqlite_version}, a file of {result['bytes']:,} bytes")
    print(f"{result['alterations']:,} alterations: {result['typed']:,} typed errors,")
    print(f"{result['unharmed']:,} unharmed, {result['older']:,} older, {result['wrong']} wrong")
    for line in result["wrong_ones"][:40]:  # type: ignore[index]
        print(" ", line)


if __name__ == "__main__":
    main()
