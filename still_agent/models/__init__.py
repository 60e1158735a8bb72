"""The frozen base model: attention with a bias per slot, the live cache, tokenizers, loading."""

from still_agent.models.cache import LiveCache
from still_agent.models.frozen import FrozenModel
from still_agent.models.loading import load_model
from still_agent.models.tokenizers import HubTokenizer, TextStream, TiktokenTokenizer, Tokenizer

__all__ = [
    "FrozenModel",
    "HubTokenizer",
    "LiveCache",
    "TextStream",
    "TiktokenTokenizer",
    "Tokenizer",
    "load_model",
]
