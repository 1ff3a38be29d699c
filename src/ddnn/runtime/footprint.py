"""A process that holds one depth, or all of a bundle, runs a few batches and prints how much memory it has."""

import json
import sys

import numpy as np

from ddnn.memory import peak_mb, resident_mb
from ddnn.runtime.model import load


def main(asked: str) -> None:
    """`asked`: JSON with bundle, depth ("" for all), batch, threads, shared."""
    wanted = json.loads(asked)
    only = [wanted["depth"]] if wanted["depth"] else None
    model = load(wanted["bundle"], only, threads=wanted["threads"], shared=wanted["shared"])
    size = model.manifest.input.size
    images = np.zeros((wanted["batch"], 3, size, size), dtype=np.float32)
    for _ in range(3):
        for depth in model.depths:
            model(images, depth)
    print(json.dumps({"memory_mb": resident_mb(), "peak_mb": peak_mb()}))


if __name__ == "__main__":
    main(sys.argv[1])
