"""How alike two dictionaries are. A dictionary is (n, D), one direction per row; row norms do not matter.

FVU, L0 and densities of an SAE are `fastsae.runs.evaluate`'s.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

SAME = 0.9
"""A cosine above this counts as the same direction."""


def cosines(A: Tensor, B: Tensor) -> Tensor:
    """cos(a_i, b_j): (n, m) of A (n, D) and B (m, D), in their dtype. A row of 0 has cosine 0 with everything."""
    return F.normalize(A, dim=-1) @ F.normalize(B, dim=-1).mT


def max_cosines(A: Tensor, B: Tensor) -> Tensor:
    """max_j cos(a_i, b_j): (n,). Its mean is MMCS(A, B), which is not MMCS(B, A).

    Source: Sharkey et al. 2022; Cunningham et al. 2023.
    """
    return cosines(A, B).amax(-1)


def matched_cosines(A: Tensor, B: Tensor) -> Tensor:
    """cos(a_i, b_π(i)): (n,), under the one-to-one π with the largest sum. A (n, D), B (m, D), n <= m.

    Unlike MMCS, several rows of A cannot all count the same row of B. Source: the public code of Cunningham et al.
    Raises ValueError for n > m.
    """
    found = cosines(A, B)
    columns = assignment(-found.double().cpu().numpy())
    return found[range(len(columns)), columns.tolist()]


def likeness(A: Tensor, B: Tensor) -> dict[str, float]:
    """mmcs of A (n, D) to B (m, D), n <= m; and of the best one-to-one pairs the mean cosine and the share above .9."""
    matched = matched_cosines(A, B)
    return {
        "mmcs": round(float(max_cosines(A, B).mean()), 5),
        "matched": round(float(matched.mean()), 5),
        "matched_same": round(float((matched > SAME).double().mean()), 5),
    }


def assignment(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """argmin over one-to-one π of Σ_i cost[i, π(i)]: (n,) of cost (n, m), n <= m, finite.

    The Hungarian method by shortest augmenting paths, O(n² m); scipy, which has it too, is not a dependency.
    512 rows and 1,024 columns take about a second.
    Raises ValueError for n > m or a cost that is not finite. Source: Jonker & Volgenant 1987; Crouse 2016.
    """
    n, m = cost.shape
    if n > m:
        raise ValueError(f"cost has shape {(n, m)}, expected at most as many rows as columns")
    if not np.isfinite(cost).all():
        raise ValueError("cost has entries that are not finite")
    row_price, column_price = np.zeros(n), np.zeros(m)
    row_of, column_of = np.full(m, -1), np.full(n, -1)
    for start in range(n):
        # Dijkstra from row `start` over reduced costs, which are never negative, to the nearest free column.
        distance, before = np.full(m, np.inf), np.full(m, -1)
        done = np.zeros(m, dtype=bool)
        reached, row, column = 0.0, start, -1
        while column < 0 or row_of[column] >= 0:
            if column >= 0:
                row = row_of[column]
            through = reached + cost[row] - row_price[row] - column_price
            closer = ~done & (through < distance)
            distance[closer], before[closer] = through[closer], row
            column = int(np.where(done, np.inf, distance).argmin())
            reached = distance[column]
            done[column] = True
        # Prices change so that every edge of the path has a reduced cost of 0.
        passed = done.copy()
        passed[column] = False
        row_price[start] += reached
        row_price[row_of[passed]] += reached - distance[passed]
        column_price[passed] += distance[passed] - reached
        while True:  # flip the path
            row_of[column] = row = before[column]
            column_of[row], column = column, column_of[row]
            if row == start:
                break
    return column_of
