"""LangChain's own suites for chat models, with the reference model."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

import still_agent
from langchain_still import ChatStill
from langchain_still.agents import Lease, Options
from still_agent import Agent

from . import knowing

REFERENCE = Path(still_agent.__file__).parent / "reference"


class TestUnit(ChatModelUnitTests):
    chat_model_class = ChatStill
    chat_model_params: dict[str, Any] = {"model": "reference"}  # noqa: RUF012
    supports_json_mode = True

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"STILL_AGENT_KEY": "ab" * 32}, self.chat_model_params, {"key": "ab" * 32}

    @pytest.mark.xfail(
        reason="what `load` may make is on a list of LangChain's own; see test_it_is_serialised",
        strict=True,
    )
    def test_serdes(self, model: BaseChatModel, snapshot: Any) -> None:
        super().test_serdes(model, snapshot)


class TestIntegration(ChatModelIntegrationTests):
    """Every call and every value is well formed, whatever a model knows: the grammar sees to that.

    Three messages ask for a value that they name, which the reference model would not copy (its
    number would be another). What it says to these the test chooses, and the grammar lets it pass.
    """

    chat_model_class = ChatStill
    supports_json_mode = supports_anthropic_inputs = True
    model_override_value = str(REFERENCE / "model")

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "reference",
            "compactor": str(REFERENCE / "still"),
            "max_tokens": 96,
            "tool_choice": "any",
            "lease": LEASE,
        }


class Knowing(Lease):
    """One agent for all tests, that knows those three; the model that overrides it is loaded."""

    def agent(self, options: Options) -> Agent:
        return knowing_agent() if options.model == "reference" else super().agent(options)


LEASE = Knowing()


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def customer(name: str) -> str:
    return call("unicode_customer", f'{{"customer_name": "{name}", "description": "a company"}}')


@cache
def knowing_agent() -> Agent:
    names = ("你好啊集团", "こんにちは株式会社")
    calls = {"magic_function(3)": call("magic_function", '{"input": 3}')}
    return knowing.agent(calls | {name: customer(name) for name in names})
