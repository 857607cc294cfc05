"""What a run has cost, in seconds by part, over all the processes that worked on it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

FILE = "seconds.json"


class RunClock:
    """Time goes to the part that the next `lap` names. `data_wait` is the part of `train` that was spent waiting for
    batches.

    What a process did after its last checkpoint is done again, and counts once.
    """

    def __init__(self) -> None:
        self.seconds = {"setup": 0.0, "train": 0.0, "data_wait": 0.0, "evaluation": 0.0}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """All the time since the last lap was for this part."""
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now

    def waited(self, seconds: float) -> None:
        """So much of what `train` will be told was spent waiting for a batch."""
        self.seconds["data_wait"] += seconds

    def save(self, folder: Path) -> None:
        """Write `seconds.json`, for the process that resumes the run."""
        (folder / FILE).write_text(json.dumps(self.seconds))

    def load(self, folder: Path) -> None:
        """Add what `save` wrote."""
        earlier = json.loads((folder / FILE).read_text())
        self.seconds = {part: seconds + float(earlier[part]) for part, seconds in self.seconds.items()}

    def costs(self) -> dict[str, Any]:
        """Seconds by part and in all, and the share of training that waited for data."""
        total = sum(seconds for part, seconds in self.seconds.items() if part != "data_wait")
        return {
            "seconds": {**self.seconds, "total": total},
            "data_wait_share": self.seconds["data_wait"] / self.seconds["train"],
        }
