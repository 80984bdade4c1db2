"""A tiny language model on disk and a text for it: the command line is tested on the files that users pass."""

from __future__ import annotations

import random
from pathlib import Path

SPECIAL = ["<unk>", "<s>"]
WORDS = [*SPECIAL, "the", "sea", "king", "of", "<b>bold</b>", "&", '"quoted"', "##", *(f"w{i}" for i in range(54))]


def write_tiny_model(folder: Path, *, head: bool = False, seed: int = 0, longest: int = 64) -> Path:
    """A random two-layer Llama of width 16 with a word tokenizer, in the files that transformers reads."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<s>").save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=longest, **shape)
    (LlamaForCausalLM if head else LlamaModel)(config).save_pretrained(folder)
    return folder


def write_text(path: Path, words: int = 6000) -> Path:
    """Lines of random words, always the same."""
    chosen = random.Random(0).choices(WORDS[len(SPECIAL) :], k=words)
    path.write_text("\n".join(" ".join(chosen[i : i + 12]) for i in range(0, words, 12)))
    return path
