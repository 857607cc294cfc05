"""How often verdicts err, on simulated experiments whose truth is known.

Eight seeds, 256 held-out samples that all of them share. In half of the lines samples differ in whom they favour,
whatever the seed.
"""

from __future__ import annotations

import numpy as np
from kvpipe.pipeline import crossed_bootstrap
from kvpipe.pipeline.crossed_bootstrap import SampleDifferences
from kvpipe.pipeline.questions import Question
from kvpipe.pipeline.stats import Comparison, adjust, compare

EXPERIMENTS, SEEDS, SAMPLES = 500, 8, 256
BETWEEN_SEEDS, CELL = 0.04, 0.2
MARGIN = 0.04


def simulate(rng: np.random.Generator, effect: float, between_samples: float, margin: float | None) -> Comparison:
    """One comparison of an arm that is `effect` from its control on average over all seeds and all samples."""
    values = (
        effect
        + rng.normal(0, BETWEEN_SEEDS, (SEEDS, 1))
        + rng.normal(0, between_samples, (1, SAMPLES))
        + rng.normal(0, CELL, (SEEDS, SAMPLES))
    )
    scores = dict(enumerate(values.mean(1)))
    samples = SampleDifferences(values, np.ones(SAMPLES))
    (found,) = adjust([compare(Question("arm", "control", margin), "ce", scores, dict.fromkeys(scores, 0.0), samples)])
    return found


def measure(between_samples: float, effect: float, margin: float | None) -> str:
    rng = np.random.default_rng(0)
    found = [simulate(rng, effect, between_samples, margin) for _ in range(EXPERIMENTS)]
    verdicts = [sum(c.verdict == verdict for c in found) for verdict in ("better", "worse", "equivalent")]
    intervals = [(c.headline, (c.crossed_low, c.crossed_high), (c.ci_low, c.ci_high)) for c in found]
    covered = [sum(low <= effect <= high for low, high in kind) for kind in zip(*intervals, strict=True)]
    shares = [f"{count / EXPERIMENTS:.1%}" for count in (*verdicts, *covered)]
    row = (f"{between_samples:g}", f"{effect:g}", "—" if margin is None else f"{margin:g}", *shares)
    return f"| {' | '.join(row)} |"


if __name__ == "__main__":
    crossed_bootstrap.RESAMPLES = 1000
    print(  # noqa: T201
        "| spread of samples | true difference | margin | better | worse | equivalent | covered "
        "| by seeds and samples | by seeds |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            measure(between_samples, effect, margin)
            for between_samples in (0.0, 0.3)
            for effect, margin in ((0.0, None), (-0.05, None), (-0.1, None), (0.0, MARGIN), (-MARGIN, MARGIN))
        ),
        sep="\n",
    )
