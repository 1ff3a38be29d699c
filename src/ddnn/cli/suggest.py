"""The verb that proposes sub-nets."""

import json
from typing import Annotated

import typer

from ddnn.cli.app import app


@app.command()
def suggest(
    network: Annotated[
        str, typer.Argument(metavar="NETWORK", help="A preset, cifar/resnetN, torchvision/NAME or timm/NAME.")
    ],
    macs: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Wanted shares of the full-net's MACs (default: 0.5,0.7).")
    ] = None,
    latency_ms: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Wanted milliseconds for one image, measured here.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=4, metavar="PX", help="Side of the images (default: 224, of CIFAR networks 32)."),
    ] = None,
    stages: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Names of the stages, such as blocks[0:6],blocks[6:12].")
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to measure latency.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Propose sub-nets of a network for wanted amounts of work or time, and say why.

      ddnn suggest torchvision/resnet101 --macs 0.4,0.6

      ddnn suggest timm/convnext_tiny --latency-ms 20 --size 64

    For every wish, the sub-net whose path parts from the full-net's late, which makes it cheap to train along, and the
    one that keeps the most equal share of every stage.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"--device {device}: choose auto, cpu or cuda")
    shares, latencies = _numbers("--macs", macs), _numbers("--latency-ms", latency_ms)
    if not shares and not latencies:
        shares = [0.5, 0.7]
    import dataclasses

    from ddnn.build import full_name
    from ddnn.device import choose_device
    from ddnn.display import make_console, suggestion_table
    from ddnn.evaluate import latency_conditions
    from ddnn.families import PRESETS, build
    from ddnn.suggest import suggest as propose

    if size is None:
        size = 32 if network.startswith("cifar") else 224
    full_net, _ = build(network, num_classes=1000, image_size=size)
    suggestion = propose(
        full_net,
        full_name(network),
        shares=shares,
        latencies=latencies,
        image_size=size,
        device=choose_device(device),
        stages=None if stages is None else [stage.strip() for stage in stages.split(",")],
    )
    if as_json:
        print(json.dumps(dataclasses.asdict(suggestion), indent=2))
        return
    console = make_console()
    console.print(suggestion_table(suggestion))
    for proposal in suggestion.proposals:
        console.print(f"{proposal.name}, {proposal.wanted}: {proposal.why}", markup=False, highlight=False)
    if latencies:
        console.print(f"latency: {latency_conditions(choose_device(device))}", markup=False)
    named = PRESETS[network].full_net if network in PRESETS else network
    for kind, bound in suggestion.bound.items():
        nets = [p for p in suggestion.proposals if kind in p.kind]
        tables = " ".join(f"network.subnets.{p.name}=[{','.join(map(str, p.depths))}]" for p in nets)
        if nets:
            print(f"{kind}, {bound:.2f} of the MACs of training each alone:")
            print(f"  ddnn train RECIPE network.name={named} {tables}")


def _numbers(option: str, text: str | None) -> list[float]:
    """The positive numbers of a list such as 0.5,0.7."""
    try:
        numbers = [float(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        numbers = [-1.0]
    if any(not 0 < number < float("inf") for number in numbers):
        raise typer.BadParameter(f"{option} {text}: give numbers above 0, such as 0.5,0.7")
    return numbers
