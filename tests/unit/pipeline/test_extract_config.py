"""Options of an extraction that make no sense are refused by name, before anything is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from kvpipe.cli.parse import share_or_number
from kvpipe.kvcache.errors import ConfigError
from kvpipe.pipeline.extract_config import ExtractConfig


@pytest.mark.parametrize(
    ("options", "says"),
    [
        *(({name: 0}, f"^{name}: expected at least 1, found 0") for name in ("samples", "eval_samples", "batch_size")),
        ({"max_shard_bytes": 0}, "^max_shard_bytes: expected at least 1"),
        ({"seed": -1}, "^seed: expected 0 or more"),
        ({"codec": "zip"}, "^codec: expected raw, fp8, int8, int4, int3, int2, found zip. Mend codec"),
        ({"segments": "end"}, "^segments: expected all, or some of prompt, reasoning, answer, found 'end'"),
        ({"evict": "rvk", "budget": 0.5}, "^evict: expected none, right-crop, random, rkv, found rvk"),
        ({"evict": "rkv"}, "^budget: expected both evict and budget, or neither, found evict rkv with no budget"),
        ({"budget": 0.5}, "^budget: expected both .* found evict none with budget 0.5"),
        *(({"evict": "rkv", "budget": b}, "^budget: expected a share") for b in (0.0, 1.5, math.nan)),
        ({"reasoning": "teacher", "temperature": -1.0}, "^temperature: expected 0 .greedy. or more"),
        ({"reasoning": "teacher", "max_new_tokens": 0}, "^max_new_tokens: expected at least 1"),
        ({"temperature": 0.5}, "^temperature: expected it with --reasoning teacher alone, found 0.5"),
        ({"wrong_answers": "keep"}, "^wrong_answers: expected it with --reasoning teacher alone"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ExtractConfig("qwen", Path("x.zarr"), **options)


@pytest.mark.parametrize(("budget", "said"), [(0.25, "0.25"), (1e-9, "1e-09"), (1.0, "1"), (128.0, "128")])
def test_a_budget_is_said_as_the_command_line_takes_it(budget: float, said: str) -> None:
    config = ExtractConfig("qwen", Path("x.zarr"), evict="rkv", budget=budget)
    assert config.flags()[-2:] == ["--budget", said]
    assert share_or_number(said) == budget
