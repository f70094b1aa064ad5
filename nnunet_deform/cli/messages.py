"""What every command says in the same way."""

import typer
from rich.console import Console
from rich.markup import escape


def fail(message: str) -> typer.Exit:
    """Say what is wrong on standard error; to be raised, which ends the command with exit code 1."""
    Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/bold red] {escape(message)}", highlight=False)
    return typer.Exit(1)


def print_problems(console: Console, problems: list[str]) -> None:
    """One line for each."""
    for problem in problems:
        console.print(f"[bold red]Problem:[/bold red] {escape(problem)}")
