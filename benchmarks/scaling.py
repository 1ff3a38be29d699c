"""ImageNet on 1, 8 and 64 GPUs, on paper: compute, memory, network, data and storage, and what limits each.

    python benchmarks/scaling.py                          # the tables of docs/scaling.md
    python benchmarks/scaling.py --hardware a100 --decoded 700 --images 128
    python benchmarks/scaling.py --count                  # count the networks again (results/scaling/networks.json)
    python benchmarks/scaling.py --write                  # put the tables into docs/scaling.md
    python benchmarks/scaling.py --decoding               # images per second that a core of this machine decodes

The networks are counted on the CPU: MACs, gradients in the order of backward, tensors held for backward, bytes that
operators read and write. What GPUs and networks do is assumed (`cluster.py`), and every assumption is an option.
"""

import argparse
import dataclasses
import io
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from cluster import (
    HARDWARE,
    IMAGES,
    Facts,
    Hardware,
    best_interval,
    checkpoint,
    limits,
    lost,
    memory,
    ring,
    simulate_failures,
    step,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ddnn.branchwise import branchwise_backward
from ddnn.evaluate import macs, parameters
from ddnn.families import build
from ddnn.network import DDNN, nest
from ddnn.objective import EKD

ROOT = Path(__file__).parents[1]
COUNTED = ROOT / "results" / "scaling" / "networks.json"
PAGE = ROOT / "docs" / "scaling.md"
PRESETS = ("resnet18-34", "resnet18-34-50-basic", "resnet26-50", "resnet50-101", "resnet50-101-152")
GPUS = (1, 8, 64)
SIZE, SMALL, CLASSES = 224, 64, 1000


# -- counting ----------------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write, each tensor once; those that only look otherwise at one are free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operators = self.norms = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
            self.operators += 1
            self.norms += "batch_norm" in func.__name__ and "backward" not in func.__name__
        return result


class Held:
    """The most bytes that are held for backward at one time, the parameters themselves not among them."""

    def __init__(self, net: DDNN) -> None:
        self._free = {p.untyped_storage().data_ptr() for p in [*net.parameters(), *net.buffers()]}
        self._counts: dict[int, int] = {}
        self._now = self.peak = 0

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        held = self

        class Kept:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor, storage = tensor, tensor.untyped_storage()
                self.at, self.size = storage.data_ptr(), storage.nbytes()
                held._counts[self.at] = held._counts.get(self.at, 0) + 1
                if self.at not in held._free and held._counts[self.at] == 1:
                    held._now += self.size
                    held.peak = max(held.peak, held._now)

            def __del__(self) -> None:
                held._counts[self.at] -= 1
                if self.at not in held._free and held._counts[self.at] == 0:
                    held._now -= self.size

        return torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


Forward = Callable[[], AbstractContextManager[object]]


def plain(net: DDNN, x: Tensor, target: Tensor, forward: Forward = autocast) -> None:
    with forward():
        outputs = net(x, energies=True)
    torch.stack(list(EKD()(outputs, target).values())).sum().backward()


def lean(net: DDNN, x: Tensor, target: Tensor, forward: Forward = autocast) -> None:
    branchwise_backward(net, EKD(), x, target, autocast=forward)


def count(preset: str, alone: str | None = None, small: int = SMALL) -> Facts:
    """Count a preset's networks, or one of them: with images of `small` px, scaled up to 224 by pixels."""
    torch.manual_seed(0)
    full_net, table = build(preset, CLASSES, image_size=SIZE)
    net = nest(full_net, table).train()
    net = net if alone is None else net.alone(alone)
    scale = (SIZE / small) ** 2

    def per_image(of: Callable[[int], float]) -> float:
        """What two images more add, halved: what is there once for all images is left out."""
        return (of(4) - of(2)) / 2 * scale

    def batch(images: int) -> tuple[Tensor, Tensor]:
        net.zero_grad()
        return torch.randn(images, 3, small, small), torch.arange(images)

    def held(go: Callable[[DDNN, Tensor, Tensor, Forward], None], images: int) -> float:
        x, target = batch(images)
        found = Held(net)

        @contextmanager
        def forward() -> Iterator[None]:
            with autocast(), found.hooks():  # within the step's own hooks, which would hide it
                yield

        with found.hooks():
            go(net, x, target, forward)
        return found.peak

    def traffic(images: int) -> Traffic:
        x, target = batch(images)
        with Traffic() as found:
            plain(net, x, target)
        return found

    few, more = traffic(2), traffic(4)
    return Facts(
        name=alone or preset,
        tree_macs=macs(net, SIZE),
        full_macs=macs(net.nets[net.full_name], SIZE),
        parameters=parameters(net),
        buffers=sum(b.numel() * b.element_size() for b in net.buffers()),
        saved=round(per_image(lambda images: held(plain, images))),
        saved_lean=round(per_image(lambda images: held(lean, images))),
        traffic=round((more.bytes - few.bytes) / 2 * scale),
        operators=few.operators,
        norms=few.norms,
        ready=gradients(net, *batch(2)),
    )


def gradients(net: DDNN, x: Tensor, target: Tensor) -> list[tuple[float, int]]:
    """Of each parameter, in the order of backward: share of its operations done when it is complete, bytes."""
    with autocast():
        outputs = net(x, energies=True)
    loss = torch.stack(list(EKD()(outputs, target).values())).sum()
    arrived: list[tuple[int, int]] = []
    with FlopCounterMode(display=False) as counter:
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: arrived.append((counter.get_total_flops(), 4 * p.numel())))
            for p in net.parameters()
        ]
        loss.backward()
        whole = counter.get_total_flops()
    for hook in hooks:
        hook.remove()
    return [(round(done / whole, 4), size) for done, size in arrived]


def decoding(seconds: float = 3.0) -> float:
    """Images per second that one core turns from a JPEG of 500 x 375 px and about 110 kB into a crop of 224 px."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 60, 80, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(375, 500), mode="bicubic")[0]
    noisy = (255 * (smooth + 0.1 * torch.randn(3, 375, 500, generator=generator))).clamp(0, 255).byte()
    image = Image.fromarray(noisy.permute(1, 2, 0).numpy())
    file = min((jpeg(image, quality) for quality in range(50, 96, 5)), key=lambda content: abs(len(content) - 110e3))
    images, begin = 0, time.process_time()
    while time.process_time() - begin < seconds:
        Image.open(io.BytesIO(file)).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR, (50, 20, 400, 340))
        images += 1
    return images / (time.process_time() - begin)


def jpeg(image: Any, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


# -- tables ------------------------------------------------------------------------------------------------------------


def table(rows: list[list[str]]) -> str:
    head, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rest])


def networks(all_facts: list[Facts], images: int, hardware: Hardware) -> str:
    rows = [
        [
            "networks", "MACs of the tree", "parameters", "gradients", "held per image, plain / lean",
            f"memory at {images} images, plain / lean", "largest batch, plain / lean", "checkpoint",
        ]
    ]  # fmt: skip
    for f in all_facts:
        fits = [math.floor((hardware.memory - memory(f, 0)) / held) for held in (f.saved, f.saved_lean)]
        needs = [memory(f, images, lean) for lean in (False, True)]
        rows.append(
            [
                f.name,
                f"{f.tree_macs / 1e9:.2f} G",
                f"{f.parameters / 1e6:.1f} M",
                f"{4 * f.parameters / 1e6:.0f} MB",
                f"{f.saved / 1e6:.0f} / {f.saved_lean / 1e6:.0f} MB",
                f"{needs[0] / 1e9:.1f} / {needs[1] / 1e9:.1f} GB",
                f"{fits[0]} / {fits[1]}",
                f"{checkpoint(f) / 1e6:.0f} MB",
            ]
        )
    return table(rows)


def speeds(all_facts: list[Facts], images: int, hardware: Hardware) -> str:
    rows = [
        [
            "networks", "GPUs", "images a step", "GPU ms a step", "reduction ms (not hidden)", "synchronised norms ms",
            "GPUs could do", "cores for that (there are)", "reading for that", "images/s left", "90 epochs",
            "limited by, then by",
        ]
    ]  # fmt: skip
    for f in all_facts:
        for gpus in GPUS:
            one = step(f, gpus, images, hardware)
            could = gpus * images / one.total
            tightest, speed = limits(f, gpus, images, hardware)
            rows.append(
                [
                    f.name,
                    str(gpus),
                    str(gpus * images),
                    f"{1e3 * one.busy:.1f}",
                    f"{1e3 * one.network:.1f} ({1e3 * one.exposed:.1f})",
                    f"{2e3 * f.norms * hardware.small_reduce:.1f}" if gpus > 1 else "0",
                    f"{could:,.0f}/s",
                    f"{could / hardware.decoded:.0f} ({gpus * hardware.cores_per_gpu:.0f})",
                    f"{could * hardware.jpeg / 1e6:,.0f} MB/s",
                    f"{speed:,.0f}",
                    f"{90 * IMAGES / speed / 3600:.1f} h",
                    ", ".join(tightest[:2]),
                ]
            )
    return table(rows)


def failures(all_facts: list[Facts], hardware: Hardware) -> str:
    rows = [
        [
            "networks",
            "GPUs",
            "a failure every",
            "checkpoint takes",
            "best interval",
            "lost then",
            "lost at 5 minutes",
            "simulated",
        ]
    ]
    for f in all_facts:
        cost = checkpoint(f) / hardware.saving
        for gpus in GPUS:
            mtbf = hardware.mtbf / gpus
            best = best_interval(cost, mtbf)
            given = (cost, mtbf, hardware.restart)
            rows.append(
                [
                    f.name,
                    str(gpus),
                    f"{mtbf / 86400:,.0f} days",
                    f"{cost:.2f} s",
                    f"{best / 60:.0f} min",
                    f"{lost(best, *given):.3%}",
                    f"{lost(300.0, *given):.3%}",
                    f"{simulate_failures(300.0, *given):.3%}",
                ]
            )
    return table(rows)


def check(all_facts: list[Facts]) -> str:
    """The same arithmetic for what was published: ResNet-50 alone on one A100."""
    facts = next(f for f in all_facts if f.name == "resnet50")
    one = step(facts, 1, 256, HARDWARE["a100"])
    return table(
        [
            ["ResNet-50 alone, one A100, batch 256", "images/s"],
            ["compute alone would allow", f"{256 / one.compute:,.0f}"],
            ["GPU memory bandwidth alone would allow", f"{256 / one.traffic:,.0f}"],
            ["one after the other, as here", f"{256 / one.total:,.0f}"],
            ["published", "2,470"],
        ]
    )


def assumptions(hardware: Hardware) -> str:
    return table([["option", "value"], *([f"`--{k.replace('_', '-')}`", f"{v:g}" if isinstance(v, float) else str(v)]
                  for k, v in dataclasses.asdict(hardware).items() if k != "name")])  # fmt: skip


def parts(images: int, hardware: Hardware) -> dict[str, str]:
    """The tables by name."""
    every = [Facts(**{**f, "ready": [tuple(r) for r in f["ready"]]}) for f in json.loads(COUNTED.read_text())]
    ddnns = [f for f in every if f.name in PRESETS]
    return {
        "networks": networks(ddnns, images, hardware),
        "speeds": speeds(ddnns, images, hardware),
        "failures": failures(ddnns, hardware),
        "check": check(every),
        "assumptions": assumptions(hardware),
    }


def written(page: str, found: dict[str, str]) -> str:
    """The page with the tables between their marks."""
    for name, text in found.items():
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, t=text: f"{m[1]}{t}\n{m[2]}", page, flags=re.S
        )
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", choices=HARDWARE, default="h100")
    parser.add_argument("--images", type=int, default=64, help="per GPU and step (default: 64)")
    for name in ("count", "write", "decoding"):
        parser.add_argument(f"--{name}", action="store_true")
    fields = [f.name for f in dataclasses.fields(Hardware) if f.name != "name"]
    for name in fields:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int if name == "gpus_per_host" else float)
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in fields if getattr(arguments, name) is not None}
    hardware = dataclasses.replace(HARDWARE[arguments.hardware], **given)
    if arguments.decoding:
        torch.set_num_threads(1)
        print(f"{decoding():.0f} images/s")
        return
    if arguments.count:
        COUNTED.parent.mkdir(parents=True, exist_ok=True)
        counted = [dataclasses.asdict(f) for f in [*map(count, PRESETS), count("resnet26-50", "resnet50")]]
        COUNTED.write_text(json.dumps(counted) + "\n")
    found = parts(arguments.images, hardware)
    if arguments.write:
        PAGE.write_text(written(PAGE.read_text(), found))
    else:
        for name, text in found.items():
            print(f"\n{name}\n{text}")
    print(f"\none all-reduce of 100 MB: {', '.join(f'{n} GPUs {1e3 * ring(1e8, n, hardware):.1f} ms' for n in GPUS)}")


if __name__ == "__main__":
    main()
