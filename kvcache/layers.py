"""Which teacher layers a store keeps."""

from __future__ import annotations

import re

from .align.layer_map import ratio_map
from .errors import ConfigError


def select_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The teacher layers that `--layers` names: `all`; numbers and ranges from 0, as in `1,3,8-11`; or `ratio:N`, those
    that `ratio_map` gives a student of N layers.

    Raises ConfigError for layers that are not there, and for anything else.
    """
    if text == "all":
        return tuple(range(num_layers))
    if ratio := re.fullmatch(r"ratio:([0-9]{1,9})", text):
        wanted = int(ratio[1])
        return tuple(sorted(set(ratio_map(_within(wanted, 1, num_layers, text), num_layers))))
    found: set[int] = set()
    for item in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*", item)
        if match is None:
            raise _refuse("all, ratio:N, or numbers and ranges such as 1,3,8-11", text)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise _refuse(f"{last}-{first}, from the lower number to the higher", text)
        found |= set(range(_within(first, 0, num_layers - 1, text), _within(last, 0, num_layers - 1, text) + 1))
    return tuple(sorted(found))


def _within(number: int, least: int, most: int, text: str) -> int:
    if not least <= number <= most:
        raise _refuse(f"numbers from {least} to {most}", text)
    return number


def _refuse(expected: str, found: str) -> ConfigError:
    return ConfigError("no such layers", expected=expected, found=found, remedy="Mend --layers")
