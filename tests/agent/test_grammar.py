"""What a reply may say is all that it says, and what it must say is whole within its limit."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import BaseModel, Field, TypeAdapter
from torch import Tensor

from still_agent import Agent, Budget
from still_agent.constraint import Constraint
from still_agent.decode import Answer, answer
from still_agent.grammar import Grammars
from still_agent.messages import ToolCall
from still_agent.models import HubTokenizer, TiktokenTokenizer, Tokenizer
from still_agent.rolling import RollingState
from still_agent.sampling import Sampling
from still_agent.tools import GEMMA, QWEN, Tool, ToolFormat
from still_agent.witness import witness
from still_memory.errors import InputError
from tests.conftest import REFERENCE
from tests.models.hub import CHATML, HYBRID, THINKING, build_hub

VOCAB = 4096


class Colour(Enum):
    RED = "red"
    DARK_GREEN = "dark green"


class Place(BaseModel):
    city: str
    country: str | None = None


class Person(BaseModel):
    name: str
    age: int
    home: Place
    likes: list[str]


class Tree(BaseModel):
    value: int
    below: list[Tree] = []


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]

# Each with the tokens that its shortest reply may take at most, the one that ends it included.
SCHEMAS: dict[str, tuple[Any, int]] = {
    "string": (str, 4),
    "bounded string": (Annotated[str, Field(min_length=12, max_length=40)], 16),
    "pattern": (Annotated[str, Field(pattern=r"^[a-z]+@[a-z]+\.(com|org)$")], 16),
    "date": (datetime, 22),
    "integer": (int, 3),
    "bounded integer": (Annotated[int, Field(ge=1000, lt=10**6)], 4),
    "number": (float, 3),
    "boolean": (bool, 4),
    "enum": (Colour, 8),
    "strings": (list[str], 3),
    "three strings": (Annotated[list[str], Field(min_length=3)], 12),
    "map": (dict[str, int], 3),
    "either": (Place | int | None, 16),
    "optional": (Place, 12),
    "nested": (Person, 48),
    "recursive": (Tree, 12),
    "by kind": (Pet, 20),
    "pairs": (list[tuple[str, float]], 3),
}
TOOLS = [
    Tool(
        "add",
        "Adds two numbers.",
        {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
            "required": ["x", "y"],
        },
    ),
    Tool("find", "", Person.model_json_schema()),
    Tool("now", "", {}),
    Tool("note", "", {"type": "object", "additionalProperties": {"type": "string"}}),
]


@pytest.fixture(scope="module")
def reference() -> TiktokenTokenizer:
    return TiktokenTokenizer(REFERENCE)


@pytest.fixture(scope="module")
def grammars(reference: TiktokenTokenizer) -> Grammars:
    return Grammars(reference, VOCAB)


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with Agent.load("reference", budget=Budget(slots=256)) as agent:
        yield agent


def babble(seed: int) -> Callable[[], Tensor]:
    """Logits of a model that knows nothing."""
    random = torch.Generator().manual_seed(seed)
    return lambda: 4 * torch.randn(VOCAB, generator=random)


def said(
    choose: Constraint,
    tokenizer: Tokenizer,
    most: int,
    logits: Callable[[], Tensor],
    meant: Sequence[int] = (),
) -> tuple[str, bool]:
    """A reply of at most `most` tokens, first `meant` if it may be said; and whether it ended."""
    ids: list[int] = []
    while len(ids) < most:
        scores = logits()
        if len(ids) < len(meant):
            scores[meant[len(ids)]] = 1000.0
        ids.append(choose(scores))
        if ids[-1] in tokenizer.eos_ids:
            return tokenizer.decode(ids), True
    return tokenizer.decode(ids), False


def samplings(most: int) -> list[Sampling]:
    return [
        Sampling(max_tokens=most),
        Sampling(max_tokens=most, temperature=1.0, seed=1),
        Sampling(max_tokens=most, temperature=2.0, top_p=0.9, seed=2),
    ]


# -- structured replies -----------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("most", [24, 40, 64, 200])
def test_a_reply_is_whole_and_valid_whatever_the_model_would_say(
    grammars: Grammars, reference: TiktokenTokenizer, name: str, most: int
) -> None:
    kind, least = SCHEMAS[name]
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    for sampling in samplings(most):
        choose = grammars.constrain(sampling, schema=adapter.json_schema())
        assert choose is not None and choose.least <= least
        text, ended = said(choose, reference, most, babble(most))
        if most >= least:
            assert ended, text
            adapter.validate_json(text)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_reply_is_whole_where_the_limit_leaves_room_for_no_other(
    grammars: Grammars, reference: TiktokenTokenizer, name: str
) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(SCHEMAS[name][0])
    schema = adapter.json_schema()
    first = grammars.constrain(Sampling(), schema=schema)
    assert first is not None
    for most in range(first.least, first.least + 3):
        choose = grammars.constrain(Sampling(max_tokens=most, temperature=1.0), schema=schema)
        assert choose is not None
        text, ended = said(choose, reference, most, babble(most))
        assert ended
        adapter.validate_json(text)


PATTERNS = [
    r"^\d{3}-\d{2}-\d{4}$", r"^[A-Z]{2}\d{6}[A-Z]?$", r"^https?://[^\s/$.?#].[^\s]*$",
    r"^[a-z0-9]+(-[a-z0-9]+)*$", r"^.+@.+\..+$", r"^[^\\]*\\[^\\]*$", r'^"[^"]*"$', r"^\{.*\}$",
    r"^a*b*c{5,}$", "foo", r"^(ab|cd)+?ef$", r"^[\w.]+ \W$", r"^[\u4e00-\u9fff]{3}$", r"x|yy|^$",
]  # fmt: skip
FORMATS = ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_a_string_that_must_match_is_whole(
    grammars: Grammars, reference: TiktokenTokenizer, pattern: str, seed: int
) -> None:
    schema: Any = {"type": "object", "properties": {"s": {"type": "string", "pattern": pattern}}}
    sampling = Sampling(max_tokens=32, temperature=1.0, seed=seed)
    choose = grammars.constrain(sampling, schema={**schema, "required": ["s"]})
    assert choose is not None and choose.least <= 24
    text, ended = said(choose, reference, 32, babble(seed))
    assert ended
    assert re.search(pattern, json.loads(text)["s"])


@pytest.mark.parametrize("form", [*FORMATS, "uri"])
def test_a_string_of_a_known_format_is_whole(
    grammars: Grammars, reference: TiktokenTokenizer, form: str
) -> None:
    sampling = Sampling(max_tokens=32, temperature=1.0, seed=1)
    choose = grammars.constrain(sampling, schema={"type": "string", "format": form})
    assert choose is not None and choose.least <= 24
    text, ended = said(choose, reference, 32, babble(1))
    assert ended and isinstance(json.loads(text), str)


@pytest.mark.parametrize("schema", [{}, {"type": "object"}], ids=["any", "object"])
@pytest.mark.parametrize("seed", range(6))
def test_json_mode_gives_json(
    grammars: Grammars, reference: TiktokenTokenizer, schema: Any, seed: int
) -> None:
    choose = grammars.constrain(Sampling(max_tokens=48, temperature=1.0, seed=seed), schema=schema)
    assert choose is not None
    brace = reference.encode('{"') if "type" in schema else reference.encode("[[{")
    text, ended = said(choose, reference, 48, babble(seed), meant=brace)
    assert ended
    assert isinstance(json.loads(text), dict if "type" in schema else list)


def test_an_object_has_the_properties_that_its_schema_names_and_no_others(
    grammars: Grammars, reference: TiktokenTokenizer
) -> None:
    for extra, closed in (({}, True), ({"additionalProperties": True}, False)):
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, **extra}
        choose = grammars.constrain(Sampling(max_tokens=64), schema=schema)
        assert choose is not None
        meant = reference.encode('{"b": 1}')
        text, _ = said(choose, reference, 64, babble(0), meant)
        assert ("b" in json.loads(text)) is not closed


@pytest.mark.parametrize("kind", [int, float, Any])
def test_a_number_does_not_go_on_for_ever(
    grammars: Grammars, reference: TiktokenTokenizer, kind: Any
) -> None:
    """Digits are all that this model says, where they are allowed."""
    digits = [i for i in range(VOCAB) if reference.token_bytes(i).isdigit()]

    def logits() -> Tensor:
        return torch.zeros(VOCAB).index_fill(0, torch.tensor(digits), 9.0)

    choose = grammars.constrain(Sampling(), schema=TypeAdapter(dict[str, kind]).json_schema())
    assert choose is not None
    text, ended = said(choose, reference, 256, logits, reference.encode('{"a": 1'))
    value = json.loads(text)["a"]
    assert len(str(value)) <= 45
    assert not isinstance(value, int) or value < 2**63  # what msgpack holds, in a checkpoint
    choose = grammars.constrain(Sampling(max_tokens=60), schema={"type": "string"})
    assert choose is not None
    text, ended = said(choose, reference, 60, logits)
    assert ended and len(text) > 50  # a string may hold what it likes


def test_a_seed_gives_the_same_reply_and_greedy_takes_the_best_that_is_allowed(
    grammars: Grammars, reference: TiktokenTokenizer
) -> None:
    schema = TypeAdapter(Person).json_schema()
    drawn = Sampling(max_tokens=80, temperature=1.5, seed=7)
    replies = []
    for _ in range(2):
        choose = grammars.constrain(drawn, schema=schema)
        assert choose is not None
        replies.append(said(choose, reference, 80, babble(3)))
    assert replies[0] == replies[1]
    colours = grammars.constrain(Sampling(), schema={"enum": ["red", "blue", 7]})
    assert colours is not None
    scores = torch.zeros(VOCAB)
    scores[reference.encode("7")] = 1.0
    scores[reference.encode("x")] = 2.0
    assert colours(scores) == reference.encode("7")[0]


# -- the reference model ----------------------------------------------------------------------


def answered(agent: Agent, sampling: Sampling, choose: Constraint | None) -> Answer:
    state = RollingState(agent.model, agent.compactor, Budget(slots=256))
    tokenizer = agent.model.tokenizer
    message = [*tokenizer.start, *tokenizer.message("user", "My sister Ana lives in Porto.")]
    reply = answer(state, tokenizer, message, sampling, choose)
    while True:
        try:
            next(reply)
        except StopIteration as done:
            result: Answer = done.value
            return result


@pytest.mark.parametrize("name", ["nested", "recursive", "strings", "date"])
def test_the_reference_model_gives_whole_json(agent: Agent, name: str) -> None:
    kind, _ = SCHEMAS[name]
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    grammars = Grammars(agent.model.tokenizer, agent.model.vocab_size)
    for sampling in samplings(48)[:2]:
        choose = grammars.constrain(sampling, schema=adapter.json_schema())
        reply = answered(agent, sampling, choose)
        assert reply.finish == "stop"
        adapter.validate_json(reply.text)


def test_the_reference_model_calls_the_tool_that_it_must(agent: Agent) -> None:
    grammars = Grammars(agent.model.tokenizer, agent.model.vocab_size)
    for sampling in samplings(96)[:2]:
        choose = grammars.constrain(sampling, tools=TOOLS, choice="add", parallel=False)
        reply = answered(agent, sampling, choose)
        content, (call,) = QWEN.parse(reply.text)
        assert (content, call.name, reply.finish) == ("", "add", "stop")
        assert all(isinstance(call.arguments[key], int) for key in ("x", "y"))


# -- calls ------------------------------------------------------------------------------------

both = pytest.mark.parametrize("form", [QWEN, GEMMA], ids=["qwen", "gemma"])


def check(calls: Sequence[ToolCall]) -> None:
    for call in calls:
        if call.name == "add":
            assert call.arguments.keys() == {"x", "y"}
            assert all(isinstance(v, int) for v in call.arguments.values())
        elif call.name == "find":
            Person.model_validate(call.arguments)
        elif call.name == "now":
            assert call.arguments == {}
        else:
            assert call.name == "note"
            assert all(isinstance(v, str) for v in call.arguments.values())


@both
@pytest.mark.parametrize("most", [64, 100, 200])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_required_call_is_made_and_is_whole(
    grammars: Grammars, reference: TiktokenTokenizer, form: ToolFormat, most: int, parallel: bool
) -> None:
    for sampling in samplings(most):
        choose = grammars.constrain(
            sampling, tools=TOOLS, choice="required", format=form, parallel=parallel
        )
        assert choose is not None and choose.least <= 64
        text, ended = said(choose, reference, most, babble(most))
        content, calls = form.parse(text)
        assert ended and calls and not content
        assert parallel or len(calls) == 1
        check(calls)


@both
def test_several_calls_may_follow_each_other_if_they_may_be_parallel(
    grammars: Grammars, reference: TiktokenTokenizer, form: ToolFormat
) -> None:
    two = form.text("", [ToolCall("now", {}), ToolCall("add", {"x": 1, "y": 2})])
    meant = [*reference.encode(two), min(reference.eos_ids)]
    for parallel, made in ((True, ["now", "add"]), (False, ["now"])):
        choose = grammars.constrain(
            Sampling(max_tokens=200), tools=TOOLS, choice="required", format=form, parallel=parallel
        )
        assert choose is not None
        text, ended = said(choose, reference, 200, babble(0), meant)
        assert ended
        assert [call.name for call in form.parse(text)[1]] == made


@both
@pytest.mark.parametrize("name", ["add", "find", "now", "note"])
def test_a_tool_that_is_named_is_called(
    grammars: Grammars, reference: TiktokenTokenizer, form: ToolFormat, name: str
) -> None:
    sampling = Sampling(max_tokens=100, temperature=1.0, seed=3)
    choose = grammars.constrain(sampling, tools=TOOLS, choice=name, format=form)
    assert choose is not None
    _, calls = form.parse(said(choose, reference, 100, babble(5))[0])
    assert {call.name for call in calls} == {name}
    check(calls)


@both
@pytest.mark.parametrize("seed", range(4))
def test_once_a_call_has_begun_in_free_text_it_is_made(
    grammars: Grammars, reference: TiktokenTokenizer, form: ToolFormat, seed: int
) -> None:
    sampling = Sampling(max_tokens=140, temperature=1.0, seed=seed)
    choose = grammars.constrain(sampling, tools=TOOLS, format=form)
    assert choose is not None
    meant = reference.encode("Let me see. <tool" + f"\n{form.opening}")
    text, ended = said(choose, reference, 140, babble(seed), meant)
    content, calls = form.parse(text)
    assert ended and calls
    assert content == "Let me see. <tool"
    check(calls)


@both
def test_a_call_for_which_there_is_no_room_is_not_begun(
    grammars: Grammars, reference: TiktokenTokenizer, form: ToolFormat
) -> None:
    meant = reference.encode("Let me see." + f"\n{form.opening}")
    for most in range(len(meant), len(meant) + 60):
        choose = grammars.constrain(Sampling(max_tokens=most), tools=TOOLS, format=form)
        assert choose is not None
        text, ended = said(choose, reference, most, babble(most), meant)
        _, calls = form.parse(text)
        assert bool(calls) == (form.opening in text)
        assert ended or not calls  # text that is cut says so


@both
def test_free_text_stays_free(
    grammars: Grammars, reference: TiktokenTokenizer, form: ToolFormat
) -> None:
    prose = 'A < b, {"name" is "ü", 😀 <tool_cal\n```json\n{}\n```, or <b>so</b>.'
    meant = [*reference.encode(prose), min(reference.eos_ids)]
    for choice in ("auto", "none"):
        choose = grammars.constrain(Sampling(), tools=TOOLS, choice=choice, format=form)
        assert choose is not None
        assert said(choose, reference, 256, babble(0), meant) == (prose, True)


@both
@pytest.mark.parametrize("seed", range(4))
def test_where_no_call_may_be_made_none_can_begin(
    grammars: Grammars, reference: TiktokenTokenizer, form: ToolFormat, seed: int
) -> None:
    sampling = Sampling(max_tokens=60, temperature=1.0, seed=seed)
    choose = grammars.constrain(sampling, tools=TOOLS, choice="none", format=form)
    assert choose is not None
    meant = reference.encode(f"So {form.opening}" * 3)
    text, _ = said(choose, reference, 60, babble(seed), meant)
    assert form.opening not in text
    assert text.startswith(f"So {form.opening[:-1]}")


def test_with_a_schema_what_is_no_call_is_json_of_it(
    grammars: Grammars, reference: TiktokenTokenizer
) -> None:
    schema = TypeAdapter(Place).json_schema()
    for begun, calls in (("<tool", True), ('{"', False)):
        choose = grammars.constrain(Sampling(max_tokens=120), tools=TOOLS, schema=schema)
        assert choose is not None
        text, ended = said(choose, reference, 120, babble(1), reference.encode(begun))
        assert ended
        assert bool(QWEN.parse(text)[1]) is calls
        if not calls:
            Place.model_validate_json(text)


def test_what_is_free_is_not_constrained(grammars: Grammars) -> None:
    assert grammars.constrain(Sampling()) is None
    assert grammars.constrain(Sampling(), choice="none") is None


# -- hub tokenizers, and reasoning ------------------------------------------------------------


@pytest.fixture(scope="module")
def hubs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HubTokenizer]:
    templates = {"plain": CHATML, "hybrid": HYBRID, "thinking": THINKING}
    folder = tmp_path_factory.mktemp
    return {n: HubTokenizer(build_hub(folder(n), t)) for n, t in templates.items()}


def hub_babble(seed: int) -> Callable[[], Tensor]:
    random = torch.Generator().manual_seed(seed)
    return lambda: 4 * torch.randn(448, generator=random)


def test_a_call_may_open_with_its_token_or_letter_by_letter(hubs: dict[str, HubTokenizer]) -> None:
    hub = hubs["plain"]
    grammars = Grammars(hub, 448)
    (call,) = [i for i in hub.control if hub.token_bytes(i) == b"<tool_call>"]
    for opening in ([call], hub.encode("<tool_call>")):
        choose = grammars.constrain(Sampling(max_tokens=200), tools=TOOLS)
        assert choose is not None
        meant = [*hub.encode("So: "), *opening]
        text, ended = said(choose, hub, 200, hub_babble(1), meant)
        content, calls = QWEN.parse(text)
        assert ended and calls and content == "So:"
        check(calls)
        mute = grammars.constrain(Sampling(max_tokens=40), tools=TOOLS, choice="none")
        assert mute is not None
        assert "<tool_call>" not in said(mute, hub, 40, hub_babble(1), meant)[0]


def test_a_call_that_must_come_opens_with_its_token(hubs: dict[str, HubTokenizer]) -> None:
    hub = hubs["plain"]
    choose = Grammars(hub, 448).constrain(Sampling(), tools=TOOLS, choice="required")
    assert choose is not None
    assert hub.token_bytes(choose(torch.zeros(448))) == b"<tool_call>"


@pytest.mark.parametrize("template", ["hybrid", "thinking"])
@pytest.mark.parametrize("reasoning", [None, 0, 5])
@pytest.mark.parametrize("seed", range(3))
def test_reasoning_comes_first_and_leaves_room_for_what_must_be_said(
    hubs: dict[str, HubTokenizer], template: str, reasoning: int | None, seed: int
) -> None:
    hub = hubs[template]
    assert hub.think is not None
    opens, closes = hub.think
    schema = TypeAdapter(Place).json_schema()
    sampling = Sampling(max_tokens=60, temperature=1.0, seed=seed)
    choose = Grammars(hub, 448).constrain(sampling, schema=schema, reasoning=reasoning)
    assert choose is not None
    logits, ids = hub_babble(seed), []
    open_already = opens in hub.reply_opening(thinking=reasoning != 0)
    while len(ids) < 60 + (0 if reasoning is None else reasoning + 2):
        scores = logits()
        scores[opens] = -100.0 if ids or open_already else 100.0
        scores[closes] = -100.0  # it would never stop
        ids.append(choose(scores))
        if ids[-1] in hub.eos_ids:
            break
    assert ids[-1] in hub.eos_ids
    if template == "thinking" or reasoning != 0:
        at = ids.index(closes)
        thought = at - (not open_already)
        assert reasoning is None or thought == reasoning
        assert reasoning is not None or thought > 10
        ids = ids[at + 1 :]
    Place.model_validate_json(hub.decode(ids))


# -- what is refused, and what it costs -------------------------------------------------------


def nested(schema: Any, depth: int) -> Any:
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED: dict[str, tuple[Any, str]] = {
    "no dict": (True, "must be a dict"),
    "no JSON": ({"enum": {1}}, "cannot be read"),
    "not a number": ({"const": float("nan")}, "cannot be read"),
    "unknown type": ({"type": "strin"}, "strin"),
    "unsupported": ({"not": {"type": "string"}}, "not"),
    "look-around": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "format": ({"type": "string", "format": "nope"}, "nope"),
    "elsewhere": ({"$ref": "https://example.org/schema"}, "example.org"),
    "a file": ({"$ref": "file:///etc/passwd"}, "passwd"),
    "contradiction": ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    "itself": ({"$ref": "#"}, "schema"),
    "endless": (
        {
            "$ref": "#/$defs/n",
            "$defs": {
                "n": {
                    "type": "object",
                    "properties": {"n": {"$ref": "#/$defs/n"}},
                    "required": ["n"],
                }
            },
        },
        "schema",
    ),
    "too deep": (nested({}, 9_000), "cannot be read"),
    "too long a string": ({"type": "string", "minLength": 10**7}, "schema"),
    "too many items": ({"type": "array", "minItems": 10**7}, "schema"),
    "too much": ({"enum": [f"value {i}" for i in range(100_000)]}, "characters"),
    "too many products": (
        {
            "allOf": [
                {"anyOf": [{"required": [f"k{i}{j}"], "type": "object"} for j in range(3)]}
                for i in range(14)
            ]
        },
        "schema",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_cannot_be_kept_to_is_refused_soon(grammars: Grammars, name: str) -> None:
    schema, reason = REFUSED[name]
    begun = time.perf_counter()
    with pytest.raises(InputError, match=reason):
        grammars.constrain(Sampling(), schema=schema)
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize(
    "pattern", ["^.*a.{18}$", "^(.*a.{9}){4}$", "^(a|aa)+(b|bb)+[^x]{200}.*y.{100}$"]
)
@pytest.mark.parametrize("seed", range(2))
def test_a_pattern_of_very_many_states_ends_whole_and_soon(
    grammars: Grammars, reference: TiktokenTokenizer, pattern: str, seed: int
) -> None:
    schema: Any = {"type": "string", "pattern": pattern}
    begun = time.perf_counter()
    choose = grammars.constrain(Sampling(temperature=1.0, seed=seed), schema=schema)
    assert choose is not None
    meant = reference.encode('"aabaaabbaaabababba')
    text, ended = said(choose, reference, 256, babble(seed), meant)
    assert ended
    assert re.search(pattern, json.loads(text), re.DOTALL)
    assert time.perf_counter() - begun < 20


@pytest.mark.parametrize("pattern", ["((a{999}){999}){99}", "(((a{999}|b{999}){99}){99}){99}"])
def test_a_pattern_of_a_vast_text_takes_no_memory(pattern: str) -> None:
    tracemalloc.start()
    assert witness(pattern) is None
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**20


def test_very_many_patterns_end_soon(grammars: Grammars) -> None:
    each = {f"p{i}": {"type": "string", "pattern": f"a{{900}}{i}b"} for i in range(400)}
    begun = time.perf_counter()
    with pytest.raises(InputError, match="no reply"):
        grammars.constrain(
            Sampling(), schema={"type": "object", "properties": each, "required": ["p0"]}
        )
    assert time.perf_counter() - begun < 3


def test_a_tool_whose_schema_is_refused_is_named(grammars: Grammars) -> None:
    bad = Tool("bad", "", {"type": "object", "properties": {"x": {"not": {}}}})
    with pytest.raises(InputError, match=r"tool 'bad'.*not"):
        grammars.constrain(Sampling(), tools=[*TOOLS, bad])


@pytest.mark.parametrize("choice", ["required", "nobody"])
def test_a_call_of_no_tool_cannot_be_asked_for(grammars: Grammars, choice: str) -> None:
    with pytest.raises(InputError, match="tool"):
        grammars.constrain(Sampling(), choice=choice)
    with pytest.raises(InputError, match="one name"):
        grammars.constrain(Sampling(), tools=[TOOLS[0], TOOLS[0]])


def test_many_tools_and_long_enums_are_no_matter(
    grammars: Grammars, reference: TiktokenTokenizer
) -> None:
    many = [Tool(f"tool_{i}", "", Person.model_json_schema()) for i in range(60)]
    choose = grammars.constrain(Sampling(max_tokens=120), tools=many, choice="required")
    assert choose is not None
    text, ended = said(choose, reference, 120, babble(2))
    assert ended and QWEN.parse(text)[1]
    choose = grammars.constrain(Sampling(), schema={"enum": [f"value {i}" for i in range(5000)]})
    assert choose is not None
    assert json.loads(said(choose, reference, 64, babble(2))[0]).startswith("value ")


def test_threads_share_grammars(grammars: Grammars, reference: TiktokenTokenizer) -> None:
    schemas = [TypeAdapter(SCHEMAS[name][0]).json_schema() for name in ("nested", "either", "map")]

    def reply(schema: Any, seed: int) -> str:
        sampling = Sampling(max_tokens=60, temperature=1.0, seed=seed)
        choose = grammars.constrain(sampling, schema=schema)
        assert choose is not None
        return said(choose, reference, 60, babble(seed))[0]

    jobs = [(schema, seed) for seed in range(4) for schema in schemas]
    alone = [reply(*job) for job in jobs]
    together: dict[int, str] = {}

    def work(number: int) -> None:
        together[number] = reply(*jobs[number])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[n] for n in range(len(jobs))] == alone


def test_without_the_library_the_extra_is_named(
    reference: TiktokenTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"pip install 'still-agent\[server\]'"):
        Grammars(reference, VOCAB)
