"""Folders that load, folders that do not, and who a model is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from still_agent.models import FrozenModel, load_model
from still_agent.models.frozen import CONFIG_FIELDS
from still_memory.errors import IdentityError, InputError
from tests.conftest import TOKENIZER_FILES, tiny_config
from tests.models.hub import build_hub

Edit = Callable[[Path], Any]


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_config(**changes: object) -> Edit:
    return lambda folder: edit_json(folder / "config.json", **changes)


def edit_tokenizer(**changes: object) -> Edit:
    return lambda folder: edit_json(folder / "tiktoken_config.json", **changes)


def nudge_one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def drop_one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def swap_two_ranks(folder: Path) -> None:
    path = folder / "tokenizer.tiktoken"
    lines = path.read_text().splitlines()
    (a, i), (b, j) = lines[-2].split(), lines[-1].split()
    path.write_text("\n".join([*lines[:-2], f"{b} {i}", f"{a} {j}"]) + "\n")


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def test_a_folder_loads_with_its_tiktoken_tokenizer(tiny: FrozenModel) -> None:
    assert (tiny.layers, tiny.kv_heads, tiny.head_dim) == (2, 2, 16)
    assert (tiny.window, tiny.vocab_size, tiny.dtype) == (512, 4096, torch.float32)
    assert tiny.tokenizer.decode(tiny.tokenizer.encode("Ana lives in Porto.")) == (
        "Ana lives in Porto."
    )


def test_a_folder_with_a_hub_tokenizer_loads_and_ends_as_its_config_says(copy: Path) -> None:
    for name in TOKENIZER_FILES:
        (copy / name).unlink()
    build_hub(copy)
    edit_json(copy / "generation_config.json", eos_token_id=[3, 9])
    model = load_model(copy, device="cpu")
    assert {3, 9} < model.tokenizer.eos_ids
    logits = model.forward(model.tokenizer.message("user", "Hi."), model.new_cache(64), 0)
    assert logits.isfinite().all()


def test_the_same_folder_is_the_same_model_under_any_name(tiny: FrozenModel, copy: Path) -> None:
    again = load_model(str(copy), device="cpu").identity
    assert again.differences(tiny.identity) == []
    assert again.address == tiny.identity.address
    assert again.name == "copy"


@pytest.mark.parametrize(
    ("field", "edit"),
    [
        ("weights", nudge_one_weight),
        ("config", edit_config(rope_parameters={"rope_type": "default", "rope_theta": 2e4})),
        ("config", edit_config(rms_norm_eps=1e-5)),
        ("config", edit_config(max_position_embeddings=1024)),
        ("config", edit_config(hidden_act="gelu")),
        ("tokenizer", swap_two_ranks),
        ("tokenizer", edit_tokenizer(pattern=r"\p{L}+|\p{N}|\s|.")),
        ("tokenizer", edit_tokenizer(eos_tokens=["<|end|>", "<|pad|>"])),
        ("template", edit_tokenizer(chat_template={"prefix": "<|{role}|>\n", "suffix": "<|end|>"})),
        ("template", edit_tokenizer(bos_token=None)),
    ],
)
def test_every_change_shows_in_the_identity(
    tiny: FrozenModel, copy: Path, field: str, edit: Edit
) -> None:
    edit(copy)
    other = load_model(copy, device="cpu", dtype="float32").identity
    assert other.differences(tiny.identity) == [field]
    with pytest.raises(IdentityError, match=field):
        other.require(tiny.identity, "a session", "Load the other model.")


def test_another_dtype_is_another_model(tiny: FrozenModel, tiny_folder: Path) -> None:
    other = load_model(tiny_folder, device="cpu", dtype="bfloat16").identity
    assert "dtype" in other.differences(tiny.identity)


def test_a_cpu_computes_in_fp32_whatever_the_file_holds(copy: Path) -> None:
    weights = {k: v.bfloat16() for k, v in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    edit_json(copy / "config.json", dtype="bfloat16")
    assert load_model(copy, device="cpu").dtype == torch.float32


def test_weights_that_are_not_whole_are_refused(copy: Path) -> None:
    drop_one_weight(copy)
    with pytest.raises(InputError, match=r"up_proj.* not whole|not whole.*up_proj"):
        load_model(copy, device="cpu")


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    edit_json(copy / "config.json", intermediate_size=96)
    with pytest.raises(InputError):
        load_model(copy, device="cpu")


def test_weights_cut_short_are_refused(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(copy, device="cpu")


def test_pickled_weights_are_never_read(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_model(copy, device="cpu")


def test_another_architecture_is_named_and_refused(copy: Path) -> None:
    edit_json(copy / "config.json", architectures=["LlamaForCausalLM"], model_type="llama")
    with pytest.raises(InputError, match="LlamaForCausalLM"):
        load_model(copy, device="cpu")


def test_a_tokenizer_larger_than_the_model_is_refused(copy: Path) -> None:
    special = json.loads((copy / "tiktoken_config.json").read_text())["special_tokens"]
    edit_json(copy / "tiktoken_config.json", special_tokens={**special, "<|new|>": 4096})
    with pytest.raises(InputError, match="trained with"):
        load_model(copy, device="cpu")


@pytest.mark.parametrize(
    "edit",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "tokenizer.tiktoken").unlink(),
        lambda folder: (folder / "tokenizer.tiktoken").write_bytes(b"\xff\xfe not base64\n"),
        lambda folder: (folder / "tiktoken_config.json").write_bytes(b"\xff\xfe"),
        lambda folder: (folder / "tiktoken_config.json").write_text("{}"),
        lambda folder: (folder / "tiktoken_config.json").unlink(),
    ],
)
def test_a_broken_folder_is_a_typed_error(copy: Path, edit: Edit) -> None:
    edit(copy)
    with pytest.raises(InputError):
        load_model(copy, device="cpu")


def test_a_folder_that_is_not_there_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(InputError, match="no folder"):
        load_model("./absent")


def test_an_unknown_dtype_is_refused(tiny_folder: Path) -> None:
    for dtype in ("int8", "float99", torch.float64):
        with pytest.raises(InputError, match="bfloat16"):
            load_model(tiny_folder, dtype=dtype)


def test_a_device_that_is_not_there_is_refused(tiny_folder: Path) -> None:
    for device in ("abacus", "cuda:99"):
        with pytest.raises(InputError, match="try cpu"):
            load_model(tiny_folder, device=device)


def test_the_config_fields_of_the_identity_exist() -> None:
    config = tiny_config()
    assert [name for name in CONFIG_FIELDS if not hasattr(config, name)] == []
