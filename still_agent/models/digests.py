"""The digest of a model's weights, kept from one load to the next.

Hashing every weight takes seconds a gigabyte, and a model that was not touched has the digest
that it had. So a digest is kept beside the device, inode, size and times of the files it is of; if
any of them has changed, the weights are hashed again. The time of the inode's last change is among
them, which no program can set back as it can the other. A file that was written a moment ago is
not trusted yet: it may be written again without a newer time.

The notes are a file of the user's own cache folder (`STILL_CACHE` names another). They only save
time: what cannot be read, or is not what we would have written, is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
import transformers

SETTLED = 2.0  # seconds after which a file's time tells whether it was written since
_MOST = 256  # digests kept, the newest ones
_BYTES = 1 << 20  # of the notes, at most
_DIGEST = re.compile(r"[0-9a-f]{64}")


def kept(files: Iterable[Path], about: str, compute: Callable[[], str]) -> str:
    """`compute()`'s digest of what is loaded from `files`, from the notes if they have it.

    about: what decides the digest beside the files' bytes, such as the dtype they are loaded in.
    """
    try:
        key = _key(files, about)
    except OSError:
        key = None
    if key is None:
        return compute()
    notes = _read()
    if (known := notes.pop(key, None)) is None:
        known = compute()
        _write({**notes, key: known})
    return known


def _key(files: Iterable[Path], about: str) -> str | None:
    """What names the files as they are now; None if they are too new to tell, or none."""
    versions = [torch.__version__, transformers.__version__]
    told: list[object] = [about, *versions]
    newest = 0.0
    for file in sorted(files):
        s = file.stat()
        told.append([file.name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns])
        newest = max(newest, s.st_mtime, s.st_ctime)
    if len(told) == 1 + len(versions) or not newest < time.time() - SETTLED:
        return None
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _notes() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("STILL_CACHE") or Path(base) / "still-agent") / "digests.json"


def _read() -> dict[str, str]:
    try:
        with _notes().open("rb") as file:
            found = json.loads(file.read(_BYTES))
        return {k: v for k, v in found.items() if _DIGEST.fullmatch(k) and _DIGEST.fullmatch(v)}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, RuntimeError):
        return {}


def _write(notes: dict[str, str]) -> None:
    with suppress(OSError, RuntimeError):  # no home, a full disk: then it is hashed next time
        path = _notes()
        path.parent.mkdir(parents=True, exist_ok=True)
        out, name = tempfile.mkstemp(dir=path.parent)
        try:
            with open(out, "w") as file:
                json.dump(dict(list(notes.items())[-_MOST:]), file)
            os.replace(name, path)  # whole, or as it was
        except BaseException:
            os.unlink(name)
            raise
