"""What every command says in the same way."""

import typer
from rich.console import Console
from rich.markup import escape

from nnunet_deform import activation


def fail(message: str) -> typer.Exit:
    """Say what is wrong on standard error; to be raised, which ends the command with exit code 1."""
    Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/bold red] {escape(message)}", highlight=False)
    return typer.Exit(1)


def require_nnunetv2() -> None:
    """Ends the command where nnU-Net is missing or too old."""
    try:
        activation.check_nnunetv2()
    except activation.ActivationError as error:
        raise fail(str(error)) from None


def print_note(console: Console, note: str) -> None:
    console.print(f"[bold yellow]Note:[/bold yellow] {escape(note)}")


def print_problems(console: Console, problems: list[str]) -> None:
    """One line for each."""
    for problem in problems:
        console.print(f"[bold red]Problem:[/bold red] {escape(problem)}")
