"""The verb that brings a finished run to a device."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ddnn.cli.app import app

FORMATS = ("bundle", "onnx", "torch-export", "executorch", "openvino")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder to make.")],
    kind: Annotated[
        str,
        typer.Option("--format", metavar="|".join(FORMATS), help="What to make; all but bundle: a file per sub-net."),
    ] = "bundle",
    subnets: Annotated[
        list[str] | None,
        typer.Option("--subnet", metavar="NAME", help="Not with bundle: only this sub-net; may be repeated."),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise the bundle to int8, calibrated on training images of the run.")
    ] = False,
    allowed_loss: Annotated[
        float, typer.Option(metavar="POINTS", help="Percentage points of top-1 that int8 may cost a sub-net.")
    ] = 0.5,
    calibration_images: Annotated[
        int, typer.Option(min=1, metavar="N", help="Training images that int8 is calibrated on.")
    ] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest and nothing else.")] = False,
) -> None:
    """Export the sub-nets of a run: one bundle with all depths and the weights stored once, or each alone.

      ddnn export runs/first -o first.ddnn

      ddnn export runs/first -o first.int8 --int8

      ddnn export runs/first -o first.onnx --format onnx --subnet resnet8

    Whatever is exported is run on test images first and has to give what the network gives; else nothing is written.
    """
    if kind not in FORMATS:
        raise typer.BadParameter(f"--format {kind}: choose {', '.join(FORMATS)}")
    if not allowed_loss >= 0:
        raise typer.BadParameter(f"--allowed-loss {allowed_loss}: must be 0 or more")
    from ddnn.checkpoint import RunFolder
    from ddnn.display import export_table, make_console
    from ddnn.export import export_run

    manifest = export_run(
        RunFolder.open(run),
        out,
        kind,
        subnets=subnets or (),
        int8=int8,
        allowed_loss=allowed_loss,
        calibration_images=calibration_images,
    )
    if as_json:
        print(json.dumps(manifest, indent=2))
    else:
        make_console().print(export_table(manifest, str(out)))
