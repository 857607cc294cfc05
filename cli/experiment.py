"""`kvpipe experiment`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

experiment = typer.Typer(help="Compare recipes over paired seeds, from one store.", no_args_is_help=True)


@experiment.callback()
def group() -> None:
    pass


@experiment.command()
def run(
    config: Annotated[Path, typer.Argument(help="An experiment file, e.g. experiments/ab.toml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the file, e.g. extract.samples=200."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs side by side. \\[default: one a core, or one on a GPU]")
    ] = None,
    report_dir: Annotated[Path | None, typer.Option(help="\\[default: reports/<name>]")] = None,
    runs_dir: Annotated[Path | None, typer.Option(help="\\[default: runs/<name>]")] = None,
) -> None:
    """Extract if needed, run what is missing, and write the report. Finished runs are not repeated."""
    from ..kvcache.errors import ConfigError
    from ..pipeline.experiment import run_experiment
    from ..pipeline.experiment_config import load_experiment
    from ..pipeline.report import sentence, write_report
    from ..pipeline.results import collect

    parsed = load_experiment(config, overrides or ())
    runs = runs_dir or Path("runs") / parsed.name
    outcome = run_experiment(parsed, runs, jobs)
    for name, line in outcome.failures.items():
        typer.secho(f"{name} failed: {line} (see {runs / name}.log)", fg=typer.colors.RED, err=True)
    if not outcome.records:
        raise ConfigError("no run finished", expected="at least one", found="none", remedy="Read the logs named above")
    results = collect(parsed, outcome, runs)
    page = write_report(results, report_dir or Path("reports") / parsed.name)
    for comparison in results.comparisons[results.primary_metric]:
        typer.echo(sentence(comparison))
    typer.echo(f"Report: {page}")
    if outcome.failures:
        raise typer.Exit(1)
