"""The table of families in docs/families.md: what each preset shares, what a joint step costs, and parity.

    python benchmarks/families.py            # check the table that is there, a few minutes
    python benchmarks/families.py --write    # write it anew

For every preset: the full-net is made with fresh weights, its sub-nets are nested in it, and every net is compared,
bitwise, with the library's own network of that name or depth, loaded strictly from the net's state dict.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddnn.evaluate import parameters, tree_bound
from ddnn.families import EXAMPLES, PRESETS, build, family_of
from ddnn.families.cifar_resnet import resnet as cifar_resnet
from ddnn.families.discover import ghost
from ddnn.families.presets import Preset
from ddnn.families.torchvision_resnet import resnet as torchvision_resnet
from ddnn.network import DDNN, nest

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- families: python benchmarks/families.py --write -->", "<!-- end of families -->"
HEADER = [
    "| preset or full-net | family | nets, blocks per stage | shared | beyond the full-net | tree bound | parity |",
    "|---|---|---|---|---|---|---|",
]
ALL: dict[str, Preset] = {**PRESETS, **EXAMPLES}


class Undrawn(TorchDispatchMode):
    """Networks made here have zeros for random weights, which take longer than all else: they are loaded or counted."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return args[0].zero_() if func in DRAWN else func(*args, **(kwargs or {}))


DRAWN = {torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default}


def lived(net: nn.Module) -> nn.Module:
    """With norms, statistics and scales as after some training, so that a mix-up of private ones can't go unseen."""
    for parameter in net.parameters():
        if parameter.numel() == max(parameter.shape, default=1):
            nn.init.uniform_(parameter, 0.5, 1.5)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


def library_net(full_net: str, name: str, depths: tuple[int, ...], size: int, classes: int) -> nn.Module | None:
    """The library's own network of that name, or of these depths; None where it has no way to make one."""
    library, _, full = full_net.partition("/")
    if library == "cifar":
        return cifar_resnet(int(name.removeprefix("resnet")), num_classes=classes)
    if library == "torchvision":
        if name in ("resnet26", "resnet50_basic"):
            return torchvision_resnet(name, num_classes=classes)
        if full.startswith("vit_b"):
            return torchvision.models.VisionTransformer(size, 16, depths[0], 12, 768, 3072, num_classes=classes)
        return torchvision.models.get_model(name, num_classes=classes) if hasattr(torchvision.models, name) else None
    sized = {"img_size": size} if timm.get_pretrained_cfg(full).fixed_input_size else {}
    if "vit_tiny" in full or "deit_tiny" in full:
        return timm.create_model(full, num_classes=classes, depth=depths[0], **sized)
    return timm.create_model(name, num_classes=classes, **sized) if timm.is_model(name) else None


@torch.no_grad()
def parity(about: Preset) -> str:
    """What was compared, bitwise; `AssertionError` where something differs."""
    size, classes = 64 if "swin" in about.full_net else 32, 3
    torch.manual_seed(0)
    full_net, _ = build(about.full_net, classes, image_size=size)
    net = lived(nest(full_net, about.depths)).eval()
    x = torch.randn(1, 3, size, size)
    outputs = net(x)
    compared = 0
    for name, depths in net.depths.items():
        assert torch.equal(outputs[name].logits, net.nets[name](x)), f"{name}: the tree differs from the net"
        with Undrawn():
            library = library_net(about.full_net, name, depths, size, classes)
        if library is not None:
            library.load_state_dict(net.nets[name].state_dict(), strict=True)
            assert torch.equal(outputs[name].logits, library.eval()(x)), f"{name}: the library's differs"
            compared += 1
    return "bitwise" if compared == len(net.depths) else "bitwise, full-net only ¹"


def shares(net: DDNN) -> tuple[float, float]:
    """Least share of a sub-net's parameters that are the full-net's own, and the DDNN's beyond the full-net's."""
    full = {id(p) for p in net.nets[net.full_name].parameters()}
    shared = min(
        sum(p.numel() for p in sub.parameters() if id(p) in full) / parameters(sub)
        for name, sub in net.nets.items()
        if name != net.full_name
    )
    return shared, parameters(net) / parameters(net.nets[net.full_name]) - 1


def row(preset: str, *, checked: bool = True) -> str:
    """One line of the table."""
    about = ALL[preset]
    size = 32 if about.full_net.startswith("cifar") else 256 if "window8_256" in about.full_net else 224
    with Undrawn():
        full_net, _ = build(about.full_net, 1000, image_size=size)
    net = nest(ghost(full_net), about.depths)
    shared, beyond = shares(net)
    bound = tree_bound(net, size)
    family = family_of(full_net)
    assert family is not None
    depths = "; ".join(f"{name} {'-'.join(map(str, kept))}" for name, kept in about.depths.items())
    called = preset if preset in PRESETS else about.full_net
    cells = [f"`{called}`", family.name, depths, f"{100 * shared:.2f} %", f"+{100 * beyond:.2f} %", f"{bound:.2f}"]
    return "| " + " | ".join([*cells, parity(about) if checked else "?"]) + " |"


def committed() -> dict[str, str]:
    """The lines of the table that is there, by preset."""
    text = PAGE.read_text(encoding="utf-8")
    lines = text[text.index(BEGIN) : text.index(END)].splitlines()[3:]
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table instead of checking it")
    write = parser.parse_args().write
    there = committed() if not write else {}
    lines, differing = [], 0
    for preset in ALL:
        lines.append(row(preset))
        name = lines[-1].split("`")[1]
        if not write and there.get(name) != lines[-1]:
            differing += 1
            print(f"- {there.get(name)}\n+ {lines[-1]}", flush=True)
        else:
            print(lines[-1], flush=True)
    if write:
        text = PAGE.read_text(encoding="utf-8")
        table = "\n".join([BEGIN, *HEADER, *lines, END])
        PAGE.write_text(text[: text.index(BEGIN)] + table + text[text.index(END) + len(END) :], encoding="utf-8")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
