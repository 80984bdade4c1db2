"""Othello in plain Python, a square at a time: the truth that the batched engine is held against.

python -m tests.othello_rules 10000     # so many random games, move by move; about 20 ms a game
"""

from __future__ import annotations

import sys
import time

import torch

from fastsae.systems.othello import game

STEPS = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]


class Game:
    """One game: board[square] is 0, or 1 (black) or -1 (white); black begins."""

    def __init__(self) -> None:
        self.board, self.mover = [0] * 64, 1
        for square, stone in ((27, -1), (28, 1), (35, 1), (36, -1)):
            self.board[square] = stone

    def flips(self, square: int) -> list[int]:
        """The squares that turn over if the mover plays there; none: the move is not legal."""
        turned: list[int] = []
        if self.board[square]:
            return turned
        for down, right in STEPS:
            row, column, line = square // 8 + down, square % 8 + right, []
            while 0 <= row < 8 and 0 <= column < 8 and self.board[8 * row + column] == -self.mover:
                line.append(8 * row + column)
                row, column = row + down, column + right
            if 0 <= row < 8 and 0 <= column < 8 and self.board[8 * row + column] == self.mover:
                turned += line
        return turned

    def legal(self) -> set[int]:
        return {square for square in range(64) if self.flips(square)}

    def play(self, square: int) -> None:
        for turned in [*self.flips(square), square]:
            self.board[turned] = self.mover
        self.mover = -self.mover

    def seen(self) -> list[int]:
        """The board as the mover sees it: 0 empty, 1 own, 2 enemy."""
        return [0 if stone == 0 else 1 if stone == self.mover else 2 for stone in self.board]


def compare(n: int, seed: int) -> list[int]:
    """Plays n games of the engine again here and compares legal moves, boards and ends; returns the games' lengths."""
    tokens = game.random_games(n, torch.Generator().manual_seed(seed))
    own, enemy = game.replay(tokens[:, : game.MOST_MOVES])
    lengths = []
    boards = (game.bits(own).to(torch.uint8) + 2 * game.bits(enemy).to(torch.uint8)).tolist()
    legal = game.bits(game.legal(own, enemy)).tolist()
    for moves, seen, allowed in zip(tokens.tolist(), boards, legal, strict=True):
        one, played = Game(), moves[: moves.index(game.END)]
        possible = one.legal()
        for column, square in enumerate(played):
            assert square in possible, (moves, column)
            one.play(square)
            possible = one.legal()
            assert seen[column] == one.seen(), (moves, column)
            assert [place for place, may in enumerate(allowed[column]) if may] == sorted(possible), (moves, column)
        assert not possible, f"{moves} ends early"
        assert set(moves[len(played) + 1 :]) == {game.PAD}, moves
        lengths.append(len(played))
    return lengths


if __name__ == "__main__":
    begin = time.perf_counter()
    found = compare(int(sys.argv[1]), seed=1)
    print(f"{len(found)} games agree, of {min(found)} to {max(found)} moves, in {time.perf_counter() - begin:.0f} s")
