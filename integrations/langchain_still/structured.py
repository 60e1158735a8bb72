"""Replies that are values of a schema: how they are asked for, and how they are read.

They are asked for in OpenAI's form, `response_format`, which programs and LangChain's agents bind
to a model by themselves as well.
"""

from __future__ import annotations

from typing import Any

from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.runnables import Runnable, RunnableLambda, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel

from still_memory.errors import InputError


def schema_of(response_format: Any) -> dict[str, Any] | None:
    """The JSON schema that a `response_format` asks for; None: any text will do."""
    match response_format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return schema
        case type():
            return _json_schema(response_format)
    raise InputError(
        f"{str(response_format)[:200]!r} is no response_format: give "
        '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}, or '
        '{"type": "json_object"} for any'
    )


def response_format_of(schema: Any) -> dict[str, Any]:
    """What asks for values of a pydantic class, a TypedDict or a JSON schema; None: any object."""
    if schema is None:
        return {"type": "json_object"}
    found = _json_schema(schema)
    name = found.get("title", "reply")
    return {"type": "json_schema", "json_schema": {"name": name, "schema": found}}


def _json_schema(schema: Any) -> dict[str, Any]:
    """As it is meant. LangChain's own conversion is for tools: of a JSON schema it keeps objects
    alone, and of a class that refers to itself not what it refers to."""
    if isinstance(schema, dict) and not _declares(schema):
        return schema
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return schema.model_json_schema()
    return convert_to_json_schema(schema)


def _declares(schema: dict[str, Any]) -> bool:
    """Whether this declares a tool, in one of the ways that LangChain knows."""
    named = isinstance(schema.get("name"), str)
    return named or "toolSpec" in schema or schema.get("type") == "function"


def parser_of(schema: Any) -> Runnable[Any, Any]:
    """From a reply to an object of the pydantic class, or to a dict; of a stream, as it grows."""
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return PydanticOutputParser(pydantic_object=schema)
    return JsonOutputParser()


def parsed_with_raw(model: Runnable[Any, Any], schema: Any) -> Runnable[Any, Any]:
    """`{"raw": message, "parsed": value, "parsing_error": error}`, as LangChain has it."""
    read = RunnablePassthrough.assign(
        parsed=RunnableLambda(lambda found: found["raw"]) | parser_of(schema),
        parsing_error=lambda _: None,
    )
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=model) | read.with_fallbacks([failed], exception_key="parsing_error")
