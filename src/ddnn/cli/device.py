"""Verbs that run bundles on a device. None of them needs torch, but for `cascade --run`."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddnn.cli.app import app
from ddnn.errors import BudgetError, RequestError

if TYPE_CHECKING:
    from ddnn.runtime.manifest import Manifest
    from ddnn.runtime.model import Prediction
    from ddnn.runtime.profile import Profile

Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that `ddnn export` made.")]
Threads = Annotated[int | None, typer.Option(min=1, metavar="N", help="CPUs one call uses (default: all there are).")]
Shared = Annotated[bool, typer.Option("--shared", help="Hold the weights of all depths in memory once.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
LatencyMs = Annotated[float | None, typer.Option("--latency-ms", metavar="MS", help="Longest a call may take.")]


@app.command()
def predict(
    bundle: Bundle,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.", readable=False)],
    depth: Annotated[str | None, typer.Option(metavar="NAME", help="Which net (default: the deepest).")] = None,
    latency_ms: LatencyMs = None,
    cascade: Annotated[
        bool, typer.Option("--cascade", help="Start shallow, go deeper where unsure, as `ddnn cascade` has chosen.")
    ] = False,
    threshold: Annotated[
        list[float] | None,
        typer.Option(metavar="T", help="With --cascade: other thresholds, one, or one for each net but the deepest."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="K", help="How many classes to print.")] = 5,
    threads: Threads = None,
    shared: Shared = False,
    as_json: Json = False,
) -> None:
    """Print the classes of images and how sure the net is.

      ddnn predict bundle photo.jpg --depth resnet18

      ddnn predict bundle *.jpg --latency-ms 10 --top 1

    An image that cannot be read is named, the others are answered, and the exit code is 1.
    """
    ways = {"--depth": depth is not None, "--latency-ms": latency_ms is not None, "--cascade": cascade}
    given = [name for name, on in ways.items() if on]
    if len(given) > 1:
        raise typer.BadParameter(f"{' and '.join(given)} each say which net answers; give one of them")
    if threshold and not cascade:
        raise typer.BadParameter("--threshold is for --cascade")
    import warnings

    from PIL import Image

    import ddnn
    from ddnn.runtime.cascade import checked

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is an error here
    model = ddnn.load(bundle, threads=threads, shared=shared)
    if latency_ms is not None:
        with _told(as_json, predictions=[]):
            depth = model.within(latency_ms=latency_ms)
    thresholds = None
    if cascade:
        chosen = threshold or model.thresholds()
        thresholds = checked(chosen[0] if len(chosen) == 1 else chosen, list(model.nets.values()))
    else:
        # what is wrong with the depth is wrong for every image
        model.warm(next(reversed(model.nets)) if depth is None else depth)
    found: list[dict[str, Any]] = []
    for path in images:
        try:
            prediction = model.predict(path, depth, top=top, threshold=thresholds)
        except RequestError as error:
            found.append({"image": str(path), "error": str(error)})
            typer.echo(f"error: {error}", err=True)
        else:
            classes = [{"class": name, "confidence": sure} for name, sure in prediction.classes]
            found.append({"image": str(path), "depth": prediction.depth, "classes": classes})
            if not as_json:
                _show(path, prediction)
    if as_json:
        print(json.dumps({"predictions": found}, indent=2))
    if any("error" in each for each in found):
        raise typer.Exit(1)


@contextmanager
def _told(as_json: bool, **nothing: Any) -> Iterator[None]:
    """Where no depth fits, print `nothing` and the reason as JSON, if that is wanted, before it ends in the error."""
    try:
        yield
    except BudgetError as error:
        if as_json:
            print(json.dumps({**nothing, "reason": str(error)}, indent=2))
        raise


def _show(path: Path, prediction: "Prediction") -> None:
    print(f"{path} ({prediction.depth})")
    for name, sure in prediction.classes:
        print(f"  {100 * sure:6.2f} %  {name}")


@app.command()
def profile(
    bundle: Bundle,
    batch: Annotated[list[int] | None, typer.Option(min=1, metavar="N", help="Images per call (default: 1 8).")] = None,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, metavar="N", help="CPUs a call uses (default: 1 and all there are).")
    ] = None,
    shared: Shared = False,
    seconds: Annotated[float, typer.Option(min=0, metavar="S", help="Time for each combination.")] = 10.0,
    as_json: Json = False,
) -> None:
    """Measure latency and memory of every depth on this machine, and keep them with the bundle.

      ddnn profile bundle --batch 1 --batch 32 --threads 1

    Measurements of other combinations are kept. The figure of accuracy against latency needs matplotlib.
    """
    from ddnn.cpus import available_cpus
    from ddnn.runtime import profile as profiles
    from ddnn.runtime.manifest import read

    manifest = read(bundle)
    counts = threads or sorted({1, available_cpus()})
    with watched(quiet=as_json) as watch:
        measured = profiles.measure(bundle, batch or [1, 8], counts, shared=shared, seconds=seconds, watch=watch)
    if as_json:
        print(json.dumps(asdict(measured), indent=2))
    else:
        _print_profile(measured, manifest)
        warn_if_busy(max(row.busy for row in measured.rows))
    folder = profiles.write(measured, manifest)  # last: what was measured is seen even where it can't be kept
    files = [folder / profiles.NAME, *drawn(lambda: _profile_files(measured, manifest, folder), quiet=as_json)]
    if not as_json:
        for path in files:
            print(path)


def warn_if_busy(busy: float) -> None:
    """Say it where other work had the machine while something was measured."""
    from ddnn.runtime.sentences import BUSY

    if busy > BUSY:
        typer.echo(
            f"warning: other work had this machine for {busy:.0%} of the time; measure again when it is idle", err=True
        )


def _profile_files(measured: "Profile", manifest: "Manifest", folder: Path) -> list[Path]:
    from ddnn.runtime.output import write_profile

    if any(net.top1 is None for net in manifest.nets.values()):
        return []
    return write_profile(measured, manifest.nets, folder)


def _print_profile(measured: "Profile", manifest: "Manifest") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ddnn.wording import three

    table = Table(title=escape(str(measured.machine)), title_justify="left")
    table.add_column("depth")
    for heading in ("top-1 %", "batch", "threads", "median ms", "p95 ms", "memory MiB", "at most MiB"):
        table.add_column(heading, justify="right")
    before = None
    for row in measured.rows:
        if before is not None and before != row.condition:
            table.add_section()
        before = row.condition
        top1 = manifest.nets[row.depth].top1
        table.add_row(
            escape(row.depth),
            "-" if top1 is None else f"{100 * top1:.2f}",
            str(row.batch),
            f"{row.threads}{' shared' if row.shared else ''}",
            three(row.p50_ms),
            three(row.p95_ms),
            _whole(row.memory_mb),
            _whole(row.peak_mb),
        )
    Console(width=None if Console().is_terminal else 120).print(table)
    for each in measured.together:
        shared = " with shared weights" if each.shared else ""
        print(
            f"all depths in one process{shared}, batch {each.batch}: {_whole(each.memory_mb)} MiB, "
            f"at most {_whole(each.peak_mb)} MiB"
        )


def _whole(number: float | None) -> str:
    return "-" if number is None else f"{number:.0f}"


@app.command()
def pick(
    bundle: Bundle,
    latency_ms: LatencyMs = None,
    p95: Annotated[bool, typer.Option("--p95", help="Let all but one call in twenty be that quick.")] = False,
    memory_mb: Annotated[
        float | None, typer.Option("--memory-mb", metavar="MB", help="Most MiB of a process with that depth alone.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Images per call.")] = 1,
    threads: Threads = None,
    shared: Shared = False,
    as_json: Json = False,
) -> None:
    """Name the most accurate depth that fits, by what `ddnn profile` measured on this machine.

      ddnn pick bundle --latency-ms 10 --p95

    If none fits it says by how much, and the exit code is 1.
    """
    from ddnn.cpus import available_cpus
    from ddnn.runtime import profile as profiles
    from ddnn.runtime.machine import this_machine
    from ddnn.runtime.manifest import read
    from ddnn.wording import three

    manifest = read(bundle)
    condition = profiles.Condition(batch, threads or available_cpus(), shared)
    rows = profiles.read(manifest, this_machine()).rows_for(condition, manifest.nets, manifest.folder)
    with _told(as_json, depth=None):
        choice = profiles.pick(rows, manifest.nets, latency_ms=latency_ms, memory_mb=memory_mb, p95=p95)
    if as_json:
        print(json.dumps({"top1": choice.top1, **asdict(choice.row)}, indent=2))
        return
    row = choice.row
    latency = f"{three(row.p50_ms)} ms (p95 {three(row.p95_ms)} ms)"
    memory = "" if row.peak_mb is None else f", at most {row.peak_mb:.0f} MiB"
    print(f"{choice.depth}: top-1 {100 * choice.top1:.2f} %, {latency}{memory}; {row.condition}")


def drawn(draw: Callable[[], list[Path]], *, quiet: bool) -> list[Path]:
    """The files of figures, or none and a remark where what draws them is not installed."""
    from ddnn.extras import advice

    try:
        return draw()
    except ModuleNotFoundError as error:
        if (sentence := advice(error)) is None:
            raise
        if not quiet:
            typer.echo(f"no page or figure: {sentence}", err=True)
        return []


@contextmanager
def watched(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Something that shows on a terminal what is going on."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda doing: None
        return
    with console.status("starting") as status:
        yield lambda doing: status.update(escape(doing))
