"""What a service answers in time as load grows: a depth chosen by what waits, against every depth alone.

    python benchmarks/serving.py BUNDLE --run RUN                       # a table; the run's test images
    python benchmarks/serving.py BUNDLE --data held-out/ --json --figure results/serving

Images come at random moments (a Poisson process), whether earlier ones are answered or not. Load 1 is what the most
accurate depth can do at best, in full batches. "Alone" is the same service with one depth loaded, which refuses what
it has no time for as well. All of them take turns at each load. One CPU runs the nets and another sends images, so let
nothing else run on two.

right      of all images sent, those answered in time and right
answered   of all images sent, those answered
late       of those answered, those not in time
p95_ms     that all but one in twenty answers took at most
depths     of those answered, by each depth
"""

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import ddnn
from ddnn.errors import OverloadError
from ddnn.figure import SETTINGS, new_figure
from ddnn.runtime import Answer, Model, heldout
from ddnn.runtime.heldout import HeldOut
from ddnn.runtime.machine import this_machine
from ddnn.runtime.pixels import normalised
from ddnn.runtime.service import ladder, measured

LOADS = (0.5, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
CHOSEN = "chosen by load"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--run", type=Path, help="the run the bundle comes from")
    images.add_argument("--data", type=Path, help="class folders, or .npz with images and labels")
    parser.add_argument("--latency-ms", type=float, default=50.0, help="in which an image is to be answered")
    parser.add_argument("--batch", type=int, default=8, help="most images that run together")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each depth at each load")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--figure", type=Path, metavar="FOLDER", help="draw serving.png and .svg there")
    arguments = parser.parse_args()
    model = ddnn.load(arguments.bundle, threads=1)
    if arguments.run:
        from ddnn.cli.run_images import test_and_validation

        held = test_and_validation(arguments.run, model.manifest, 4000)[1]
    else:
        held = heldout.read(arguments.data, model.manifest, 2000)
    found = measure(model, held, arguments.latency_ms, arguments.batch, arguments.seconds)
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        Console(width=120).print(table(found))
    if arguments.figure:
        draw(found, arguments.figure)


def measure(whole: Model, held: HeldOut, latency_ms: float, batch: int, seconds: float) -> dict[str, Any]:
    """What every way of serving makes of every load."""
    bundle = whole.manifest.folder
    models = {CHOSEN: whole} | {name: ddnn.load(bundle, [name], threads=1) for name in whole.nets}
    seconds_of = measured(whole, batch)
    capacity = batch / seconds_of[ladder(whole, seconds_of)[0]][batch]
    images = normalised(held.pixels, whole.manifest.input)
    rows = []
    gc.freeze()  # or it looks through all of torch now and then, for a quarter of a second
    for number, load in enumerate(LOADS):
        for way, model in models.items():
            with ddnn.Service(model, latency_ms, batch=batch, workers=1) as service:
                rows.append(
                    {"way": way, "load": load, **sent(service, images, held.labels, load * capacity, seconds, number)}
                )
    return {
        "machine": asdict(this_machine()),
        "bundle": {name: {"top1": net.top1, "macs": net.macs} for name, net in whole.nets.items()},
        "latency_ms": latency_ms,
        "batch": batch,
        "images_per_second_at_load_1": capacity,
        "rows": rows,
    }


def sent(
    service: ddnn.Service, images: np.ndarray, labels: np.ndarray, rate: float, seconds: float, seed: int
) -> dict[str, Any]:
    """Send so many images a second, and see what becomes of them."""
    random = np.random.default_rng(seed)
    moments = np.cumsum(random.exponential(1 / rate, size=int(rate * seconds)))
    answers: list[tuple[int, Future[Answer]]] = []
    start = time.monotonic()
    for number, moment in enumerate(moments):
        if (ahead := start + moment - time.monotonic()) > 0:
            time.sleep(ahead)
        which = number % len(images)
        with contextlib.suppress(OverloadError):
            answers.append((which, service.submit(images[which], arrived=start + moment)))
    done = [(which, future.result()) for which, future in answers]
    if not done:
        sys.exit(f"error: not one of {len(moments)} images was answered at {rate:.0f} images a second")
    in_time = [(which, answer) for which, answer in done if answer.latency_ms <= service.latency_ms]
    depths = Counter(answer.depth for _, answer in done)
    return {
        "sent": len(moments),
        "right": sum(int(answer.logits.argmax()) == labels[which] for which, answer in in_time) / len(moments),
        "answered": len(done) / len(moments),
        "late": 1 - len(in_time) / len(done),
        "p50_ms": statistics.median(answer.latency_ms for _, answer in done),
        "p95_ms": float(np.percentile([answer.latency_ms for _, answer in done], 95)),
        "depths": {name: depths[name] / len(done) for name in service.model.nets},
    }


def table(found: dict[str, Any]) -> Table:
    """A row per load and way."""
    shown = Table(
        title=f"in {found['latency_ms']:g} ms; load 1 is {found['images_per_second_at_load_1']:.0f} images a second"
    )
    for heading in ("load", "depth", "right %", "answered %", "late %", "p50 ms", "p95 ms", "by each depth, %"):
        shown.add_column(heading, justify="left" if heading == "depth" else "right")
    before = None
    for row in found["rows"]:
        if before not in (None, row["load"]):
            shown.add_section()
        before = row["load"]
        shares = (100 * row[key] for key in ("right", "answered", "late"))
        depths = " ".join(f"{100 * share:.0f}" for share in row["depths"].values()) if row["way"] == CHOSEN else ""
        shown.add_row(
            f"{row['load']:g}",
            row["way"],
            *(f"{share:.1f}" for share in shares),
            f"{row['p50_ms']:.1f}",
            f"{row['p95_ms']:.1f}",
            depths,
        )
    return shown


def draw(found: dict[str, Any], out: Path) -> None:
    """Right answers in time against load."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        figure = new_figure(6.4, 4)
        axes = figure.subplots()
        looks = [("black", "-", "o"), ("#0072B2", "--", "s"), ("#009E73", ":", "^"), ("#D55E00", "-.", "D")]
        for i, way in enumerate(dict.fromkeys(row["way"] for row in found["rows"])):
            rows = [row for row in found["rows"] if row["way"] == way]
            colour, dash, marker = looks[i % len(looks)]
            label = way if way == CHOSEN else f"{way} alone"
            right = [100 * row["right"] for row in rows]
            axes.plot(
                [row["load"] for row in rows], right, dash, color=colour, marker=marker, markersize=4, label=label
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        best = max(found["bundle"], key=lambda name: found["bundle"][name]["top1"] or 0)
        axes.set_xlabel(f"images that come ÷ images that {best} can do")
        axes.set_ylabel(f"answered in {found['latency_ms']:g} ms and right, % of all")
        axes.legend()
        out.mkdir(parents=True, exist_ok=True)
        for ending in ("png", "svg"):
            figure.savefig(out / f"serving.{ending}", dpi=150)


if __name__ == "__main__":
    main()
