"""A TOML file that can say on which line each of its keys is."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..kvcache.errors import ConfigError

_HEADER = re.compile(r"\s*\[{1,2}\s*(?P<table>[^\[\]#]+?)\s*\]{1,2}\s*(#.*)?$")
_ASSIGNMENT = re.compile(r"\s*(?P<key>[\w.\"'-]+)\s*=")


@dataclass(frozen=True)
class ExperimentFile:
    """The document, and the first line of every table and key, by dotted name (`arms.flat.mode`; of a list of tables,
    `comparisons.0.arm`). `overridden` are the names whose values are not the file's."""

    path: Path
    document: Mapping[str, Any]
    lines: Mapping[str, int]
    overridden: frozenset[str]

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str] = ()) -> ExperimentFile:
        """Parse a file, with `overrides` such as `extract.samples=200` in place of its own values."""
        try:
            text = path.read_text(encoding="utf-8")
            document = tomllib.loads(text)
        except FileNotFoundError as error:
            raise ConfigError(
                f"no experiment file at {path}",
                expected="a .toml file",
                found="nothing",
                remedy="Name one that is there",
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML", expected="TOML", found=error, remedy="Mend the file") from error
        overridden = frozenset(_override(document, override) for override in overrides)
        return cls(path, document, _key_lines(text), overridden)

    def where(self, *keys: str) -> str:
        """The file, the line of a key, or else of the nearest table around it, and the key. A value from `--set` has no
        line."""
        dotted = ".".join(filter(None, keys))
        parts = dotted.split(".")
        around = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        if not self.overridden.isdisjoint(around):
            return f"--set {dotted}"
        line = next((self.lines[name] for name in around if name in self.lines), None)
        return f"{self.path}{f', line {line}' if line is not None else ''}: {dotted}"

    def refuse(self, key: str, expected: str, found: object) -> ConfigError:
        return ConfigError(self.where(key), expected=expected, found=found, remedy="Mend it there")

    def table(self, key: str) -> dict[str, Any]:
        """A table with entries at the top level. Raises ConfigError for anything else."""
        table = self.document[key]
        if not isinstance(table, dict) or not table:
            raise self.refuse(key, "a table with entries", table)
        return table


def _key_lines(text: str) -> dict[str, int]:
    """Where tables and keys begin, as people write them: one to a line. What stands within a longer value may be taken
    for a key of that name, which no error asks for."""
    lines: dict[str, int] = {}
    table, counts = "", dict[str, int]()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = _bare(header["table"])
            if line.lstrip().startswith("[["):
                lines.setdefault(table, number)
                counts[table] = counts.get(table, -1) + 1
                table = f"{table}.{counts[table]}"
            lines.setdefault(table, number)
        elif assignment := _ASSIGNMENT.match(line):
            lines.setdefault(".".join(filter(None, (table, _bare(assignment["key"])))), number)
    return lines


def _bare(key: str) -> str:
    return re.sub(r"[\"'\s]", "", key)


def _override(document: dict[str, Any], override: str) -> str:
    """Put `table.key=value` into the document, and return the key; a value that is not TOML is taken as text."""
    dotted, equals, text = override.partition("=")
    *tables, key = dotted.split(".")
    if tables:
        # [base] may be missing; an arm or a store may not, or a typo would make another.
        document.setdefault(tables[0], {})
    for name in tables:
        document = document.get(name) if isinstance(document, dict) else None  # type: ignore[assignment]
    if not equals or not isinstance(document, dict):
        expected = "TABLE.KEY=VALUE with a table of the file, not a list"
        raise ConfigError("no such override", expected=expected, found=override, remedy="Mend --set")
    try:
        document[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        document[key] = text
    return dotted
