"""Option values that are more than a word or a number."""

from __future__ import annotations

import re
from typing import Any, get_args

from ..kvcache.errors import ConfigError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_in_bytes(text: str) -> int:
    """`64MB` -> 64000000."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([KMG]?I?B)", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else 0
    if size < 1:
        raise ConfigError("no such size", expected="e.g. 64MB or 1GB", found=text, remedy="Mend --max-shard-size")
    return size


def batch_size_or_auto(text: str) -> int | None:
    """`auto` -> None, a number -> itself."""
    if text == "auto":
        return None
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise ConfigError("no such batch size", expected="auto, or at least 1", found=text, remedy="Mend --batch-size")
    return int(text)


def share_or_number(text: str | None) -> float | None:
    """`0.5` or `128` as the number that it is."""
    if text is None:
        return None
    share = re.fullmatch(r"0*\.[0-9]+|[0-9](\.[0-9]+)?e-[0-9]+", text)
    if not (share or re.fullmatch("[0-9]{1,18}", text)):
        raise ConfigError(
            "no such budget",
            expected="a share below 1, or a whole number of tokens",
            found=text,
            remedy="Mend --budget",
        )
    return float(text)


def one_of(words: Any, word: str, option: str) -> Any:
    """The word itself, if it is one of a Literal's."""
    if word not in get_args(words):
        expected = " or ".join(get_args(words))
        raise ConfigError(f"{option} knows no such word", expected=expected, found=word, remedy=f"Mend {option}")
    return word
