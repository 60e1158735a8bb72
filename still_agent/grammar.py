"""What a reply may say: JSON of a schema, calls of given tools, or text in which none begins.

llguidance compiles a grammar and tells, at each step, which tokens keep to it. It reads bytes, and
so do our tokenizers: a token that stands for `<tool_call>` and the same letters one by one are the
same to it. Control tokens are never allowed, apart from those that end a reply.

JSON is written as `json.dumps` writes it, one blank after a comma and a colon and no other: a weak
model cannot spend its reply on blanks, and a call comes out nearly as its canonical text. An object
whose schema names its properties has no others, unless the schema says that it may.

A hostile schema costs no more than the limits below: text, lexer and grammar are bounded.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from still_agent.constraint import Constraint
from still_agent.ending import FARTHEST, Endings, Hints
from still_agent.messages import JsonValue
from still_agent.models.tokenizers import Tokenizer
from still_agent.sampling import Sampling
from still_agent.tools import QWEN, Tool, ToolFormat
from still_agent.witness import witnesses
from still_memory.errors import InputError

Schema = dict[str, JsonValue]

KEPT = 32  # compiled grammars, of the least recently used
LONGEST = 200_000  # characters of a schema, or of all tools' schemas
CHOICES = ("auto", "required", "none")
# No blanks but these, and no \u: it could spell half a surrogate pair, which is no text.
_JSON = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "json_allowed_escapes": 'nrbtf\\"',
}


class Grammars:
    """The grammars of one tokenizer, each compiled once. Safe for threads.

    vocab_size: width of the model's logits.

    Raises InputError without llguidance.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        try:
            import llguidance
        except ImportError:
            raise InputError(
                "tools and structured replies need llguidance: pip install 'still-agent[server]'"
            ) from None
        self._library = llguidance
        self._tokenizer = tokenizer
        self._tokens = _tokens(llguidance, tokenizer, max(vocab_size, tokenizer.size))
        self._endings = Endings(tokenizer)
        self._limits = llguidance.LLParserLimits(
            initial_lexer_fuel=1_000_000,
            max_lexer_states=20_000,
            max_grammar_size=100_000,
            verbose_errors=False,
        )
        self._compiled: OrderedDict[str, tuple[Any, tuple[int, ...]]] = OrderedDict()
        self._lock = threading.Lock()

    def constrain(
        self,
        sampling: Sampling,
        *,
        schema: Schema | None = None,
        tools: Sequence[Tool] = (),
        choice: str = "auto",
        format: ToolFormat = QWEN,
        parallel: bool = True,
        reasoning: int | None = None,
    ) -> Constraint | None:
        """What draws one reply's tokens, for `decode.answer`; None where all may be said.

        schema: the reply is one JSON value of it; {} is any, {"type": "object"} any object.
        choice: "auto", text or calls; "required", calls; a tool's name, calls of it; "none", no
            call. With a schema, what is no call is a value of it.
        parallel: whether there may be several calls.
        reasoning: as `decode.answer` has it.

        InputError for a schema that is no schema, is too large or has what is not supported, and
        for a choice that is no tool.
        """
        names = [tool.name for tool in tools]
        if len(set(names)) < len(names):
            raise InputError("two tools have one name: give each its own")
        if choice not in CHOICES:
            tools, name = [tool for tool in tools if tool.name == choice], choice
            choice = "required"
            if not tools:
                raise InputError(
                    f"no tool is called {name[:80]!r}: give one of {', '.join(names) or 'no tools'}"
                )
        if choice == "required" and not tools:
            raise InputError("a call is required and no tool is given: give tools")
        if schema is None and not tools:
            return None
        tools = tools if choice != "none" else ()
        grammar = _grammar(schema, tools, choice, format, parallel)
        parameters = [tool.parameters for tool in tools]
        hints = self._endings.hints(set(witnesses([schema, *parameters])))
        matcher, way = self._compile(grammar, tools, hints)
        text = schema is None and choice != "required"
        return Constraint(
            matcher,
            way,
            self._endings,
            hints,
            self._tokenizer,
            sampling,
            # Text needs no end; a call that begins in it does.
            opening=format.opening.encode() if text else None,
            reasoning=reasoning,
        )

    def _compile(
        self, grammar: str, tools: Sequence[Tool], hints: Hints
    ) -> tuple[Any, tuple[int, ...]]:
        """A matcher at the grammar's beginning, and a short reply of it."""
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                matcher, way = self._compiled[grammar]
                return matcher.deep_copy(), way
        lark = self._library.LLMatcher.grammar_from_lark(grammar)
        matcher = self._library.LLMatcher(self._tokens, lark, log_level=0, limits=self._limits)
        found = None if matcher.is_error() else self._endings.way(matcher, hints)
        if matcher.is_error():
            raise _unsupported(matcher.get_error(), grammar, tools)
        if found is None:
            raise InputError(
                f"no reply within {FARTHEST:,} bytes was found for the schema: ask for fewer or "
                "shorter values, or for a simpler pattern"
            )
        with self._lock:
            self._compiled[grammar] = matcher, found
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return matcher.deep_copy(), found


class _Source:
    """A tokenizer as llguidance asks for one: the bytes of each id, and how text is encoded.

    What must come is encoded as the model would write it, `<tool_call>` as the one token.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        spelled = [tokenizer.token_bytes(i) for i in range(size)]
        self._encode = tokenizer.encode
        self._added = {spelled[i].decode(): i for i in tokenizer.control if spelled[i]}
        self._apart = re.compile(f"({'|'.join(map(re.escape, self._added))})")
        self.eos_token_id = min(tokenizer.eos_ids)
        self.special_token_ids = [i for i, token in enumerate(spelled) if not token]
        self.tokens = [token or f"<{i}>".encode() for i, token in enumerate(spelled)]

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode()
        if not self._added:
            return self._encode(text)
        parts = filter(None, self._apart.split(text))
        return [i for part in parts for i in self._ids(part)]

    def _ids(self, part: str) -> list[int]:
        return [self._added[part]] if part in self._added else self._encode(part)


def _tokens(library: Any, tokenizer: Tokenizer, size: int) -> Any:
    wrapper = library.TokenizerWrapper(_Source(tokenizer, size))
    return library.LLTokenizer(wrapper, n_vocab=size, eos_token=sorted(tokenizer.eos_ids))


# -- grammars, in llguidance's dialect of Lark ------------------------------------------------


def _grammar(
    schema: Schema | None, tools: Sequence[Tool], choice: str, format: ToolFormat, parallel: bool
) -> str:
    rules: list[str] = []
    ways: list[str] = []
    opening = _quoted(format.opening)
    size = 0
    if schema is not None:
        if not isinstance(schema, dict):
            raise InputError(f"a schema must be a dict, not {type(schema).__name__}")
        rules.append(f"value: {(value := _json(schema))}")
        size += len(value)
        ways.append("value")
    elif choice != "required":
        within = f"/(?s:.*)/ {opening} /(?s:.*)/"
        rules += [f"text: TEXT\nTEXT: /(?s:.*)/ & ~( {within} )"]
        ways.append("text")
    if tools:
        first = opening
        if schema is None and choice == "auto":
            rules.append(f"begun[lazy]: /(?s:.*)/ {opening}")
            first = "begun"
        more = f'( "\\n" {opening} call )*' if parallel else ""
        end = f"( {_quoted(format.ending)} )?" if format.ending and choice == "auto" else ""
        ways.append(f"{first} call {more} {end}")
        calls = []
        for number, tool in enumerate(tools):
            before, after = map(_quoted, format.around(tool.name))
            calls.append(f"{before} arguments{number} {after}")
            arguments = _json({"type": "object", **(tool.parameters or {"properties": {}})})
            size += len(arguments)
            rules.append(f"arguments{number}: {arguments}")
        rules.append(f"call: {' | '.join(calls)}")
    if size > LONGEST:
        raise InputError(
            f"the schemas have {size:,} characters and {LONGEST:,} are allowed: give fewer or "
            "smaller ones"
        )
    return "\n".join([f"start: {' | '.join(ways)}", *rules])


def _quoted(text: str) -> str:
    return json.dumps(text)


def _json(schema: Schema) -> str:
    try:
        closed: Any = schema if any(map(_combines, _within(schema))) else _closed(schema)
        return "%json " + json.dumps({**closed, "x-guidance": _JSON}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"the schema cannot be read ({error}); give one as JSON, in a dict"
        ) from None


def _unsupported(error: str, grammar: str, tools: Sequence[Tool]) -> InputError:
    """What llguidance finds in a schema, without the grammar that it shows with it."""
    found = re.match(r"at (\d+)\(\d+\): (failed to compile JSON schema: )?", error)
    what = "the schema"
    if found:
        rule = grammar.splitlines()[int(found[1]) - 1]
        if number := re.match(r"arguments(\d+)", rule):
            what = f"the schema of tool {tools[int(number[1])].name!r}"
        error = error[found.end() :]
    error = re.split(r"\n\s*\d+ \| |<non-verbose/>", error)[0]
    error = " ".join(error.split())
    return InputError(f"{what} cannot be kept to: {error[:500]}; leave that out")


# -- objects without other properties than those that they name -------------------------------


def _within(schema: JsonValue) -> Iterator[Schema]:
    """Every dict of a schema, also those that are none themselves."""
    if isinstance(schema, dict):
        yield schema
    if isinstance(schema, dict | list):
        for one in schema.values() if isinstance(schema, dict) else schema:
            yield from _within(one)


def _combines(schema: Schema) -> bool:
    """Whether properties of several schemas may come together in one object."""
    joined = schema.keys() & {"anyOf", "oneOf", "$ref"}
    return "allOf" in schema or bool(joined and "properties" in schema)


def _closed(schema: JsonValue) -> JsonValue:
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        key: one if key in ("const", "enum", "default", "examples") else _closed(one)
        for key, one in schema.items()
    }
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if named and not schema.keys() & {"additionalProperties", "patternProperties"}:
        closed["additionalProperties"] = False
    return closed
