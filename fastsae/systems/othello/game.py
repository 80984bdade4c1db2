"""Random games of Othello as tokens, a batch at a time; a board is two bitboards, int64, bit 8·row + column.

A position is (own, enemy): the stones of the player to move, and the other's. Games are uniformly random legal moves
from the usual start, and end when the mover has no legal move: nobody passes. A row of tokens is the moves, then one
END, then PAD. Source: the public code RobertHuben/othellogpt_sparse_autoencoders; Li et al. 2023 (arXiv 2210.13382).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SQUARES, END, PAD, VOCABULARY = 64, 64, 65, 66
MOST_MOVES = 60
WINDOW = 64
FIRST, LAST = 4, 56
"""Tokens whose boards are labelled: FIRST to LAST - 1. The first boards are nearly all alike, the last nearly full."""
EMPTY, OWN, ENEMY = 0, 1, 2
CLASSES = ("empty", "own", "enemy")

BLACK_START = 1 << 28 | 1 << 35
WHITE_START = 1 << 27 | 1 << 36
_ALL = (1 << 64) - 1
_LEFT = sum(1 << (8 * row) for row in range(8))


def _signed(mask: int) -> int:
    """A mask of 64 bits as the int64 with these bits."""
    return mask - (1 << 64) if mask >> 63 else mask


def _directions() -> tuple[tuple[int, int], ...]:
    """(shift, mask): a step in each of the eight directions, and the squares that it can arrive at.

    The mask removes what went over an edge: to the right nothing arrives in the left column. It also removes the copies
    of the sign bit that an arithmetic shift to the right brings in.
    """
    steps = []
    for rows in (-1, 0, 1):
        for columns in (-1, 0, 1):
            shift = 8 * rows + columns
            if shift == 0:
                continue
            mask = {-1: _ALL ^ (_LEFT << 7), 0: _ALL, 1: _ALL ^ _LEFT}[columns]
            if shift < 0:
                mask &= _ALL >> -shift
            steps.append((shift, _signed(mask)))
    return tuple(steps)


DIRECTIONS = _directions()


def _step(board: Tensor, shift: int, mask: int) -> Tensor:
    return (board << shift if shift > 0 else board >> -shift) & mask


def legal(own: Tensor, enemy: Tensor) -> Tensor:
    """The squares where the player to move may play: bitboards of the shape of own and enemy, int64."""
    empty = ~(own | enemy)
    found = torch.zeros_like(own)
    for shift, mask in DIRECTIONS:
        line = _step(own, shift, mask) & enemy
        for _ in range(5):  # at most six stones between two of a line of eight
            line = line | (_step(line, shift, mask) & enemy)
        found |= _step(line, shift, mask) & empty
    return found


def play(own: Tensor, enemy: Tensor, move: Tensor) -> tuple[Tensor, Tensor]:
    """The position after a legal move, a bitboard with one bit, as the next mover sees it; a move of 0 only swaps."""
    flipped = torch.zeros_like(own)
    for shift, mask in DIRECTIONS:
        line = _step(move, shift, mask) & enemy
        for _ in range(5):
            line = line | (_step(line, shift, mask) & enemy)
        closed = (_step(line, shift, mask) & own) != 0
        flipped |= torch.where(closed, line, 0)
    return enemy & ~flipped, own | move | flipped


def bits(boards: Tensor) -> Tensor:
    """bool (*batch, 64): the squares of bitboards (*batch)."""
    return (boards[..., None] >> torch.arange(SQUARES, device=boards.device)) & 1 == 1


def start(n: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The start of n games, black to move: own and enemy, int64 (n,)."""
    return tuple(  # type: ignore[return-value]
        torch.full((n,), _signed(stones), dtype=torch.int64, device=device) for stones in (BLACK_START, WHITE_START)
    )


def random_games(n: int, generator: torch.Generator) -> Tensor:
    """n games as tokens, uint8 (n, WINDOW + 1): one column more than a model reads, for its targets."""
    device = generator.device
    own, enemy = start(n, device)
    tokens = torch.full((n, WINDOW + 1), PAD, dtype=torch.uint8, device=device)
    over = torch.zeros(n, dtype=torch.bool, device=device)
    for column in range(MOST_MOVES + 1):
        moves = bits(legal(own, enemy))
        none = ~moves.any(-1)
        tokens[:, column] = torch.where(none & ~over, END, PAD).to(torch.uint8)
        over |= none
        if bool(over.all()):
            break
        # The largest of independent uniform numbers is at each legal square with equal probability.
        drawn = torch.rand(n, SQUARES, generator=generator, device=device)
        square = torch.where(moves, drawn, -1.0).argmax(-1)
        tokens[:, column] = torch.where(over, tokens[:, column], square.to(torch.uint8))
        after = play(own, enemy, torch.where(over, 0, torch.ones_like(square) << square))
        own, enemy = torch.where(over, own, after[0]), torch.where(over, enemy, after[1])
    return tokens


def stream(n: int, seed: int, batch: int) -> Iterator[Tensor]:
    """n games in batches of `batch`, and a last one with the rest. They are played 4096 or so at a time."""
    generator = torch.Generator().manual_seed(seed)
    at_once = batch * max(1, 4096 // batch)
    for first in range(0, n, at_once):
        yield from random_games(min(at_once, n - first), generator).split(batch)


def replay(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(own, enemy), int64 (n, columns): the position after each token, as the next mover sees it.

    tokens: (n, columns) of legal games. After END and PAD the last position stays.
    """
    own, enemy = start(len(tokens), tokens.device)
    after: list[tuple[Tensor, Tensor]] = []
    for square in tokens.long().unbind(1):
        moved = square < SQUARES
        played = play(own, enemy, torch.where(moved, torch.ones_like(square) << square.clamp(max=SQUARES - 1), 0))
        own, enemy = torch.where(moved, played[0], own), torch.where(moved, played[1], enemy)
        after.append((own, enemy))
    owns, enemies = zip(*after, strict=True)
    return torch.stack(owns, 1), torch.stack(enemies, 1)


def labels(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What stands on every square after the tokens FIRST to LAST - 1, for the next mover, and where games still run.

    tokens (n, columns) -> EMPTY, OWN or ENEMY: uint8 (n, 52, 64); running: bool (n, 52), false after the
    last move of a game.
    """
    tokens = tokens[:, :LAST]
    own, enemy = (bits(boards[:, FIRST:]) for boards in replay(tokens))
    return own.to(torch.uint8) * OWN + enemy.to(torch.uint8) * ENEMY, tokens[:, FIRST:] < SQUARES
