"""Verbs that bring a finished run to others."""

from pathlib import Path
from typing import Annotated

import typer

from ddnn.cli.app import app

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")]
SubNet = Annotated[
    str | None,
    typer.Option(metavar="SUBNET", help="This one alone, as an ordinary network that timm.create_model loads."),
]
Architecture = Annotated[
    str | None, typer.Option(metavar="NAME", help="With --subnet: timm's name of a network of this kind.")
]
Comparison = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Comparison to quote in the card (default: the one the run is part of)."),
]
License = Annotated[str | None, typer.Option(metavar="ID", help="For the card, such as apache-2.0.")]


@app.command()
def hub(
    run: Run,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder to write.")],
    subnet: SubNet = None,
    architecture: Architecture = None,
    comparison: Comparison = None,
    license: License = None,
) -> None:
    """Write a run as the Hugging Face hub keeps models: safetensors, config.json and a model card.

    The card holds the table of sub-nets and, where there is a comparison, whether they are better than the same
    networks trained alone. `ddnn.from_pretrained(FOLDER)` loads it; with --subnet, timm does.
    """
    _write(run, out, subnet, architecture, comparison, license, None)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run, or one that `ddnn hub` wrote.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the Hugging Face hub.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="If it has to be made (default: as the owner has it).")
    ] = None,
    subnet: SubNet = None,
    architecture: Architecture = None,
    comparison: Comparison = None,
    license: License = None,
) -> None:
    """Send a run to the Hugging Face hub, as `ddnn hub` writes it; `hf auth login` says who you are."""
    import tempfile

    from ddnn.hub import upload

    if not (run / "recipe.toml").is_file() and (run / "config.json").is_file():
        if any((subnet, architecture, comparison, license)):
            raise typer.BadParameter(f"{run} is written already; --subnet and the like go with a run, or with ddnn hub")
        print(upload(run, repo_id, private=private))
        return
    with tempfile.TemporaryDirectory() as folder:
        _write(run, Path(folder), subnet, architecture, comparison, license, repo_id)
        print(upload(folder, repo_id, private=private))


def _write(
    run: Path,
    out: Path,
    subnet: str | None,
    architecture: str | None,
    comparison: Path | None,
    license: str | None,
    repo_id: str | None,
) -> None:
    from ddnn.checkpoint import RunFolder
    from ddnn.hub import save_run, save_subnet_of_run

    if architecture is not None and subnet is None:
        raise typer.BadParameter("--architecture goes with --subnet")
    opened = RunFolder.open(run)
    if subnet is None:
        save_run(opened, out, comparison=comparison, license=license, repo_id=repo_id)
    else:
        save_subnet_of_run(
            opened, subnet, out, architecture=architecture, comparison=comparison, license=license, repo_id=repo_id
        )
