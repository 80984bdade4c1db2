"""One of three processes of test_feeders.py, which feed or are fed: RANK WORLD STORE OUT."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastsae.data import LiveSource, StreamConfig
from fastsae.data.hooks import hooks_of
from fastsae.data.passes import Activations, ModelPasses
from fastsae.data.source import next_pair
from fastsae.parallel import mesh
from fastsae.runs.feeders import Feeders, Line, Served, fed, feed
from fastsae.runs.together import FromFirst, OwnRows, ProcessError, Team
from tests.data_case import toy_config, toy_corpus, toy_model

WORLD = 3
SIZES = (5, 77, 200, 1, 300, 450, 64, 800)
"""Batches over more than an epoch."""
CONFIGS: dict[str, tuple[StreamConfig, Any]] = {
    "one hook": (toy_config(), None),
    "several hooks and a target": (toy_config(hook=(1, "mlp.0:input")), ("mlp.0", 3)),
    "documents apart": (toy_config(pack="documents", window=20, norm_factor=None), None),
}
BUFFER = 400
BLOCK = 4
"""Passes of a block of 200 rows, of 4 windows of 15 rows each."""


class Counted(ModelPasses):
    """Passes that a test counts, and interferes with."""

    def __init__(self, config: StreamConfig, target: Any, before: Callable[[int], object] | None):
        hooks = (*config.hooks, *(() if target is None else hooks_of(target)))
        super().__init__(toy_model(), hooks, config.window)
        if before is None:
            raise ValueError("no model at 'nowhere'")
        self.runs, self.before = 0, before

    def run(self, token_ids: Tensor) -> Activations:
        self.runs += 1
        self.before(self.runs)
        return super().run(token_ids)


def source(model: Any, name: str) -> LiveSource:
    config, target = CONFIGS[name]
    return LiveSource(model, toy_corpus(), config, target=target, buffer_rows=BUFFER)


def alone(name: str) -> LiveSource:
    return source(toy_model(), name)


def read(live: Any, sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """What a run sees of a source: rows, targets, held-out rows, counts, positions, places of rows."""
    found: dict[str, Any] = {"position": live.state_dict()}
    rows = []
    for number, n in enumerate(sizes):
        rows += [one for one in next_pair(live, n) if one is not None]
        found[f"stats {number}"], found[f"position {number}"] = live.stats, live.state_dict()
        found[f"places {number}"] = live.origin()([0, n - 1])
        if number == 2:
            rows.append(live.held_out())
    return {**found, "rows": rows}


def on_feeders(
    count: int, fed_by: Callable[[Feeders], Any], before: Callable[[int], object] = lambda run: None,
    name: str = "one hook",
) -> Any:  # fmt: skip
    """`fed_by` in the first process with so many feeders; in a feeder what it did; None in one that only looks on."""
    grid = mesh(processes=WORLD - count)
    line = Line(grid)
    if line.feeds:
        config, target = CONFIGS[name]
        return feed(line, lambda: Counted(config, target, before))
    team = Team(grid)
    with fed(line, team) as feeders:
        return None if feeders is None else fed_by(feeders)


def said(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (ProcessError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def rows(count: int, name: str) -> Any:
    return on_feeders(count, lambda feeders: read(source(feeders.ready(None), name)), name=name)


def resumed(count: int, state: dict[str, Any]) -> Any:
    """Goes on from a position, and from the same again, as a run does after looking at coming rows."""

    def go_on(feeders: Feeders) -> dict[str, Any]:
        live = source(feeders.ready(None), "one hook")
        live.load_state_dict(state)
        live.next_batch(30)
        live.load_state_dict(state)
        return read(live)

    return on_feeders(count, go_on)


def slow_reader(feeders: Feeders) -> dict[str, Any]:
    """Each feeder has begun what it may, and waits; also where the reader steps back in the text."""
    live = source(feeders.ready(None), "one hook")
    live.next_batch(1)
    position = live.state_dict()
    for _ in range(3):
        live.load_state_dict(position)
    time.sleep(0.3)
    return {"waiting": [len(one) for one in feeders._waiting.values()], "rows": [live.next_batch(500)]}


def with_threads(count: int) -> Any:
    """A feeder computes with the threads of the process that asks."""

    def before(run: int) -> None:
        if run > 1 and torch.get_num_threads() != count:
            raise ValueError(f"{torch.get_num_threads()} threads")

    def one_batch(feeders: Feeders) -> Tensor:
        live = source(feeders.ready(None), "one hook")
        torch.set_num_threads(count)
        return live.next_batch(9)

    found = on_feeders(1, one_batch, before)
    torch.set_num_threads(1)
    return found


def prompt_end() -> Any:
    """The run ends while passes are to be made that nobody needs any more."""
    return on_feeders(
        2,
        lambda feeders: source(feeders.ready(None), "one hook").next_batch(9),
        lambda run: time.sleep(1.0) if run > 3 else None,
    )


def fails_at(number: int) -> Callable[[int], object]:
    def before(run: int) -> None:
        if run == number:
            raise ValueError("no memory left on the device of the model")

    return before


def failing() -> Any:
    """A pass of the second feeder fails: every row of the blocks before it is served, then all hear of it."""
    found: dict[str, Any] = {"rows": []}

    def all_rows(feeders: Feeders) -> None:
        live = source(feeders.ready(None), "one hook")
        while True:
            found["rows"].append(live.next_batch(50))

    before = fails_at(7) if dist.get_rank() == 2 else lambda run: None
    return {**found, "said": said(lambda: on_feeders(2, all_rows, before))}


def not_loaded() -> Any:
    """A feeder cannot load its model: the others hear of it."""
    before: Any = None if dist.get_rank() == 2 else lambda run: None
    return said(lambda: on_feeders(2, lambda feeders: feeders.ready(None), before))


def killed() -> Any:
    """The only feeder dies: both processes that train hear of it, with its number."""
    grid = mesh(processes=2)
    line = Line(grid)
    if line.feeds:
        return feed(line, lambda: Counted(*CONFIGS["one hook"], dies_at(30)))
    found: dict[str, Any] = {"rows": []}

    def train() -> None:
        team = Team(grid)
        with fed(line, team) as feeders:
            live = None if feeders is None else source(feeders.ready(None), "one hook")
            own = OwnRows(FromFirst(live, team), team.share, team.shares)
            while True:
                found["rows"].append(own.next_batch(51))

    return {**found, "said": said(train)}


def dies_at(number: int) -> Callable[[int], object]:
    return lambda run: os._exit(0) if run == number else None


def found_in_all() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for count in (1, 2):
        for name in CONFIGS:
            found[f"rows, {count}, {name}"] = rows(count, name)
    middle = alone("one hook")
    middle.next_batch(633)
    for count in (2, 1):
        found[f"resumed, {count}"] = resumed(count, middle.state_dict())
        found[f"slow reader, {count}"] = on_feeders(count, slow_reader)
    found["threads"] = with_threads(2)
    found["prompt end"] = prompt_end()
    found["failing"] = failing()
    found["other mesh"] = said(lambda: Team(DeviceMesh("cpu", [0, 2], mesh_dim_names=("data",))))
    found["not needed"] = on_feeders(
        1, lambda feeders: source(feeders.ready(None), "one hook").next_batch(9), fails_at(8)
    )
    found["not loaded"] = not_loaded()
    found["killed"] = killed()
    return found


def main(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(store, world))
    found = {
        name: {"passes": one.passes, "most": one.most_waiting} if isinstance(one, Served) else one
        for name, one in found_in_all().items()
    }
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
