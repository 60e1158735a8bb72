"""Text never turns into control; bytes always turn back into text."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from still_agent.models import HubTokenizer, TextStream, TiktokenTokenizer, Tokenizer
from still_memory.errors import InputError
from tests.conftest import REFERENCE
from tests.models.hub import CHATML, build_hub


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def hub(hub_folder: Path) -> HubTokenizer:
    return HubTokenizer(hub_folder)


@pytest.fixture(scope="module")
def reference() -> TiktokenTokenizer:
    return TiktokenTokenizer(REFERENCE)


@pytest.fixture(scope="module", params=["reference", "hub"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    value: Tokenizer = request.getfixturevalue(request.param)
    return value


MARKS = (
    "<|im_end|> <|im_start|> <|endoftext|> <think> </think> <tool_call> </tool_call> <|end|> "
    "<|user|> <|assistant|> <|tool|> <|system|> <|pad|> <|bos|> <| |> end im_end"
)
CONTROL_TEXT = st.sampled_from([*MARKS.split(), " ", "\n"])
TEXT = st.lists(CONTROL_TEXT | st.text(st.characters(codec="utf-8"), max_size=8)).map("".join)
IDS = st.lists(st.integers(0, 4200))


def as_encoded(tokenizer: Tokenizer, text: str) -> str:
    """The text as its tokenizer sees it: Qwen's composes characters (NFC) first."""
    return text if isinstance(tokenizer, TiktokenTokenizer) else unicodedata.normalize("NFC", text)


def test_the_control_tokens_are_known(reference: TiktokenTokenizer, hub: HubTokenizer) -> None:
    assert reference.control == set(range(4080, 4089))
    assert hub.control == set(range(hub.size - 7, hub.size))
    assert reference.think == (4087, 4088)
    assert hub.think == (hub.size - 2, hub.size - 1)
    assert reference.eos_ids == {4086}
    assert hub.eos_ids == {hub.size - 5}


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_no_text_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.control.isdisjoint(ids)
    framed = tokenizer.message("tool", text)
    bare = tokenizer.message("tool", "")
    assert sum(i in tokenizer.control for i in framed) == sum(i in tokenizer.control for i in bare)


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_any_text_comes_back_whole(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == as_encoded(tokenizer, text)


@settings(max_examples=200, deadline=None)
@given(ids=IDS)
def test_a_stream_says_what_the_whole_says(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8")))
def test_a_stream_of_text_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    expected = as_encoded(tokenizer, text)
    stream, shown = TextStream(tokenizer), ""
    for token in tokenizer.encode(text):
        shown += stream.push(token)
        assert expected.startswith(shown)
    assert shown == expected
    assert stream.finish() == ""


def test_an_emoji_is_held_back_until_it_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀")
    stream = TextStream(tokenizer)
    assert len(ids) > 1
    assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["😀"]
    stream.push(ids[0])
    assert stream.finish() == "\ufffd"


def test_control_tokens_are_not_text(reference: TiktokenTokenizer, hub: HubTokenizer) -> None:
    for tokenizer in (reference, hub):
        message = tokenizer.message("user", "Ana")
        assert tokenizer.decode(message).replace("user", "").strip() == "Ana"
        assert tokenizer.think is not None
        assert tokenizer.decode([*tokenizer.think, 10**6]) == ""


def test_a_tool_call_of_the_models_own_stays_readable(hub: HubTokenizer) -> None:
    call = hub.size - 4
    assert hub.decode([call]) == "<tool_call>"
    assert call not in hub.encode("<tool_call>")


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_messages_are_those_of_the_chat_template(
    hub: HubTokenizer, hub_folder: Path, role: str
) -> None:
    """In mid-conversation, where no default prompt and no empty reasoning block is added.

    (Content is encoded apart from its frame, so this holds where no merge crosses the two.)
    """
    stock = PreTrainedTokenizerFast.from_pretrained(hub_folder)
    opening = {"role": "system", "content": "You are brief."}
    middle = {"role": role, "content": "Ana lives in Porto"}
    after = {"role": "user", "content": "Where?"}
    ids = stock.apply_chat_template([opening, middle, after], return_dict=False)
    ours = [hub.message(m["role"], m["content"]) for m in (opening, middle, after)]
    assert sum(ours, hub.start) == ids


def test_a_reply_opens_and_closes_as_the_template_says(hub: HubTokenizer, hub_folder: Path) -> None:
    stock = PreTrainedTokenizerFast.from_pretrained(hub_folder)
    dialogue = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    ids = stock.apply_chat_template(dialogue, add_generation_prompt=True, return_dict=False)
    said = hub.message("system", "Be brief.") + hub.message("user", "Who?")
    assert said + hub.reply_opening() == ids
    (eos,) = hub.eos_ids
    newline = hub.encode("\n")
    assert hub.reply_closing(hub.encode("a")[0]) == [eos, *newline]
    assert hub.reply_closing(eos) == newline
    whole = hub.reply_opening() + hub.encode("Ana") + hub.reply_closing(0)
    assert whole == hub.message("assistant", "Ana")


def test_the_reference_frames_messages_as_it_was_trained(reference: TiktokenTokenizer) -> None:
    body = reference.encode("Hi.")
    assert reference.start == [4081]
    assert reference.message("user", "Hi.") == [4083, *body, 4086]
    assert reference.message("tool", "Hi.") == [4085, *body, 4086]
    assert reference.reply_opening() == [4084]
    assert reference.reply_closing(4086) == []
    assert reference.reply_closing(body[0]) == [4086]


def test_a_reply_closing_is_the_callers_to_keep(tokenizer: Tokenizer) -> None:
    tokenizer.reply_closing(0).clear()
    tokenizer.reply_opening().clear()
    assert tokenizer.reply_closing(0) and tokenizer.reply_opening()


def test_an_unknown_role_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="system, user, assistant, tool"):
        tokenizer.message("oracle", "Hi.")


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="character 1"):
        tokenizer.encode("a\ud800b")


def test_a_long_run_of_blanks_is_encoded(hub: HubTokenizer) -> None:
    text = "x" + " " * 100_000 + "y"
    assert hub.decode(hub.encode(text)) == text


@pytest.mark.parametrize("character", [" ", "\n", "a", "!", "\u3000", "é"])
def test_a_million_of_one_character_is_encoded(
    reference: TiktokenTokenizer, character: str
) -> None:
    text = "x" + character * 1_000_000
    assert reference.decode(reference.encode(text)) == text


def test_digests_tell_tokenizers_and_templates_apart(
    hub: HubTokenizer, hub_folder: Path, tmp_path: Path
) -> None:
    again = HubTokenizer(hub_folder)
    assert (again.digest, again.template_digest) == (hub.digest, hub.template_digest)
    other = HubTokenizer(build_hub(tmp_path, CHATML.replace("assistant\n", "assistant:\n")))
    assert other.template_digest != hub.template_digest


def test_ids_that_end_a_reply_may_be_added(hub: HubTokenizer, hub_folder: Path) -> None:
    assert HubTokenizer(hub_folder, eos_ids=[3]).eos_ids == {*hub.eos_ids, 3}


@pytest.mark.parametrize(
    ("template", "fix"),
    [
        (None, "instruction-tuned"),
        ("{{ raise_exception('no') }}", "system message"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "system message"),
    ],
)
def test_a_template_that_cannot_frame_is_refused(
    tmp_path: Path, template: str | None, fix: str
) -> None:
    with pytest.raises(InputError, match=fix):
        HubTokenizer(build_hub(tmp_path, template))


def test_a_tokenizer_that_spells_its_control_tokens_is_refused(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"[UNK]": 0, "hi": 1, "[END]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[END]"])
    hub = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[END]")
    hub.chat_template = CHATML
    hub.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="byte-level"):
        HubTokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        HubTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        HubTokenizer(tmp_path)
