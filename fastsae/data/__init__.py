"""Activations to train on: a tensor, a folder of shards, a live language model, and the harvest that fills a folder."""

from __future__ import annotations

from fastsae.data.contexts import Context
from fastsae.data.files import ShardError
from fastsae.data.filters import Ordinary
from fastsae.data.harvest import harvest
from fastsae.data.live import LiveSource
from fastsae.data.manifest import Manifest
from fastsae.data.models import LanguageModel, load_model
from fastsae.data.shards import ShardSource
from fastsae.data.shared import SharedSource
from fastsae.data.source import ActivationSource, TargetSource
from fastsae.data.stream import ActivationStream, StreamConfig
from fastsae.data.tensor import TensorSource
from fastsae.data.text import Corpus, TextCorpus, TokenCorpus, load_text
from fastsae.data.writer import ShardWriter, save_rows

__all__ = [
    "ActivationSource", "ActivationStream", "Context", "Corpus", "LanguageModel", "LiveSource", "Manifest",
    "Ordinary", "ShardError", "ShardSource", "ShardWriter", "SharedSource", "StreamConfig", "TargetSource",
    "TensorSource", "TextCorpus", "TokenCorpus", "harvest", "load_model", "load_text", "save_rows",
]  # fmt: skip
