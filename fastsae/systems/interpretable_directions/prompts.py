"""Prompts in which one of two people gives something to the other, so that the next word is the other's name.

    When Mary and John came to the museum, John gave a map to   -> Mary

Fifteen texts, each with the receiver named first (ABBA) and second (BABA): 30 frames, as in the published task. The
texts are ours. The same frames are the text of a small model that knows nothing else (`sentences`, `encode`).
Source of the form: Wang et al. 2022 (Interpretability in the Wild); Cunningham et al. 2023.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsae.data.text import TokenCorpus

TEXTS = (
    "This morning, {0} and {1} walked to the {place}. {giver} gave a {thing} to",
    "After lunch, {0} and {1} met at the {place}. {giver} gave a {thing} to",
    "When {0} and {1} came to the {place}, {giver} gave a {thing} to",
    "While {0} and {1} were waiting at the {place}, {giver} gave a {thing} to",
    "On Sunday, {0} and {1} drove to the {place}. Later, {giver} gave a {thing} to",
    "Once {0} and {1} had found the {place}, {giver} gave a {thing} to",
    "In the evening, {0} and {1} were at the {place}, and {giver} gave a {thing} to",
    "As {0} and {1} were leaving the {place}, {giver} gave a {thing} to",
    "Before {0} and {1} went to the {place}, {giver} gave a {thing} to",
    "Yesterday, {0} and {1} sat in the {place}, and {giver} gave a {thing} to",
    "Since {0} and {1} were alone at the {place}, {giver} gave a {thing} to",
    "Last week, {0} and {1} worked at the {place}. There, {giver} gave a {thing} to",
    "During the holidays, {0} and {1} stayed near the {place}. Then {giver} gave a {thing} to",
    "The day that {0} and {1} saw the {place}, {giver} gave a {thing} to",
    "Soon after {0} and {1} left the {place}, {giver} gave a {thing} to",
)
"""{0} and {1}: the two names, one of which is the giver's again."""
PLACES = ("market", "station", "museum", "library", "garden", "beach", "school", "hotel")
THINGS = ("book", "ball", "ring", "letter", "flower", "map", "cup", "coat")
NAMES = tuple(re.findall(
    r"\w+",
    "Aaron Adam Alan Albert Alex Alice Amanda Amy Andrew Angela Ann Anna Anthony Arthur Barbara Ben Betty Bill Bob "
    "Brandon Brian Bruce Carl Carol Catherine Charles Chris Clara Daniel David Diana Donald Dorothy Douglas Edward "
    "Elizabeth Emily Emma Eric Frank Fred George Grace Greg Hannah Harry Helen Henry Howard Ian Jack Jacob James Jane "
    "Jason Jeff Jennifer Jessica Jim Joe John Jonathan Joseph Julia Karen Kate Kevin Larry Laura Lily Linda Lisa Louis "
    "Lucy Margaret Maria Mark Martin Mary Matthew Michael Nancy Oliver Patrick Paul Peter Philip Rachel Richard Robert "
    "Rose Ruth Sam Sarah Simon Steven Susan Thomas Tom Victor Walter",
))  # fmt: skip

FEW = NAMES[::3]
"""The names that the small model knows: of all of them it had learnt to copy none after 1,500 steps."""

Encode = Callable[[str], Sequence[int]]
"""Text to token ids."""

_WORD = re.compile(r"[A-Za-z]+|[.,]")
VOCABULARY = sorted(
    {word for text in TEXTS for word in _WORD.findall(re.sub(r"{\w+}", "", text))} | {*PLACES, *THINGS, *FEW}
)
"""Every word that the small model reads: fewer than 256, so that a model of bytes can."""
_NUMBER = {word: i for i, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Prompts:
    """n prompts of up to T tokens, in the first places of a row; what follows a prompt in its row means nothing.

    base    (n, T) int64: the prompts.
    target  (n, T): the same with another receiver, a third name.
    start   (n,): the only place at which the two differ.
    last    (n,): the place of the last token, which predicts the receiver.
    names   (n, 3): the tokens of receiver, giver and the target's receiver.
    """

    base: Tensor
    target: Tensor
    start: Tensor
    last: Tensor
    names: Tensor

    @property
    def real(self) -> Tensor:
        """(n, T) bool: the places of the prompts' own tokens."""
        return torch.arange(self.base.shape[1]) <= self.last[:, None]


def prompts(
    n: int, encode: Encode, prefix: Sequence[int] = (), known: Sequence[str] = NAMES, seed: int = 0
) -> Prompts:  # fmt: skip
    """n prompts, of all frames in turn; known names that are one token after a blank, places and things at random.

    prefix: tokens before every prompt. Raises ValueError for a tokenizer with fewer than three such names.
    """
    names = [name for name in known if len(encode(f" {name}")) == 1]
    if len(names) < 3:
        raise ValueError(f"{len(names)} of the {len(known)} names are one token each, expected at least 3; see NAMES")
    drawn = random.Random(seed)
    base: list[list[int]] = []
    target: list[list[int]] = []
    three = []
    for i in range(n):
        receiver, giver, other = drawn.sample(names, 3)
        place, thing = drawn.choice(PLACES), drawn.choice(THINGS)
        for found, name in ((base, receiver), (target, other)):
            found.append([*prefix, *encode(_filled(i, name, giver, place, thing))])
        three.append([encode(f" {name}")[0] for name in (receiver, giver, other)])
    lengths = torch.tensor([len(ids) for ids in base])
    rows, others = (_padded(ids, int(lengths.max())) for ids in (base, target))
    differ = rows != others
    if not bool((differ.sum(1) == 1).all()):
        raise ValueError("a prompt and its target differ in more than one token: the tokenizer joins a name to others")
    return Prompts(rows, others, differ.int().argmax(1), lengths - 1, torch.tensor(three))


def encode(text: str) -> list[int]:
    """The numbers of the words of a frame in VOCABULARY. Raises KeyError for others."""
    return [_NUMBER[word] for word in _WORD.findall(text)]


def sentences(tokens: int, seed: int = 0) -> TokenCorpus:
    """Text of at least `tokens` words: prompts that end with the receiver and a full stop, all frames at random."""
    drawn = random.Random(seed)
    ids: list[int] = []
    while len(ids) < tokens:
        receiver, giver = drawn.sample(FEW, 2)
        text = _filled(drawn.randrange(2 * len(TEXTS)), receiver, giver, drawn.choice(PLACES), drawn.choice(THINGS))
        ids += encode(f"{text} {receiver}.")
    return TokenCorpus(np.array(ids, dtype=np.uint8), name="frames", piece_tokens=1024)


def _filled(frame: int, receiver: str, giver: str, place: str, thing: str) -> str:
    """Of two frames in a row one names the receiver first."""
    both = (receiver, giver) if frame % 2 == 0 else (giver, receiver)
    return TEXTS[frame // 2 % len(TEXTS)].format(*both, giver=giver, place=place, thing=thing)


def _padded(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows])
