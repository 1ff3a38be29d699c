"""The verb that chooses the thresholds of a cascade."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddnn.cli.app import app
from ddnn.cli.device import Bundle, Json, Shared, Threads, drawn, warn_if_busy, watched
from ddnn.errors import BudgetError

if TYPE_CHECKING:
    from ddnn.runtime.curve import Curve
    from ddnn.runtime.manifest import Manifest


@app.command()
def cascade(
    bundle: Bundle,
    data: Annotated[
        Path | None,
        typer.Option(metavar="HELD-OUT", help="Folder of class folders, or .npz with images and labels."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="The run the bundle comes from, for its held-out images.")
    ] = None,
    accuracy: Annotated[
        float | None, typer.Option(min=0, max=1, metavar="X", help="Choose the quickest thresholds that reach it.")
    ] = None,
    latency_ms: Annotated[
        float | None,
        typer.Option("--latency-ms", metavar="MS", help="Choose the most accurate with such a mean latency."),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Images per call (default: 1 8 32, as far as images suffice); thresholds are for the first.",
        ),
    ] = None,
    threads: Threads = None,
    shared: Shared = False,
    limit: Annotated[int, typer.Option(min=20, metavar="N", help="Most held-out images to use.")] = 4000,
    seconds: Annotated[float, typer.Option(min=0, metavar="S", help="Time for each batch size.")] = 30.0,
    as_json: Json = False,
) -> None:
    """Choose the thresholds of a cascade on held-out images and measure what they give on this machine.

    A cascade answers with the shallowest net and goes deeper only with the images it is unsure of. The curve against
    every depth alone goes to a page in the bundle, which says where a cascade does not pay. Without --accuracy or
    --latency-ms thresholds are chosen that are as accurate as the most accurate depth.

      ddnn cascade bundle --data validation/ --accuracy 0.7
    """
    if accuracy is not None and latency_ms is not None:
        raise typer.BadParameter("give --accuracy or --latency-ms, not both")
    if (data is None) == (run is None):
        raise typer.BadParameter("give held-out images by --data or by --run")
    import ddnn
    from ddnn.files import check_writable
    from ddnn.runtime import curve as curves
    from ddnn.runtime import heldout, tuning
    from ddnn.runtime.kept import machine_folder
    from ddnn.runtime.machine import this_machine

    curves.check_wanted(accuracy, latency_ms)
    model = ddnn.load(bundle, threads=threads, shared=shared)
    check_writable(machine_folder(model.manifest.folder, this_machine()))
    if data is not None:
        chosen_on, judged_by = heldout.read(data, model.manifest, limit).halves()
    else:
        assert run is not None
        from ddnn.cli.run_images import test_and_validation  # needs torch

        chosen_on, judged_by = test_and_validation(run, model.manifest, limit)
    for unread in heldout.all_unread(chosen_on, judged_by):
        typer.echo(f"warning: {unread}", err=True)
    batches = batch or [size for size in (1, 8, 32) if size <= len(judged_by)]
    with watched(quiet=as_json) as watch:
        measured = tuning.measure(model, chosen_on, judged_by, batches, accuracy=accuracy, seconds=seconds, watch=watch)
    try:
        unmet = None
        if accuracy is not None or latency_ms is not None:
            measured = curves.choose(measured, accuracy=accuracy, latency_ms=latency_ms)
    except BudgetError as error:  # the curve is worth keeping all the same
        unmet = BudgetError(f"{error}; what is kept, and what `predict --cascade` takes, is for {measured.wanted}")
    if as_json:
        reason = {} if unmet is None else {"reason": str(unmet)}
        print(json.dumps({**asdict(measured), **reason}, indent=2))
    else:
        _print_curve(measured, model.manifest)
        warn_if_busy(measured.busy)
    folder = curves.write(measured, model.manifest)  # last: what was measured is seen even where it can't be kept
    files = [folder / curves.NAME, *drawn(lambda: _page(measured, model.manifest, folder), quiet=as_json)]
    if not as_json:
        for path in files:
            print(path)
    if unmet is not None:
        raise unmet


def _page(measured: "Curve", manifest: "Manifest", folder: Path) -> list[Path]:
    from ddnn.runtime.output import write_cascade

    return write_cascade(measured, manifest, folder)


def _print_curve(measured: "Curve", manifest: "Manifest") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ddnn.runtime import sentences, tables

    content = tables.curve_table(measured)
    table = Table(title=f"held-out images; ms: mean latency of a call; {escape(str(measured.machine))}")
    for i, heading in enumerate(content.headings):
        table.add_column(escape(heading), justify="right" if i else "left")
    for i, row in enumerate(content.rows):
        if i == len(measured.fixed):
            table.add_section()
        table.add_row(escape(row[0].text), *(cell.text for cell in row[1:]), style="bold" if row[0].strong else "")
    Console(width=None if Console().is_terminal else 160).print(table)
    print(f"{sentences.headline(measured)}.")
    for sentence in [text for _, text in sentences.verdicts(measured)] + sentences.reasons(measured, manifest):
        print(f"- {sentence}.")
    for last in (sentences.worst(measured), sentences.caveat(measured), sentences.looked_up(measured)):
        if last:
            print(f"{last}.")
    chosen = measured.points[measured.chosen]
    print(
        f"Chosen for {measured.wanted}: thresholds {', '.join(map(tables.threshold, chosen.thresholds))}, top-1 "
        f"{sentences.percent(chosen.accuracy)} on images they were not chosen on."
    )
