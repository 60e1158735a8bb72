"""Text to token ids and back, one message at a time.

Two rules shape this file. Text can never become a control token: content is encoded by an
encoder that does not know them, apart from the control tokens that frame it. And what was
said is never rendered again: real chat templates rewrite history (dropping old reasoning
blocks, say), which would belie the cache; so a template is reduced, once, to what stands
before and after a message of each role.

Both adapters are byte-level: every token is a string of bytes, so decoding is exact and a
stream can hold back the bytes of an unfinished character.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tiktoken
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from still_memory.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
THINK = ("<think>", "</think>")


class Tokenizer(Protocol):
    """What a session needs of a tokenizer and its chat template."""

    start: list[int]  # before the first message; may be empty
    eos_ids: set[int]  # a reply ends with one of these
    think: tuple[int, int] | None  # ids that open and close a reasoning block
    control: set[int]  # ids that no text ever becomes
    size: int  # one more than the largest id
    digest: str
    frames: dict[str, Frame]  # by role

    @property
    def template_digest(self) -> str: ...

    def encode(self, text: str) -> list[int]:
        """Ids of content. Never a control token. InputError for lone surrogates."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; none for a control token or an unknown id."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, control tokens dropped, invalid UTF-8 as U+FFFD."""
        ...

    def message(self, role: str, text: str) -> list[int]:
        """A whole message: opening, body, closing. InputError for an unknown role."""
        ...

    def reply_opening(self, *, thinking: bool = True) -> list[int]:
        """What to feed before the model's reply; without `thinking`, before one that goes without
        reasoning, where the template knows how to ask for it."""
        ...

    def reply_closing(self, last_id: int) -> list[int]:
        """What to feed after a reply's last id, fed itself, so that its message is closed."""
        ...


@dataclass(frozen=True)
class Frame:
    """What stands before and after a message's body."""

    opening: list[int]
    closing: list[int]


class Framed(ABC):
    """The half of a tokenizer that both adapters share: messages, and bytes to text."""

    start: list[int]
    eos_ids: set[int]
    think: tuple[int, int] | None
    control: set[int]
    size: int
    digest: str

    frames: dict[str, Frame]
    opening: list[int]  # of a reply
    direct: list[int]  # of one without reasoning

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def token_bytes(self, token: int) -> bytes: ...

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def message(self, role: str, text: str) -> list[int]:
        if (frame := self.frames.get(role)) is None:
            raise InputError(
                f"the chat template has no role {role!r}; use one of {', '.join(self.frames)}"
            )
        return [*frame.opening, *self.encode(text), *frame.closing]

    def reply_opening(self, *, thinking: bool = True) -> list[int]:
        return list(self.opening if thinking else self.direct)

    def reply_closing(self, last_id: int) -> list[int]:
        closing = self.frames["assistant"].closing
        return closing[1:] if closing[:1] == [last_id] else list(closing)

    @property
    def template_digest(self) -> str:
        frames = {role: [f.opening, f.closing] for role, f in self.frames.items()}
        return _digest([self.start, frames, self.opening])


class TextStream:
    """Text of a growing reply, piece by piece; the pieces joined equal `decode` of the whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes, which may be none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What is left: a character that never became whole, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


class TiktokenTokenizer(Framed):
    """The reference format: `tokenizer.tiktoken` (base64 and rank) and `tiktoken_config.json`.

    The config names `pattern`, `special_tokens`, `bos_token`, `eos_tokens`, `chat_template`
    (`prefix` with `{role}`, and `suffix`) and, where the model reasons, `think`.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        try:
            config = json.loads((folder / "tiktoken_config.json").read_text("utf-8"))
            ranks = _read_ranks(folder / "tokenizer.tiktoken")
            special: dict[str, int] = config["special_tokens"]
            self._encoding = tiktoken.Encoding(
                "still",
                pat_str=config["pattern"],
                mergeable_ranks=ranks,
                special_tokens=special,
            )
            template = config["chat_template"]
            prefix, suffix = template["prefix"], self._control(template["suffix"])
            self.start = self._control(config.get("bos_token") or "")
            self.eos_ids = {special[name] for name in config["eos_tokens"]}
            think = [special[name] for name in config.get("think") or ()]
        except (OSError, ValueError, KeyError, TypeError, binascii.Error) as error:
            raise InputError(
                f"{folder} holds no usable tiktoken tokenizer ({error!r}); it takes "
                "tokenizer.tiktoken and tiktoken_config.json as the reference model has them"
            ) from error
        self.think = (think[0], think[1]) if len(think) == 2 else None
        self.control = set(special.values())
        self._bytes = {rank: token for token, rank in ranks.items()}
        if not self.control.isdisjoint(self._bytes):
            raise InputError(
                f"{folder}: a special token has the id of an ordinary one, so text could turn "
                "into it; give special tokens ids of their own"
            )
        self.size = max(*special.values(), *ranks.values()) + 1
        openings = {role: self._control(prefix.format(role=role)) for role in ROLES}
        # A role whose own token is missing would be spelled out as text.
        self.frames = {
            role: Frame(ids, suffix)
            for role, ids in openings.items()
            if not self.control.isdisjoint(ids)
        }
        if "assistant" not in self.frames:
            raise InputError(f"{folder}: the chat template has no assistant token; add one")
        self.opening = self.direct = self.frames["assistant"].opening
        identity = [config["pattern"], special, {t.hex(): r for t, r in ranks.items()}]
        self.digest = _digest([*identity, sorted(self.eos_ids), think])

    def _control(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special="all")

    def encode(self, text: str) -> list[int]:
        parts = _safe_parts(_well_formed(text))
        return [token for part in parts for token in self._encoding.encode_ordinary(part)]

    def token_bytes(self, token: int) -> bytes:
        return self._bytes.get(token, b"")


class HubTokenizer(Framed):
    """A byte-level BPE tokenizer of the hub and its chat template.

    `eos_ids` adds ids that end a reply, as a model's generation config lists them.
    """

    def __init__(self, folder: str | Path, eos_ids: Iterable[int] = ()) -> None:
        try:
            self._hub: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # a broken file can fail anywhere in transformers
            raise InputError(
                f"{str(folder)!r} has no tokenizer that transformers can load ({error}); "
                "add tokenizer.json and tokenizer_config.json"
            ) from error
        if getattr(self._hub, "backend_tokenizer", None) is None or not self._hub.chat_template:
            raise InputError(
                f"the tokenizer of {str(folder)!r} has no fast backend or no chat template; "
                "use the model's instruction-tuned version"
            )
        whole = json.loads(self._hub.backend_tokenizer.to_str())
        self.digest = _digest(whole)
        added = {entry["content"]: entry for entry in whole["added_tokens"]}
        # An encoder that has never heard of the added tokens cannot be talked into one.
        # (split_special_tokens=True is not enough: it still finds added tokens that are not
        # "special", such as <think> and <tool_call>.)
        self._plain = Backend.from_str(json.dumps({**whole, "added_tokens": []}))
        self._plain.no_truncation()
        self._plain.no_padding()
        spelled = self._plain.get_vocab()
        self.control = {entry["id"] for entry in added.values()}
        if not _byte_level(whole.get("decoder")) or not self.control.isdisjoint(spelled.values()):
            raise InputError(
                f"the tokenizer of {str(folder)!r} is not byte-level BPE with control tokens of "
                "their own, so its text could turn into them; use a Qwen3 tokenizer"
            )
        pair = [added[name]["id"] for name in THINK if name in added]
        self.think = (pair[0], pair[1]) if len(pair) == 2 else None
        alphabet = _byte_alphabet()
        self._bytes = {i: bytes(alphabet[c] for c in text) for text, i in spelled.items()}
        for text, entry in added.items():
            # Text that only looks like control, such as <tool_call>, is what the model said.
            if not entry["special"] and text not in THINK:
                self._bytes[entry["id"]] = text.encode()
        self.size = max(self.control | set(spelled.values())) + 1
        self._read_template()
        closing = self.frames["assistant"].closing
        ends = {self._hub.eos_token_id, *eos_ids, *(closing[:1] if closing else [])}
        self.eos_ids = {i for i in ends if i is not None}

    def _read_template(self) -> None:
        """Render sentinels and cut out what stands around them.

        A conversation around each message keeps templates from adding a default system
        prompt, or an empty reasoning block to a reply that comes last.
        """
        asked = self._render("system", "user")
        if asked is None:
            raise InputError("the chat template takes no system message; use a Qwen3 template")
        told = self._render("system", "user", "assistant", "user")
        last = self._render("system", "user", "assistant")
        alone = self._render("system")
        opened = self._render("system", "user", reply=True)
        if told is None or last is None or alone is None or opened is None:
            raise InputError("the chat template refuses a plain dialogue; use a Qwen3 template")
        closing = {"system": alone[-1], "user": asked[-1], "assistant": last[-1]}
        start = self._hub.bos_token or ""
        start = start if start and alone[0].startswith(start) else ""
        opening = {
            "system": alone[0].removeprefix(start),
            "user": asked[1].removeprefix(closing["system"]),
            "assistant": told[2].removeprefix(closing["user"]),
        }
        tool = self._render("system", "user", "assistant", "tool")
        if tool is not None:
            opening["tool"] = tool[3].removeprefix(closing["assistant"])
            closing["tool"] = tool[-1]
        self.start = self._control(start)
        self.frames = {
            role: Frame(self._control(text), self._control(closing[role]))
            for role, text in opening.items()
        }
        self.opening = self._control(opened[-1].removeprefix(closing["user"]))
        # As Qwen3's templates are told; one that knows no such switch ignores it.
        direct = self._render("system", "user", reply=True, enable_thinking=False) or opened
        self.direct = self._control(direct[-1].removeprefix(closing["user"]))

    def _render(self, *roles: str, reply: bool = False, **options: bool) -> list[str] | None:
        """The text between sentinel bodies, or None if the template refuses or hides one."""
        bodies = [f"sentinel{i}body" for i in range(len(roles))]
        messages = [{"role": r, "content": b} for r, b in zip(roles, bodies, strict=True)]
        try:
            text: str = self._hub.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=reply, **options
            )
        except Exception:  # a template raises whatever it likes
            return None
        parts = re.split("|".join(bodies), text)
        return parts if len(parts) == len(roles) + 1 else None

    def _control(self, text: str) -> list[int]:
        ids: list[int] = self._hub.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(_well_formed(text), add_special_tokens=False).ids
        return ids

    def token_bytes(self, token: int) -> bytes:
        return self._bytes.get(token, b"")


def _well_formed(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text has a lone surrogate at character {error.start}, which is no text; "
            "decode its bytes with errors='replace'"
        ) from error
    return text


# tiktoken's regular expressions overflow their stack on a long run of blanks (a panic, which
# no `except Exception` catches), so such a run is encoded in pieces.
_BLANKS = re.compile(r"\s{10000}")


def _safe_parts(text: str) -> Iterator[str]:
    done = 0
    for run in _BLANKS.finditer(text):
        yield text[done : run.end()]
        done = run.end()
    yield text[done:]


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Read here, and not by tiktoken, whose loader caches by path and returns stale data."""
    pairs: Iterable[Sequence[bytes]] = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in filter(None, pairs)}


def _byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    if decoder["type"] == "Sequence":
        return any(map(_byte_level, decoder["decoders"]))
    return bool(decoder["type"] == "ByteLevel")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in kept]
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(others)}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
