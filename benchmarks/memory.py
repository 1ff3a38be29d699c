"""What it takes to hold a bundle in memory: one depth, all depths, several processes; with and without shared weights.

    python benchmarks/memory.py BUNDLE [--workers 4]

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
    return {key: sum(line[key] for line in lines) for key in ("Rss", "Pss", "Anonymous")}


def time_ratios(bundle: str, batch: int) -> dict[str, float]:
    """Latency of every depth with shared weights, relative to that without."""
    import ddnn
    from ddnn.runtime.profile import in_turns

    models = {shared: ddnn.load(bundle, threads=1, shared=shared) for shared in (False, True)}
    size = models[True].manifest.input.size
    images = np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)
    ratios = {}
    for name in models[True].depths:
        times = in_turns({str(shared): partial(model, images, name) for shared, model in models.items()}, 4.0)
        ratios[name] = statistics.median(times["True"]) / statistics.median(times["False"])
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--workers", type=int, default=4)
    arguments = parser.parse_args()
    import ddnn

    names = list(ddnn.load(arguments.bundle).depths)
    ddnn.load(arguments.bundle, shared=True)  # makes the copy
    print(f"{'':44} resident  proportional  own")
    for count in (1, arguments.workers):
        nothing = measured(count, None, None, False, False)
        for what, only, cascade in [
            *((f"{name} alone", [name], False) for name in (names[0], names[-1])),
            ("all depths", None, False),
            ("all depths and the cascade", None, True),
        ]:
            for shared in (False, True):
                found = measured(count, arguments.bundle, only, shared, cascade)
                rest = [found[key] - nothing[key] for key in ("Rss", "Pss", "Anonymous")]
                label = f"{count} process{'es' if count > 1 else ''}, {what}{', shared' if shared else ''}"
                print(f"{label:48} {rest[0]:6.0f} {rest[1]:9.0f} {rest[2]:7.0f}")
    for batch in (1, 8):
        ratios = ", ".join(f"{name} {ratio:.3f}" for name, ratio in time_ratios(arguments.bundle, batch).items())
        print(f"time with shared weights, relative to without, batch {batch}: {ratios}")


if __name__ == "__main__":
    main()
