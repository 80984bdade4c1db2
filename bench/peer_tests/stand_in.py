"""A model and a tokenizer in the place of those that tests take from the hub: random weights, a token for each byte."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

END_OF_TEXT = "<|endoftext|>"


def tokenizer() -> Any:
    """A byte-level tokenizer. It is read from files, since TransformerLens reads it from there once more."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: place for place, letter in enumerate([*letters, END_OF_TEXT])}
    made = Tokenizer(models.BPE(vocab=words, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    folder = tempfile.mkdtemp()
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def no_hub() -> None:
    """Makes every HookedTransformer.from_pretrained give a model of the size of tiny-stories-1M."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    def made(cls: Any, model_name: str, *_: Any, device: Any = "cpu", **__: Any) -> Any:
        torch.manual_seed(0)
        config = HookedTransformerConfig(
            model_name=model_name, n_layers=8, d_model=64, n_ctx=2048, d_head=4, n_heads=16, d_mlp=256, d_vocab=50257,
            act_fn="gelu_new", normalization_type="LNPre", device=str(device), seed=0,
        )  # fmt: skip
        return cls(config, tokenizer=tokenizer())

    for name in ("from_pretrained", "from_pretrained_no_processing"):
        setattr(HookedTransformer, name, classmethod(made))
