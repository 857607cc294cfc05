"""Fields of TOML, JSON and command lines, typed, with errors that say where they were found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, get_args

from ..data.errors import DataError
from ..kvcache.errors import ConfigError

Where = Callable[[str], str]
"""Says where a field was found: a place in a file, or an option."""


COMMAS = ("kv_loss", "kv_control", "kv_segments", "fusion_weights", "layers", "segments", "segment_ratio")
"""Fields of several words or numbers."""


class FieldError(ConfigError):
    """A value that fits its field's type and nothing else. `place` is where it was found."""

    def __init__(self, field: str, expected: str, found: object, place: str | None = None) -> None:
        remedy = f"Mend {field} (--{field.replace('_', '-')})"
        super().__init__(place or field, expected=expected, found=found, remedy=remedy)
        self.field, self.expected, self.found = field, expected, found


@contextmanager
def placed(where: Where, field: str) -> Iterator[None]:
    """Say where the field is that an error is about: its own, or else `field`."""
    try:
        yield
    except FieldError as error:
        raise FieldError(error.field, error.expected, error.found, where(error.field)) from error
    except (ConfigError, DataError) as error:
        error.args = (f"{where(field)}: {error}",)
        raise


def parse_fields(document: Mapping[str, Any], hints: Mapping[str, Any], where: Where) -> dict[str, Any]:
    """The document with every value as `hints` types it: a type, a union of types, or a Literal of words. Those
    of COMMAS take a list as well, of what a command line has between commas.

    Raises ConfigError saying where the field is that is unknown or does not fit.
    """
    parsed: dict[str, Any] = {}
    for name, value in document.items():
        if name not in hints:
            raise ConfigError(
                f"{where(name)}: no such field", expected=", ".join(hints), found=name, remedy="Mend its name"
            )
        options = (hints[name],) if isinstance(hints[name], type) else get_args(hints[name])
        if name in COMMAS and _is_list_of_words(value):
            parsed[name] = ",".join(map(str, value))
        elif type(value) is int and float in options and int not in options:
            parsed[name] = float(value)
        else:
            parsed[name] = value
        if not any(parsed[name] == option or type(parsed[name]) is option for option in options):
            shown = [o if isinstance(o, str) else o.__name__ for o in options if o is not type(None)]
            shown += ["list of them"] if name in COMMAS else []
            raise ConfigError(where(name), expected=" or ".join(shown), found=repr(value), remedy="Mend its value")
    return parsed


def flags(options: Any, **spelled: Callable[[Any], list[str]]) -> list[str]:
    """The command line that gives a dataclass of options: `--batch-size 8`, without its defaults. `spelled` are those
    whose option is not the field's name."""
    found: list[str] = []
    for field in fields(options):
        value, name = getattr(options, field.name), f"--{field.name.replace('_', '-')}"
        if value == field.default:
            continue
        if field.name in spelled:
            found += spelled[field.name](value)
        else:
            found += [name] if isinstance(value, bool) else [name, str(value)]
    return found


def _is_list_of_words(value: object) -> bool:
    return isinstance(value, list) and all(type(item) in (str, int, float) and "," not in str(item) for item in value)
