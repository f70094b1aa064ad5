"""nnunet-deform selftest."""

import contextlib
import io
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Column, Table

from nnunet_deform.cli.devices import DeviceOption, device_or_fail
from nnunet_deform.cli.messages import fail

if TYPE_CHECKING:
    from nnunet_deform.selftest import Finding


def selftest(
    device: DeviceOption = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Write the report here, to attach to an issue.", dir_okay=False),
    ] = None,
) -> None:
    """Try every operator, backend and network of ours on this machine, in minutes.

    Example: nnunet-deform selftest -o selftest.json
    """
    if output is not None and not output.absolute().parent.is_dir():
        raise fail(f"-o {output}: there is no folder {output.absolute().parent}; make it, or name another file.")
    # nnU-Net prints where its folders are.
    with contextlib.redirect_stdout(io.StringIO()):
        from nnunet_deform import selftest as tests
    chosen = device_or_fail(device)

    started = time.monotonic()
    checks = tests.checks_for(chosen)
    found = []
    console = Console(soft_wrap=True, highlight=False)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = progress.add_task(f"self-test on {chosen}", total=len(checks))
        for check, finding in zip(checks, tests.findings(checks), strict=True):
            found.append(finding)
            progress.update(bar, advance=1, description=f"{check.group}, {check.name}")
    report = tests.report(chosen, found, time.monotonic() - started)
    for group in dict.fromkeys(finding.group for finding in found):
        console.print(_findings_table(group, [finding for finding in found if finding.group == group]))
    about = report["about"]
    machine = "; ".join(about.get("gpus", [])) or f"{about['processor']}, {report['threads']} of {about['cores']} cores"
    versions = f"torch {about['torch']}, Triton {about['triton']}, nnunet-deform {about['nnunet-deform']}"
    console.print(escape(f"{machine}; {versions}"))
    faults = [f for f in found if f.fault is not None]
    for finding in faults:
        where = f"{finding.group}, {finding.name}" + (f", {finding.column}" if finding.column else "")
        console.print(f"[bold red]Fails:[/bold red] {escape(where)}: {escape(finding.fault)}.")
    if output is not None:
        try:
            tests.write(report, output)
        except OSError as error:
            raise fail(f"cannot write {output} ({error.strerror}); name another file with -o.") from None
        console.print(f"Wrote {output}")
    done = sum(finding.skipped is None for finding in found)
    if faults:
        advice = (
            "attach the report to an issue"
            if output
            else "run it again with -o report.json and attach that to an issue"
        )
        console.print(
            f"[bold red]{len(faults)} of {done} checks fail[/bold red] in {report['seconds']:.0f} s; please {advice}."
        )
        raise typer.Exit(1)
    console.print(f"[bold green]All {done} checks pass[/bold green] in {report['seconds']:.0f} s on {chosen}.")


def _findings_table(group: str, found: list["Finding"]) -> Table:
    """One row for each name, with a tick, a cross or a dash in each column; or, where there are times, these."""
    measured = [finding for finding in found if "rows" in finding.figures]
    if measured:
        table = Table(group, "forward", "+ backward", "times as fast", "extra memory")
        for finding in measured:
            table.add_row(f"[bold]{finding.name}[/bold]")
            first, *_ = finding.figures["rows"].values()
            for contender, row in finding.figures["rows"].items():
                milliseconds = (f"{row[key]:.2f} ms" for key in ("forward_ms", "forward_backward_ms"))
                ratio = first["forward_backward_ms"] / row["forward_backward_ms"]
                memory = "-" if row["extra_memory"] is None else f"{row['extra_memory']:.1f} inputs"
                table.add_row(contender, *milliseconds, f"{ratio:.1f}", memory)
        return table
    columns = list(dict.fromkeys(f.column for f in found))
    table = Table(Column(group, overflow="fold"), *columns)
    for name in dict.fromkeys(f.name for f in found):
        cells = {f.column: f for f in found if f.name == name}
        table.add_row(name, *(_mark(cells.get(column)) for column in columns))
    return table


def _mark(finding: "Finding | None") -> str:
    if finding is None or finding.skipped is not None:
        return "[dim]-[/dim]"
    return "[green]\N{CHECK MARK}[/green]" if finding.fault is None else "[bold red]\N{BALLOT X}[/bold red]"
