"""`kvpipe experiment`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..pipeline.experiment_config import ExperimentConfig
    from ..pipeline.finished_runs import ExperimentRuns

experiment = typer.Typer(help="Compare recipes over paired seeds, from stores.", no_args_is_help=True)

Config = Annotated[Path, typer.Argument(help="An experiment file, e.g. experiments/ab.toml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the file, e.g. extract.samples=200."),
]
ReportDir = Annotated[Path | None, typer.Option(help="\\[default: reports/<name>]")]
RunsDir = Annotated[Path | None, typer.Option(help="\\[default: runs/<name>]")]


@experiment.callback()
def group() -> None:
    pass


@experiment.command()
def run(
    config: Config,
    overrides: Overrides = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs side by side. \\[default: one a core, or one on a GPU]")
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="Trackers, each with an option of its own: tensorboard, wandb, trackio, mlflow, ..."),
    ] = None,
    report_dir: ReportDir = None,
    runs_dir: RunsDir = None,
) -> None:
    """Extract if needed, run what is missing, and write the report. Finished runs are not repeated."""
    from ..pipeline.experiment_config import load_experiment
    from ..pipeline.finished_runs import settled_runs

    parsed = load_experiment(config, overrides or ())
    runs = runs_dir or Path("runs") / parsed.name
    if (outcome := settled_runs(parsed, runs)) is None:
        # What trains takes seconds to import.
        from ..pipeline.experiment import run_experiment

        outcome = run_experiment(parsed, runs, jobs, report_to or ())
    _report(parsed, outcome, runs, report_dir)


@experiment.command()
def report(config: Config, overrides: Overrides = None, report_dir: ReportDir = None, runs_dir: RunsDir = None) -> None:
    """Write the report of the runs that are finished, without running anything."""
    from ..pipeline.experiment_config import load_experiment
    from ..pipeline.finished_runs import finished_runs

    parsed = load_experiment(config, overrides or ())
    runs = runs_dir or Path("runs") / parsed.name
    _report(parsed, finished_runs(parsed, runs), runs, report_dir)


@experiment.command()
def status(config: Config, overrides: Overrides = None, runs_dir: RunsDir = None) -> None:
    """Show how far extractions and runs are, also while another terminal runs them."""
    from datetime import timedelta

    from ..pipeline.experiment_config import load_experiment
    from ..pipeline.experiment_status import experiment_status, seconds_left, store_status

    parsed = load_experiment(config, overrides or ())
    runs = experiment_status(parsed, runs_dir or Path("runs") / parsed.name)
    lines = [*store_status(parsed), *runs]
    width = max(len(line.name) for line in lines)
    for line in lines:
        took = f"{line.seconds:.0f} s" if line.seconds is not None else ""
        typer.echo(f"{line.name:{width}}  {line.state:8}  {line.said or took}".rstrip())
    counted = [
        f"{number} {state}"
        for state in ("finished", "running", "failed", "waiting", "damaged", "other")
        if (number := sum(run.state == state for run in runs))
    ]
    left = seconds_left(runs)
    eta = f", ETA {timedelta(seconds=round(left))}" if left is not None else ""
    typer.echo(f"{len(runs)} runs: {', '.join(counted)}{eta}")


def _report(config: ExperimentConfig, outcome: ExperimentRuns, runs_dir: Path, report_dir: Path | None) -> None:
    """Write it, say the verdicts, and exit with 1 if a run failed."""
    from ..kvcache.errors import ConfigError
    from ..pipeline.report import claim_sentence, sentence, write_report
    from ..pipeline.results import collect

    for name, line in outcome.failures.items():
        typer.secho(f"{name} failed: {line} (see {runs_dir / name}.log)", fg=typer.colors.RED, err=True)
    if not outcome.records and outcome.failures:
        typer.secho("No run finished, so there is no report.", fg=typer.colors.RED, err=True)
        raise typer.Exit(1)
    if not outcome.records:
        raise ConfigError(
            "no run finished",
            expected=f"at least one under {runs_dir}",
            found="none",
            remedy="Start them with `kvpipe experiment run`",
        )
    results = collect(config, outcome, runs_dir)
    for said, names in (("Changed since the first run was finished", results.changed), ("To run", results.unrun)):
        if names:
            typer.secho(f"{said}: {', '.join(names)}.", fg=typer.colors.YELLOW, err=True)
    page = write_report(results, report_dir or Path("reports") / config.name)
    for line in (*map(sentence, results.comparisons[results.primary_metric]), *map(claim_sentence, results.claims)):
        typer.echo(line)
    typer.echo(f"Report: {page}")
    if outcome.failures:
        raise typer.Exit(1)
