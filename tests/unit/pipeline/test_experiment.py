"""The cores are dealt out to runs side by side."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from kvpipe.pipeline.experiment import shares_of_cores


@given(st.sets(st.integers(0, 255), min_size=1), st.integers(1, 40))
def test_every_job_gets_as_many_cores_and_none_is_given_twice_while_some_are_free(cores: set[int], jobs: int) -> None:
    shares = shares_of_cores(sorted(cores), jobs)
    assert len(shares) == jobs
    assert {len(share) for share in shares} == {max(1, len(cores) // jobs)}
    given_out = Counter(core for share in shares for core in share)
    assert given_out.keys() <= cores
    assert max(given_out.values()) - min(given_out.get(core, 0) for core in cores) <= 1
    if jobs <= len(cores):
        assert max(given_out.values()) == 1
