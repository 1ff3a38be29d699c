"""Verbs that make runs and look at them."""

import json
import re
import time
from pathlib import Path
from typing import Annotated

import typer

from ddnn.cli.app import app
from ddnn.errors import DDNNError, Preempted
from ddnn.wording import resuming


@app.command()
def train(
    recipe_and_overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE]...",
            help="A shipped recipe's name or a TOML file (default: digits), then overrides such as optim.lr=0.1.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="The same as a KEY=VALUE argument.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="RUN", help="Run folder to make (default: runs/RECIPE-DATE-TIME)."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with the run in this folder; takes no recipe.")
    ] = None,
) -> None:
    """Train a DDNN and all its sub-nets, and end with a table of them.

    Without arguments: three nested networks on the embedded digits, in about a minute.

      ddnn train cifar100-resnet8-14-20 --out runs/first

      ddnn train my.toml data.source=photos/ train.epochs=30

      ddnn train --resume runs/first

    The full-net by itself for half of the epochs; its sub-nets then join it:

      ddnn train my.toml train.full_net_share=0.5

    With several processes, on one host or many (--out is needed; the same command again goes on where it was):

      torchrun --nproc-per-node 2 -m ddnn train cifar100-resnet8-14-20 --out runs/first
    """
    named, changes = _split(recipe_and_overrides, overrides)
    if resume is not None and (named or changes or out is not None):
        raise typer.BadParameter(
            "--resume goes on with the recipe in the run folder; give no recipe, KEY=VALUE or --out"
        )
    from ddnn import launch as processes
    from ddnn import recipe as recipes

    name = named[0] if named else "digits"
    chosen = None if resume else recipes.load(name, changes)  # mistakes show before the libraries are loaded
    launched, first = processes.launched(), processes.rank() == 0
    if launched and resume is None and out is None:
        raise typer.BadParameter("several processes need one run folder, and find it again after a fault: give --out")

    from ddnn.build import check
    from ddnn.checkpoint import RunFolder
    from ddnn.display import Display, make_console, subnet_table
    from ddnn.trainer import Silent
    from ddnn.trainer import train as train_run

    console = make_console()
    if chosen is None:
        assert resume is not None
        run = RunFolder.open(resume)
    else:
        check(chosen)  # before there is a folder
        if chosen.network.alone is not None:
            chosen = recipes.by_itself(chosen)
        folder = out or Path("runs") / f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        create = RunFolder.create_or_open if launched else RunFolder.create
        run = create(folder, chosen) if first else RunFolder(folder, chosen)  # made by the first, perhaps elsewhere
    if not first:
        train_run(run, Silent())
        return
    console.print(f"run folder: {run.path}", markup=False)
    try:
        with Display(console) as display:
            summary = train_run(run, display)
    except KeyboardInterrupt:
        make_console(stderr=True).print(f"stopped; go on with: {resuming(run.path)}", markup=False)
        raise typer.Exit(130) from None
    except DDNNError as error:
        # a run that can go on is no mistake, and others may be in the folder of several processes
        if chosen is not None and not launched and not isinstance(error, Preempted):
            run.remove_unbegun()
        raise
    cost = summary["step_cost"]
    console.print(subnet_table(summary["subnets"], "test set, last epoch", summary["latency"]))
    if cost is not None and cost["measured"] is not None:
        console.print(
            f"a joint step took {cost['measured']:.2f} of the time of training every net alone "
            f"(least possible by MACs: {cost['bound']:.2f})"
        )
    console.print(f"run folder: {run.path}", markup=False)


def _split(arguments: list[str] | None, overrides: list[str] | None) -> tuple[list[str], list[str]]:
    """The recipe's name, if one was given, and the overrides."""
    named = [argument for argument in arguments or [] if "=" not in argument]
    if len(named) > 1:
        raise typer.BadParameter(f"one recipe at a time, not {len(named)}: {', '.join(named)}")
    return named, [argument for argument in arguments or [] if "=" in argument] + list(overrides or [])


@app.command()
def compare(
    recipe_and_overrides: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE [KEY=VALUE]...", help="The recipe all methods share.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder of the comparison; calling again goes on.")
    ],
    methods: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Only these of the methods above (default: all that differ).")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Trainings of each, with N seeds.")] = 3,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Trainings at a time (default: 1; with Ray, as many as there is room for)."
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(metavar="local|ray", help="Processes of this machine, or tasks of a Ray cluster (docs/many.md)."),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            metavar="auto|HOST:PORT",
            help="With --engine ray: the cluster; auto is the one this host is in (default: one on this machine).",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="The same as a KEY=VALUE argument.")
    ] = None,
) -> None:
    """Compare DDNN-EKD with its rivals: the same recipe, the same data order, several seeds.

    Methods: ekd, alone (each depth by itself), joint (shared weights,
    cross-entropy only), kl and attention (one term of the two), two-model-kd
    (each depth with a separately trained full-net as teacher), ekd-pretrained
    (all nets start from the full-net of alone and are taught by it as it was),
    adaptive-depth (sub-nets learn from the full-net's posteriors only). Nets
    alone have the share of the epochs that train.alone_share gives them. The
    test set is used once per training, after its last epoch.

      ddnn compare cifar100-resnet8-14-20 --seeds 3 --out runs/fair

    Kill it whenever you like; the same command goes on where it was. `ddnn report FOLDER` shows the result.
    """
    named, changes = _split(recipe_and_overrides, overrides)
    if not named:
        raise typer.BadParameter("give a recipe: a shipped one (`ddnn recipes`) or a TOML file")
    if engine not in ("local", "ray"):
        raise typer.BadParameter(f"--engine {engine}: choose local or ray")
    if address is not None and engine != "ray":
        raise typer.BadParameter(f"--address {address} needs --engine ray")
    if address is not None and address != "auto" and not re.fullmatch(r"[^\s:/]+:\d+", address):
        raise typer.BadParameter(f"--address {address}: give auto or HOST:PORT, on a host that is in the cluster")
    from ddnn import recipe as recipes

    chosen = recipes.load(named[0], changes)
    from ddnn.compare import Engine, Local
    from ddnn.compare import compare as run_comparison
    from ddnn.display import ComparisonDisplay, make_console

    if engine == "ray":
        from ddnn.compare.over_ray import OverRay

        runs_on: Engine = OverRay(address, workers)
    else:
        runs_on = Local(workers or 1)
    console = make_console()
    wanted = None if methods is None else [method.strip() for method in methods.split(",")]
    try:
        with ComparisonDisplay(console) as display:
            result = run_comparison(
                out, chosen, wanted, seeds, display, name=" ".join([Path(named[0]).stem, *changes]), engine=runs_on
            )
    except KeyboardInterrupt:
        make_console(stderr=True).print("stopped; the same command goes on where it was", markup=False)
        raise typer.Exit(130) from None
    console.print(f"{result}\nshow it with: ddnn report {out}", markup=False, highlight=False)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Folders of comparisons.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Where to write (default: the first FOLDER).")
    ] = None,
) -> None:
    """Turn comparisons into a Markdown table, a self-contained HTML page and figures."""
    from ddnn.report import write

    for path in write(folders, out or folders[0]):
        print(path)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    source: Annotated[
        str | None, typer.Option("--data", metavar="SOURCE", help="Another data set with the same classes.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to evaluate.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Measure every sub-net of a run on a test set: top-1, top-5, parameters, MACs, latency."""
    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"--device {device}: choose auto, cpu or cuda")
    from ddnn.checkpoint import RunFolder
    from ddnn.device import choose_device
    from ddnn.display import make_console, subnet_table
    from ddnn.trained import evaluate_run

    measured = evaluate_run(RunFolder.open(run), source, choose_device(device))
    if as_json:
        print(json.dumps(measured, indent=2))
    else:
        images = measured["dataset"]
        title = f"{images['source']}, {images['test_images']} test images"
        make_console().print(subnet_table(measured["subnets"], title, measured["latency"]))


@app.command()
def extract(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    subnet: Annotated[str, typer.Argument(metavar="SUBNET", help="Name of the sub-net, as in the run's table.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Safetensors file to write.")],
) -> None:
    """Take one sub-net out as an ordinary network's weights (safetensors, the library's own names)."""
    from ddnn.checkpoint import RunFolder
    from ddnn.trained import extract as extract_subnet

    extract_subnet(RunFolder.open(run), subnet, out)
    print(f"{subnet} -> {out}")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Print this recipe's file.")] = None,
    presets: Annotated[bool, typer.Option(help="List the networks a recipe can name instead.")] = False,
    settings: Annotated[
        bool, typer.Option(help="List every setting, with default, range and meaning instead.")
    ] = False,
) -> None:
    """List the recipes that come with ddnn."""
    from ddnn import recipe

    if settings:
        from ddnn.settings import reference

        print(reference(), end="")
        return
    shipped = recipe.shipped()
    if presets:
        from ddnn.families import PRESETS

        for preset, nets in PRESETS.items():
            table = ", ".join(f"{net} {depths}" for net, depths in nets.depths.items())
            print(f"{preset:28} {table}")
        print(
            "\nfull-nets, for your own network.subnets: cifar/resnetN, torchvision/NAME, timm/NAME (ddnn suggest NAME)"
        )
    elif name is None:
        for each, text in shipped.items():
            print(f"{each:28} {text.splitlines()[0].removeprefix('# ')}")
    elif name in shipped:
        print(shipped[name], end="")
    else:
        raise DDNNError(f"no recipe {name!r}; there are: {', '.join(shipped)}")
