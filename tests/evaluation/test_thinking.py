"""A model that reasons before it replies is scored by its reply: reasoning is no answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
from typer.testing import CliRunner

from still_agent.agent import Agent
from still_agent.budget import Budget
from still_agent.cli.app import app
from still_agent.ephemeral import EphemeralStore
from still_agent.evaluation.bench import Bench, Context, Item
from still_agent.evaluation.dialogues import Dialogue, Line, Question, render
from still_agent.evaluation.exam import Exam, reply
from still_agent.evaluation.grid import Grid, measure
from still_agent.evaluation.rows import header
from still_agent.models import FrozenModel, load_model
from still_agent.sampling import Sampling
from still_memory.compactors import StreamingCompactor
from still_memory.errors import InputError
from tests.agent.scripted import Scripted
from tests.evaluation.test_grid import PROSE
from tests.models.hub import CHATML, HYBRID, THINKING, build_model

QUESTION = "Where does my sister live?"
OPENED = "<|im_start|>assistant\n"
DIRECT = {  # what stands before a reply without reasoning
    "plain": OPENED,
    "hybrid": f"{OPENED}<think>\n\n</think>\n\n",
    "thinking": f"{OPENED}<think>\n</think>",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    templates = {"plain": CHATML, "hybrid": HYBRID, "thinking": THINKING}
    return {n: build_model(tmp_path_factory.mktemp(n), t) for n, t in templates.items()}


def stock_reply(folder: Path, prompt: str, tokens: int) -> str:
    """transformers' own greedy reply to `prompt`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = Qwen3ForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    out = model.generate(
        ids, max_new_tokens=tokens, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    said: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return said


@pytest.mark.parametrize("name", DIRECT)
def test_an_exam_is_answered_as_the_stock_model_answers_without_reasoning(
    name: str, folders: dict[str, Path]
) -> None:
    model = load_model(folders[name], device="cpu")
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n{DIRECT[name]}"
    expected = stock_reply(folders[name], prompt, 12)
    assert expected.strip()
    talk = Dialogue([Line("user", "Ana lives in Porto.")], [Question(QUESTION, "", ("",))])
    made = Context(Bench(model), Item({}, lambda: talk, lambda *_: {}, longest=12))
    assert made.ask(made.remembered("none", 0, 1), talk.exam[0]) == expected


@pytest.mark.parametrize("thinking", [True, False])
def test_the_templates_own_switch_is_used(thinking: bool, folders: dict[str, Path]) -> None:
    tokenizer = load_model(folders["hybrid"], device="cpu").tokenizer
    stock = PreTrainedTokenizerFast.from_pretrained(folders["hybrid"])
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    ids = stock.apply_chat_template(
        said, add_generation_prompt=True, enable_thinking=thinking, return_dict=False
    )
    ours = [tokenizer.message(line["role"], line["content"]) for line in said]
    assert [*ours[0], *ours[1], *tokenizer.reply_opening(thinking=thinking)] == ids


def test_what_is_learnt_to_be_said_is_the_answer_alone(folders: dict[str, Path]) -> None:
    for name in DIRECT:
        tokenizer = load_model(folders[name], device="cpu").tokenizer
        ids, said = render(tokenizer, [Line("assistant", "Porto", answer=True)])
        learnt = [token for token, mine in zip(ids, said, strict=True) if mine]
        assert learnt == [*tokenizer.encode("Porto"), *tokenizer.frames["assistant"].closing]


def scripted(tiny: FrozenModel, thoughts: int, said: str) -> tuple[Scripted, list[int]]:
    """A model that reasons for so many tokens, then says something at once, and its thoughts."""
    tokenizer = tiny.tokenizer
    assert tokenizer.think is not None
    opens, closes = tokenizer.think
    thought = tokenizer.encode("I wonder. " * thoughts)[:thoughts]
    (end, *_) = tokenizer.eos_ids
    return Scripted(tiny, [[opens, *thought, closes, *tokenizer.encode(said), end]]), thought


@pytest.mark.parametrize("granted", [40, 60])
def test_reasoning_that_is_granted_takes_nothing_from_the_reply(
    granted: int, tiny: FrozenModel
) -> None:
    model, _ = scripted(tiny, 40, "Porto.")
    few = Sampling(max_tokens=len(tiny.tokenizer.encode("Porto.")) + 1)
    assert reply(model, None, QUESTION, few, granted) == "Porto."


@pytest.mark.parametrize("granted", [0, 10])
def test_reasoning_ends_where_no_more_is_granted(granted: int, tiny: FrozenModel) -> None:
    model, thought = scripted(tiny, 40, "Porto.")
    rest = tiny.tokenizer.decode(thought[granted + 1 :][:8])  # one more was cut short
    assert reply(model, None, QUESTION, Sampling(max_tokens=8), granted) == rest


def test_a_reply_that_reasons_again_and_again_ends(tiny: FrozenModel) -> None:
    assert tiny.tokenizer.think is not None
    opens, closes = tiny.tokenizer.think
    model = Scripted(tiny, [[opens, closes] * 99])
    assert reply(model, None, QUESTION, Sampling(max_tokens=8), 0) == ""


def test_an_exam_of_a_session_goes_without_reasoning(folders: dict[str, Path]) -> None:
    model = load_model(folders["thinking"], device="cpu")
    with Agent(model, StreamingCompactor(), EphemeralStore(), budget=Budget(slots=128)) as agent:
        agent.session("alice").read("Ana lives in Porto.")
        assert Exam(agent, "alice").ask(QUESTION, max_tokens=12)


def test_reasoning_that_leaves_a_context_no_room_is_refused(
    tiny: FrozenModel, tmp_path: Path
) -> None:
    grid = Grid(tasks=("bindings",), methods=("full",), lengths=(160,))
    with pytest.raises(InputError, match="ask for 20 or fewer, or grant less reasoning"):
        measure(Bench(tiny, reasoning=300), grid, PROSE, tmp_path / "rows", lambda *_: None)


def test_the_command_says_how_much_reasoning_it_grants(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    command = ["eval", "ruler", "--model", str(folders["thinking"]), "--tasks", "bindings",
               "--methods", "none", "--samples", "1", "--seeds", "0", "--lengths", "120",
               "--out", str(tmp_path)]  # fmt: skip
    for granted in ("3", "3"):
        done = CliRunner().invoke(app, [*command, "--reasoning", granted])
        assert done.exit_code == 0, done.output
    assert header(tmp_path / "rows.jsonl")["reasoning"] == 3
    with pytest.raises(InputError, match="another reasoning"):
        CliRunner().invoke(app, command, catch_exceptions=False)
