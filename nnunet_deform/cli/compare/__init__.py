"""nnunet-deform compare: a whole comparison from one experiment file, or of results that are there already."""

import typer

from nnunet_deform.cli.compare import (
    archive,
    check,
    cost,
    init,
    jobs,
    predict,
    prepare,
    report,
    results,
    run,
    train,
    workflow,
)

# As the help lists them.
_COMMANDS = {
    "On one machine": (init.init, check.check, run.run, report.report),
    "Without an experiment file": (results.results,),
    "On a cluster": (workflow.workflow, jobs.jobs, prepare.prepare, train.train, predict.predict, cost.cost),
    "To share": (archive.archive,),
}

app = typer.Typer(no_args_is_help=True)


@app.callback()
def main() -> None:
    """Compare networks: one experiment file, every arm on the same folds, paired statistics, one report.

    Needs the extra compare.

    Example: nnunet-deform compare init -d 501
    """


for _panel, _functions in _COMMANDS.items():
    for _function in _functions:
        app.command(rich_help_panel=_panel)(_function)
