"""Activations to train on: a tensor, a folder of shards, a live language model, and the harvest that fills a folder."""

from __future__ import annotations

from .contexts import Context
from .files import ShardError
from .harvest import harvest
from .live import LiveSource
from .manifest import Manifest
from .models import LanguageModel, load_model
from .shards import ShardSource
from .source import ActivationSource
from .stream import ActivationStream, StreamConfig
from .tensor import TensorSource
from .text import Corpus, TextCorpus, TokenCorpus, load_text
from .writer import ShardWriter, save_rows

__all__ = [
    "ActivationSource",
    "ActivationStream",
    "Context",
    "Corpus",
    "LanguageModel",
    "LiveSource",
    "Manifest",
    "ShardError",
    "ShardSource",
    "ShardWriter",
    "StreamConfig",
    "TensorSource",
    "TextCorpus",
    "TokenCorpus",
    "harvest",
    "load_model",
    "load_text",
    "save_rows",
]
