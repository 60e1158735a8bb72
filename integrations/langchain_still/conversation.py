"""Which conversation a call belongs to.

The first of these that there is: LangGraph's `thread_id`; a `session_id` in the call (`bind`), in
`config["configurable"]`, or in the constructor. Without any, the conversation is recognised by what
was said. LangChain does not hand a call's config on to `_generate` and its like; so, on every way
in, what it names goes with the call's options.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.runnables import RunnableConfig, ensure_config


class InConversation(BaseChatModel):
    """A chat model whose calls have the option `session_id`, wherever it was said."""

    session_id: str | None = None

    def session_of(self, config: RunnableConfig | None, options: dict[str, Any]) -> str | None:
        """The conversation's name. Without a config, that of the runnable which is running."""
        told = ensure_config(config).get("configurable", {})
        names = (
            told.get("thread_id"),
            options.get("session_id"),
            told.get("session_id"),
            self.session_id,
        )
        return next((str(name) for name in names if name is not None), None)

    def _named(self, config: RunnableConfig | None, options: dict[str, Any]) -> dict[str, Any]:
        name = self.session_of(config, options)
        return options if name is None else {**options, "session_id": name}

    def invoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        return super().invoke(input, config, **self._named(config, kwargs))

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        return await super().ainvoke(input, config, **self._named(config, kwargs))

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[AIMessageChunk]:
        return super().stream(input, config, **self._named(config, kwargs))

    def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        return super().astream(input, config, **self._named(config, kwargs))

    def stream_events(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Any:
        return super().stream_events(input, config, **self._named(config, kwargs))

    def astream_events(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Any:
        return super().astream_events(input, config, **self._named(config, kwargs))
