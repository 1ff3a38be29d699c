"""Sub-nets of a network that is trained already: in how many epochs are they as good as trained alone?

    python benchmarks/pretrained.py cifar100-resnet8-14-20 --out runs/pretrained --epochs 4 --lr 0.04

Trains each depth of the recipe alone, from scratch; then nests the sub-nets in the full-net that was trained alone and
trains them together for a few epochs, all of them taught by that full-net as it was, which keeps the full-net itself
from forgetting. Says, by the validation split, after which epoch each sub-net was as good as alone at its end, and what
the full-net kept. Kill it and call it again: finished trainings are not repeated.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ddnn import recipe as recipes
from ddnn.build import build
from ddnn.checkpoint import RunFolder, write_atomic
from ddnn.compare.plan import alone, from_trained
from ddnn.display import Display, make_console
from ddnn.errors import RunError
from ddnn.recipe import Recipe, changed
from ddnn.trainer import train


def run(folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """Train, or go on, or do nothing if it is done; the epochs."""
    made = RunFolder.open(folder) if (folder / "recipe.toml").exists() else RunFolder.create(folder, recipe)
    if made.recipe.to_toml() != recipe.to_toml():
        raise RunError(f"{folder} holds a training of another recipe; give another --out")
    with Display(make_console(stderr=True)) as display:
        train(made, display)
    return made.metrics()


def compare(recipe: Recipe, epochs: int, lr: float, out: Path, *, teacher: bool = True) -> dict[str, Any]:
    """Train everything, and what came of it."""
    if recipe.data.validation == 0:
        recipe = changed(recipe, data={"validation": 0.1})
    *subnets, full = build(recipe.network.unweighted(), num_classes=2).depths
    best = {
        name: run(out / f"alone-{name}", alone(recipe, name))[-1]["validation"][name]["top1"]
        for name in [*subnets, full]
    }
    after = changed(
        from_trained(recipe, (out / f"alone-{full}").resolve()),
        objective={} if teacher else {"teacher": None},
        optim={"lr": lr},
        train={"epochs": epochs},
    )
    curve = run(out / "nested", after)
    accuracy = {name: [epoch["validation"][name]["top1"] for epoch in curve] for name in best}
    return {
        "epochs_alone": recipe.train.alone_epochs,
        "epochs_nested": epochs,
        "nets": {
            name: {
                "alone": best[name],
                "nested": accuracy[name],
                "reached": next((i + 1 for i, top1 in enumerate(accuracy[name]) if top1 >= best[name]), None),
            }
            for name in best
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    each = " | ".join(f"epoch {i + 1}" for i in range(result["epochs_nested"]))
    lines = [
        f"| net | alone, {result['epochs_alone']} epochs | {each} | as good as alone after |",
        "|---" * (3 + result["epochs_nested"]) + "|",
    ]
    for i, (name, net) in enumerate(result["nets"].items()):
        nested = " | ".join(f"{100 * top1:.2f}" for top1 in net["nested"])
        reached = "not reached" if net["reached"] is None else f"{net['reached']} of {result['epochs_nested']} epochs"
        full = " (full-net, trained before)" if i == len(result["nets"]) - 1 else ""
        lines.append(f"| {name}{full} | {100 * net['alone']:.2f} | {nested} | {reached} |")
    return "\n".join(["validation top-1 %", "", *lines])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a shipped recipe's name or a TOML file")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="such as train.seed=1")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4, help="of the joint training (default: 4)")
    parser.add_argument("--lr", type=float, help="its peak learning rate (default: a fifth of the recipe's)")
    parser.add_argument("--no-teacher", action="store_true", help="let the full-net teach as it changes, as usual")
    asked = parser.parse_intermixed_args(arguments)
    recipe = recipes.load(asked.recipe, asked.changes)
    lr = recipe.optim.lr / 5 if asked.lr is None else asked.lr
    result = compare(recipe, asked.epochs, lr, asked.out, teacher=not asked.no_teacher)
    write_atomic(asked.out / "pretrained.json", (json.dumps(result, indent=2) + "\n").encode())
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
