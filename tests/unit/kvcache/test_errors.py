"""Errors say what was expected, what was found and what to do, in one line."""

from __future__ import annotations

import pytest
from kvpipe.kvcache.errors import CollapseError, ConfigError, KVPipeError, ModelError, StoreError


def test_a_message_has_problem_expected_found_and_remedy() -> None:
    error = StoreError("the store is short", expected=3, found=0, remedy="Extract again")
    assert str(error) == "the store is short: expected 3, found 0. Extract again"
    assert str(StoreError("no store", remedy="Write one")) == "no store. Write one"


@pytest.mark.parametrize(
    ("kind", "exit_code"), [(StoreError, 2), (ModelError, 2), (ConfigError, 2), (CollapseError, 3)]
)
def test_every_error_is_one_the_command_line_knows(kind: type[KVPipeError], exit_code: int) -> None:
    assert issubclass(kind, KVPipeError)
    assert kind.exit_code == exit_code
