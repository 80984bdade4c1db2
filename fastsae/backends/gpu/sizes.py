"""Sizes as whole numbers."""

from __future__ import annotations


def cdiv(n: int, size: int) -> int:
    """How many blocks of `size` cover n."""
    return (n + size - 1) // size


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n; n >= 1."""
    return 1 << (n - 1).bit_length()
