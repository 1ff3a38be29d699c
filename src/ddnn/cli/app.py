"""What the verbs hang on, and how an error ends.

Exit code 0 is success, 1 a failed run, 2 something asked wrongly, 75 (EX_TEMPFAIL of sysexits.h) a run that was asked
to end and can go on.
"""

import io
import logging
import sys
from typing import Annotated

import typer

from ddnn.errors import (
    BudgetError,
    BundleError,
    DDNNError,
    ExportError,
    HubError,
    NestingError,
    Preempted,
    RecipeError,
    RunError,
)
from ddnn.extras import advice
from ddnn.launch import rank
from ddnn.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="One training run, several nested networks: depth-level dynamic networks (DDNN) trained with embedded "
    "knowledge distillation (EKD).",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ddnn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)


def main() -> None:
    """Run the command line; an error that speaks to the user is printed without a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        app()
    except Preempted as stopped:
        if rank() == 0:
            typer.echo(str(stopped), err=True)
        raise SystemExit(75) from None
    except DDNNError as error:
        if not (rank() and isinstance(error, RecipeError | NestingError)):  # which all processes find alike
            _say(str(error))
        failed = isinstance(error, RunError | ExportError | BundleError | BudgetError | HubError)
        raise SystemExit(1 if failed else 2) from None
    except OSError as error:  # of the system, wherever it comes from: a folder of another user, a disk that is gone
        logging.getLogger("ddnn").debug("", exc_info=True)
        _say(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
        raise SystemExit(1) from None
    except ModuleNotFoundError as error:
        if (sentence := advice(error)) is None:
            raise
        _say(sentence)
        raise SystemExit(1) from None


def _say(sentence: str) -> None:
    typer.echo(f"error: {f'process {rank()}: ' if rank() else ''}{sentence}", err=True)
