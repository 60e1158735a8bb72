"""A tiny random Qwen3 with the reference tokenizer, built once a test session."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

from still_agent.models import FrozenModel, load_model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

REFERENCE = Path(__file__).parent.parent / "still_agent" / "reference" / "model"
TOKENIZER_FILES = ("tokenizer.tiktoken", "tiktoken_config.json")


def tiny_config(**changes: object) -> Qwen3Config:
    """Two layers, four heads on two KV heads of 16; wide weights, so that logits differ."""
    settings: dict[str, object] = {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    return Qwen3Config(**{**settings, **changes})


def tiny_model(seed: int = 0, **changes: object) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(tiny_config(**changes)).eval()


@pytest.fixture(scope="session", autouse=True)
def no_notes_in_the_users_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as `load_model` reads it: weights, config, tiktoken files."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(REFERENCE / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> FrozenModel:
    return load_model(tiny_folder, device="cpu", dtype="float32")
