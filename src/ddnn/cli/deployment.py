"""Verbs that bring a finished run to a device."""

from pathlib import Path
from typing import Annotated

import typer

from ddnn.cli.app import app


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="BUNDLE", help="Folder to make.")],
) -> None:
    """Export all sub-nets of a run as one bundle: a graph per depth, the weights stored once."""
    from ddnn.checkpoint import RunFolder
    from ddnn.export import export_run

    manifest = export_run(RunFolder.open(run), out)
    total = sum(file["bytes"] for file in manifest["files"].values())
    print(f"{out}: {len(manifest['nets'])} nets, {total / 1e6:.1f} MB")
