"""A chat model whose conversations are never read twice.

LangChain sends the whole list of messages with each call. What the conversation's session has had
of it is recognised, and only what is new is read (see `Agent.answer`). So nothing about a program
has to change: no history to trim, no summaries, and a store that outlives the process.

Which conversation it is, `conversation.py` finds out. Several agents under one thread are branches
of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils import secret_from_env
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, Field, SecretStr, field_validator, model_validator

from langchain_still.agents import Lease, Options
from langchain_still.conversation import InConversation
from langchain_still.messages import begun_anew, to_last_chunk, to_message, to_still
from langchain_still.structured import (
    parsed_with_raw,
    parser_of,
    response_format_of,
    schema_of,
)
from langchain_still.tools import Choice, choice_of, tools_of
from still_agent.budget import Budget
from still_agent.tools import format_for
from still_memory.errors import InputError
from still_memory.recognition import thread_of

if TYPE_CHECKING:
    from still_agent.agent import Agent
    from still_agent.answering import Answering, Place
    from still_agent.reply import Reply

_log = logging.getLogger(__name__)

_SAMPLING = ("temperature", "top_p", "seed", "max_tokens")
_OPTIONS = (  # of one call, beside `stop`
    *_SAMPLING,
    "model",
    "session_id",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "strict",  # schemas are always kept to
    "stream",  # read by LangChain
)
_LOADING = (  # what an agent of one's own has settled
    *("store", "tenant", "slots", "budget", "compactor", "codec", "device", "dtype"),
    "on_compaction",
)
# What programs tell any model, for the network that is between them
_REMOTE = ("api_key", "base_url", "max_retries", "timeout")


class ChatStill(InConversation):
    """An open-weight model whose memory is bounded and saved, for LangChain and LangGraph.

    ```python
    agent = create_agent(model=ChatStill(model="reference", store="memory.db"))
    ```

    The model is loaded when it is first used, once for all objects of the same options. Each reply
    says in `response_metadata` which `session` it belongs to, how many turns of it were `known`,
    what it was `forked_from`, and its `compactions`, `slots` and `logical_tokens`; `usage_metadata`
    counts what was not read again as `cache_read`.

    A stream that is left, and a call that is cancelled, are undone. With ordinary (not async)
    streams a second turn of the same conversation abandons one that is still open.
    """

    model: str = "reference"
    """"reference", a folder, or a hub id."""
    store: str | None = None
    """A SQLite file; None keeps conversations in memory, as long as this object and its copies."""
    tenant: str = ""
    """Whose conversations in that file."""
    key: SecretStr | None = Field(default_factory=secret_from_env("STILL_AGENT_KEY", default=None))
    """Of an encrypted store, as hex or base64."""
    slots: int | None = None
    """The most KV slots of a conversation: `Budget(slots=...)`."""
    budget: Budget | None = None
    """More than their number: how they are shared, and the schedule."""
    compactor: Any = None
    """A folder, a name such as "streaming", or a `Compactor`; see `Agent.load`."""
    codec: str | None = None
    device: str | None = None
    dtype: str | None = None
    on_compaction: Callable[[Any], None] | None = Field(default=None, exclude=True)
    """Called after each compaction with an `events.Compaction`."""
    agent: Any = Field(default=None, exclude=True, repr=False)
    """An `Agent` of your own, in place of all of the above; `close` leaves it open."""

    temperature: float | None = Field(default=None, ge=0.0)
    """0, the default, is greedy."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=0)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: list[str] | None = None
    streaming: bool | None = None
    tool_choice: str | None = None
    """What `bind_tools` assumes where it is not told. Small models do not know when to call a tool;
    "any" makes them. Middleware that sets a `ModelRequest`'s `tool_choice` says it call by call."""

    lease: Lease = Field(default_factory=Lease, exclude=True, repr=False)
    """The loaded agents, shared with copies."""

    # -- what is given ------------------------------------------------------------------------

    @model_validator(mode="before")
    @classmethod
    def _known_options(cls, given: Any) -> Any:
        unknown = set(given) - set(cls.model_fields) - set(_REMOTE)
        if unknown:
            raise InputError(f"ChatStill has no option {', '.join(map(repr, sorted(unknown)))}")
        return {name: value for name, value in given.items() if name not in _REMOTE}

    @field_validator("model", "store", mode="before")
    @classmethod
    def _as_text(cls, path: Any) -> Any:
        return str(path) if isinstance(path, Path) else path

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.slots is not None and self.budget is not None:
            raise InputError("slots and budget say the same: give budget=Budget(slots=...) alone")
        own = [name for name in _LOADING if getattr(self, name) not in (None, "")]
        if self.agent is not None and own:
            raise InputError(f"agent= has its own {', '.join(own)}: leave that out")
        self._budget()
        return self

    def open(self, model: str | None = None) -> Agent:
        """The agent, loaded if it is not there yet. Raises what `Agent.load` does."""
        if self.agent is None:
            return self.lease.agent(self._options(model or self.model))
        if model not in (None, self.model, self.agent.model.name):
            raise InputError(f"agent= is of another model than {model!r}: leave one of them out")
        return self.agent

    def close(self) -> None:
        """Close what was loaded, unless others use it too; what was said stays in the store.

        The next call loads it anew.
        """
        self.lease.close()

    def __getstate__(self) -> dict[Any, Any]:
        if self.agent is not None:
            raise InputError(
                "a ChatStill with an agent= cannot be pickled or copied to another process: give "
                "it model= and store= instead, and it loads them there"
            )
        return super().__getstate__()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return super().__deepcopy__({**(memo or {}), id(self.agent): self.agent})

    # -- conventions --------------------------------------------------------------------------

    @property
    def _llm_type(self) -> str:
        return "still-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = ("tenant", "slots", "codec", *_SAMPLING, "stop")
        return {"model": self._name({}), **{name: getattr(self, name) for name in names}}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        kwargs["model"] = self._name(kwargs)
        return super()._get_ls_params(stop=stop or self.stop, **kwargs)

    def _resolve_model_profile(self) -> ModelProfile:
        return ModelProfile(
            text_inputs=True,
            text_outputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            tool_calling=True,
            tool_choice=True,
            structured_output=True,
        )

    @property
    def lc_secrets(self) -> dict[str, str]:
        return {"key": "STILL_AGENT_KEY"}

    @property
    def lc_attributes(self) -> dict[str, Any]:
        return {} if self.budget is None else {"budget": self.budget.model_dump()}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    def get_token_ids(self, text: str) -> list[int]:
        """As the model reads them, without what frames a message."""
        return self.open().model.tokenizer.encode(text)

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """What the messages take when they are read, and the tools with them."""
        model = self.open().model
        form = format_for(model.model.config.model_type)
        told = [(m.role, form.text(m.text, m.tool_calls)) for m in to_still(messages)]
        if tools:
            told.append(("system", form.system(None, tools_of(tools))))
        return sum(len(model.tokenizer.message(role, text)) for role, text in told)

    # -- tools and schemas --------------------------------------------------------------------

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: Choice = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Tell the model of tools, which it may call. What it calls is always well formed.

        tool_choice: "auto" (text or calls), "any", True or "required" (calls), "none", a tool's
            name, or such a choice as OpenAI or Anthropic write it. None is the constructor's.
        parallel_tool_calls: False allows one call in a reply.

        InputError for what is no tool, and for a choice of a tool that is not there.
        """
        declared = [convert_to_openai_tool(tool) for tool in tools]
        names = [tool.name for tool in tools_of(declared)]
        if tool_choice is not None:
            choice = choice_of(tool_choice)
            if choice not in (*names, "auto", "required", "none"):
                raise InputError(f"no tool is called {choice!r}; there are {', '.join(names)}")
            kwargs["tool_choice"] = choice
        if parallel_tool_calls is not None:
            kwargs["parallel_tool_calls"] = parallel_tool_calls
        return self.bind(tools=declared, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        include_raw: bool = False,
        method: str = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """Replies that are values of a schema: a pydantic class, a TypedDict or a JSON schema.

        method: "json_schema", the default: only tokens that keep to the schema are drawn.
            "function_calling": it is the schema of a tool that must be called. "json_mode": as the
            first, and without a schema any JSON object.
        strict: schemas are always kept to.
        include_raw: `{"raw": message, "parsed": value, "parsing_error": error}`.
        """
        if method == "function_calling" and schema is not None:
            return super().with_structured_output(schema, include_raw=include_raw, **kwargs)
        if method not in ("json_schema", "json_mode") or (schema is None and method != "json_mode"):
            raise InputError(
                f'{method!r} is no method for this: give a schema and "json_schema", '
                '"function_calling" or "json_mode"'
            )
        traced = {"kwargs": {"method": method, "strict": strict}, "schema": schema}
        model = self.bind(
            response_format=response_format_of(schema),
            **({} if schema is None else {"ls_structured_output_format": traced}),
            **kwargs,
        )
        return parsed_with_raw(model, schema) if include_raw else model | parser_of(schema)

    # -- replies ------------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        answering = self._answering(messages, stop, kwargs)
        answering.finish()
        return _result(answering, self._name(kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        answering = await asyncio.to_thread(self._answering, messages, stop, kwargs)
        async with aclosing(answering.pieces()) as pieces:  # type: ignore[type-var]
            async for _ in pieces:
                pass
        # In a thread again, for it waits where the next turn of the session has begun already.
        return await asyncio.to_thread(_result, answering, self._name(kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with self._answering(messages, stop, kwargs) as answering:
            for piece in answering:
                chunk = _chunk(piece)
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
        yield _last(answering, self._name(kwargs))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        answering = await asyncio.to_thread(self._answering, messages, stop, kwargs)
        async with aclosing(answering.pieces()) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                chunk = _chunk(piece)
                if run_manager:
                    await run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
        yield await asyncio.to_thread(_last, answering, self._name(kwargs))

    def _answering(
        self, messages: list[BaseMessage], stop: list[str] | None, options: dict[str, Any]
    ) -> Answering:
        if unknown := options.keys() - set(_OPTIONS):
            raise InputError(
                f"a call has no option {', '.join(map(repr, sorted(unknown)))}; there are "
                f"stop, {', '.join(_OPTIONS)}"
            )
        session = options.get("session_id")
        tools = tools_of(options.get("tools") or ())
        choice = choice_of(options.get("tool_choice", self.tool_choice)) if tools else "auto"
        return self.open(options.get("model")).answer(
            to_still(messages),
            session=self.session_of(None, {}) if session is None else session,
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=options.get("parallel_tool_calls") is not False,
            schema=schema_of(options.get("response_format")),
            **self._sampling(stop, options),
        )

    # -- inside -------------------------------------------------------------------------------

    def _sampling(self, stop: list[str] | None, options: dict[str, Any]) -> dict[str, Any]:
        """Options of `Sampling` that were given: those of the call before the object's."""
        found = {name: options.get(name, getattr(self, name)) for name in _SAMPLING}
        found["stop"] = stop or self.stop or None
        return {name: value for name, value in found.items() if value is not None}

    def _budget(self) -> Budget | None:
        return self.budget if self.slots is None else Budget(slots=self.slots)

    def _options(self, model: str) -> Options:
        return Options(
            model,
            None if self.store is None else str(Path(self.store).absolute()),
            self.tenant,
            self._budget(),
            self.compactor,
            self.codec,
            self.device,
            self.dtype,
            self.key,
            self.on_compaction,
        )

    def _name(self, options: dict[str, Any]) -> str:
        own = self.model if self.agent is None else self.agent.model.name
        return options.get("model") or own


def _chunk(piece: str) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=AIMessageChunk(content=piece))


def _result(answering: Answering, model: str) -> ChatResult:
    message = to_message(*_ended(answering), model)
    return ChatResult(generations=[ChatGeneration(message=message)])


def _last(answering: Answering, model: str) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=to_last_chunk(*_ended(answering), model))


def _ended(answering: Answering) -> tuple[Reply, Place]:
    """What was answered, and where; a branch that had to be made is told to the log."""
    reply, place = answering.reply, answering.place
    assert reply is not None and place is not None  # it has ended
    name, turns = place.session.id, place.known
    if place.forked_from is not None:
        _log.warning(
            "the messages do not go on where session %r stands: session %r was forked from it "
            "after the %d turns that they share (%d tokens read again)",
            *(place.forked_from, name, turns, place.read_tokens),
        )
    elif begun_anew(place):
        _log.warning(
            "the messages are no continuation of conversation %r: session %r was begun, and they "
            "were read from the start (another system prompt or other tools? another agent?)",
            *(thread_of(place.head.settings), name),
        )
    return reply, place
