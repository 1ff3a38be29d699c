"""The verb that serves a bundle over HTTP."""

from typing import Annotated

import typer

from ddnn.cli.app import app
from ddnn.cli.device import Bundle, Shared
from ddnn.errors import BudgetError
from ddnn.wording import three


@app.command()
def serve(
    bundle: Bundle,
    latency_ms: Annotated[
        float,
        typer.Option("--latency-ms", metavar="MS", help="Answer an image in that time, decoding it included."),
    ],
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Listen at this address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="And at this port; 0: any.")] = 8000,
    batch: Annotated[int, typer.Option(min=1, max=1024, metavar="N", help="Most images that run together.")] = 8,
    threads: Annotated[int, typer.Option(min=1, metavar="N", help="CPUs one batch uses.")] = 1,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=256, metavar="N", help="Batches that run at a time (default: as CPUs allow)."),
    ] = None,
    shared: Shared = False,
) -> None:
    """Answer images over HTTP, each in time: the deeper, the less waits.

      ddnn serve bundle --latency-ms 50

      curl --data-binary @photo.jpg http://127.0.0.1:8000/predict

    What no depth could answer in time is refused with 503. GET / says how many each depth has answered.
    """
    import ddnn
    from ddnn.runtime.server import listen
    from ddnn.runtime.server import serve as serve_at

    def ready(address: str) -> None:
        typer.echo(f"POST an image to {address}/predict; Ctrl-C ends it", err=True)

    with listen(host, port) as listening:
        model = ddnn.load(bundle, threads=threads, shared=shared)
        with ddnn.Service(model, latency_ms, batch=batch, workers=workers) as service:
            takes = service.takes()
            typer.echo("one image takes " + ", ".join(f"{name} {three(ms)} ms" for name, ms in takes.items()), err=True)
            if min(takes.values()) > latency_ms:
                raise BudgetError(
                    f"no depth can answer in {latency_ms:g} ms, even without decoding; give a longer time"
                )
            serve_at(service, listening, ready)
    counts = service.counts()
    answered = ", ".join(f"{name} {count}" for name, count in counts.answered.items())
    typer.echo(
        f"answered by {answered}; {counts.late} late, {counts.refused} refused, {counts.failed} failed", err=True
    )
