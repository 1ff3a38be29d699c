"""What it takes to hold a bundle in memory: one depth, all depths, several processes; with and without shared weights.

    python benchmarks/memory.py BUNDLE [--workers 4] [--json]

Every line is a set of processes that have loaded their depths, run a batch each, and live at the same time. `resident`
counts a page in every process that has it, `proportional` (PSS) divides it among them; both are sums over the
processes, in MiB, less what a process with numpy, onnxruntime and Pillow alone takes. `own` is what can neither be
shared nor dropped (anonymous memory). Linux only.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from functools import partial

import numpy as np

WORKER = """
import json, sys
import numpy, onnxruntime, PIL.Image

def memory():
    lines = (line.split() for line in open("/proc/self/smaps_rollup"))
    return {line[0][:-1]: int(line[1]) / 1024 for line in lines if len(line) == 3 and line[2] == "kB"}

bundle, only, shared, cascade = json.loads(sys.argv[1])
if bundle:
    import ddnn
    model = ddnn.load(bundle, only, threads=1, shared=shared)
    model.warm(*model.depths)
    if cascade:
        model.warm(threshold=1.5)
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps(memory()), flush=True)
sys.stdin.readline()
"""


COLUMNS = {"resident": "Rss", "proportional": "Pss", "own": "Anonymous"}
"""What is printed, and what the system calls it."""


def measured(count: int, *asked: object) -> dict[str, float]:
    """Sums over `count` processes that all live."""
    command = [sys.executable, "-c", WORKER, json.dumps(asked)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    lines = []
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:  # all are ready, so what they share is shared
        assert worker.stdin is not None
        assert worker.stdout is not None
        print(file=worker.stdin, flush=True)
        lines.append(json.loads(worker.stdout.readline()))
    for worker in workers:
        worker.communicate("\n")
    return {key: sum(line[key] for line in lines) for key in COLUMNS.values()}


def time_ratios(bundle: str, batch: int) -> dict[str, float]:
    """Latency of every depth with shared weights, relative to that without."""
    import ddnn
    from ddnn.runtime.profile import FEWEST_RUNS, MOST_RUNS
    from ddnn.timing import in_turns

    models = {shared: ddnn.load(bundle, threads=1, shared=shared) for shared in (False, True)}
    size = models[True].manifest.input.size
    images = np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)
    ratios = {}
    for name in models[True].depths:
        calls = {shared: partial(model, images, name) for shared, model in models.items()}
        times = in_turns(calls, seconds=4.0, fewest=FEWEST_RUNS, most=MOST_RUNS)
        ratios[name] = statistics.median(times[True]) / statistics.median(times[False])
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args()
    import ddnn
    from ddnn.runtime.machine import this_machine

    names = list(ddnn.load(arguments.bundle).depths)
    ddnn.load(arguments.bundle, shared=True)  # makes the copy
    lines = {}
    for count in (1, arguments.workers):
        nothing = measured(count, None, None, False, False)
        for what, only, cascade in [
            *((f"{name} alone", [name], False) for name in (names[0], names[-1])),
            ("all depths", None, False),
            ("all depths and the cascade", None, True),
        ]:
            for shared in (False, True):
                found = measured(count, arguments.bundle, only, shared, cascade)
                label = f"{count} process{'es' if count > 1 else ''}, {what}{', shared' if shared else ''}"
                lines[label] = {key: round(found[kept] - nothing[kept], 1) for key, kept in COLUMNS.items()}
    shared_time = {f"batch {batch}": time_ratios(arguments.bundle, batch) for batch in (1, 8)}
    if arguments.json:
        print(json.dumps({"mib": lines, "shared_time": shared_time, "machine": asdict(this_machine())}, indent=2))
        return
    print(f"{'MiB':48}" + "".join(f"{key:>14}" for key in COLUMNS))
    for label, row in lines.items():
        print(f"{label:48}" + "".join(f"{value:14.0f}" for value in row.values()))
    for batch, ratios in shared_time.items():
        said = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
        print(f"time with shared weights, relative to without, {batch}: {said}")


if __name__ == "__main__":
    main()
