"""One command in several processes, as `torchrun` and `accelerate launch` start them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ..kvcache.errors import ConfigError, KVPipeError

PATIENCE = timedelta(days=7)
"""The shares of two ranks may differ by hours; that one has died is noticed where the others wait for it."""


@dataclass(frozen=True)
class Ranks:
    """Which process of a job this is; by default the only one."""

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def totals(self, *values: float | int) -> list[float]:
        """The sums over all ranks, which wait for each other here.

        Raises KVPipeError where another rank has ended before.
        """
        if self.count == 1:
            return [float(value) for value in values]
        sums = torch.tensor(values, dtype=torch.float64)
        try:
            dist.all_reduce(sums)
        except RuntimeError as error:
            raise KVPipeError("another process of this job has failed", remedy="Its own message says why") from error
        return sums.tolist()

    def wait(self) -> None:
        """Until all ranks are here. Raises KVPipeError where one has ended before."""
        self.totals(0)


ONE_PROCESS = Ranks()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """This process's place in its job, by the environment that launchers set."""
    if world_size() == 1:
        yield ONE_PROCESS
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """Processes of this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine, by which it takes a GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main_process() -> bool:
    """Whether this is the process that speaks for its job."""
    return os.environ.get("RANK", "0") == "0"


def require_one_process(command: str) -> None:
    """Raise ConfigError for a command that cannot share its work."""
    if world_size() > 1:
        raise ConfigError(
            f"`kvpipe {command}` runs in one process",
            expected="a world size of 1",
            found=world_size(),
            remedy="Start it without a launcher; `kvpipe extract` is the command that several processes can share",
        )
