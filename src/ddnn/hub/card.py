"""The model card: `README.md` with what the hub's index reads in front."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ddnn.evaluate import macs, parameters
from ddnn.files import write_atomic
from ddnn.hub.config import Preprocessing
from ddnn.hub.evidence import Evidence
from ddnn.network import DDNN
from ddnn.page import Cell, Table
from ddnn.report import sentences, tables
from ddnn.report.summary import summary_of
from ddnn.version import __version__
from ddnn.wording import amount

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

MARKER = "<!-- written by ddnn; take this line out to keep changes of yours -->"
MANY_CLASSES = 100


@dataclass(frozen=True)
class About:
    """What a card says besides what can be seen from the network."""

    model_id: str
    """`owner/name`, or a folder's name."""
    classes: Sequence[str] | None = None
    preprocessing: Preprocessing | None = None
    evidence: Evidence | None = None
    license: str | None = None
    alone: str | None = None
    """The one net of the DDNN that was taken out and is all there is."""
    by_code: bool = False
    """Whether the full-net has no name by which it can be built again."""


def write_card(folder: Path, net: DDNN, about: About) -> None:
    """Write `README.md`, unless there is one that someone has made his own."""
    path = folder / "README.md"
    if path.exists() and MARKER not in path.read_text(encoding="utf-8", errors="replace"):
        return
    write_atomic(path, card(net, about).encode())


def card(net: DDNN, about: About) -> str:
    """The text of the card."""
    evidence = about.evidence
    title = about.model_id.rpartition("/")[2]
    rows = _rows(net, about)
    environment = Environment(
        loader=PackageLoader("ddnn.hub"), autoescape=False, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip  # the output is Markdown, where names are escaped as they come in
    text = environment.get_template("card.md").render(
        marker=MARKER,
        title=tables.escape(title),
        alone=None if about.alone is None else tables.escape(about.alone),
        rows=rows,
        names=", ".join(map(tables.escape, rows)),
        table=tables.markdown_table(_table(rows, about.alone)),
        measured=_measured(evidence),
        code=_code(net, about),
        preprocessing=_preprocessing(about.preprocessing),
        evidence_text=_evidence(evidence),
        training={what: tables.escape(value) for what, value in evidence.training.items()} if evidence else {},
        recipe=None if evidence is None or evidence.recipe is None else evidence.recipe.strip(),
        of_classes=f" of {len(about.classes)} classes" if about.classes else "",
        classes=about.classes,
        taught=evidence is not None and evidence.taught,
        class_list=_class_list(about.classes or ()),
        limits=_limits(evidence),
        version=__version__,
    )
    return f"---\n{_metadata(rows, about, title).to_yaml()}\n---\n\n{text}"


Row = dict[str, Any]


def _rows(net: DDNN, about: About) -> dict[str, Row]:
    """What the table says of every net; accuracy and latency only where they were measured."""
    if about.evidence is not None:
        return {name: dict(row) for name, row in about.evidence.subnets.items()}
    rows: dict[str, Row] = {}
    for name, sub in net.nets.items():
        rows[name] = {"depths": list(net.depths[name]), "params": parameters(sub)}
        if about.preprocessing is not None:
            rows[name]["macs"] = macs(sub, about.preprocessing.size)
    return rows


def _table(rows: Mapping[str, Row], alone: str | None) -> Table:
    columns = {
        "depths": ("depths", lambda row: "-".join(map(str, row["depths"]))),
        "params": ("parameters", lambda row: amount(row["params"])),
        "macs": ("MACs", lambda row: amount(row["macs"])),
        "top1": ("top-1 %", lambda row: f"{100 * row['top1']:.2f}"),
        "top5": ("top-5 %", lambda row: f"{100 * row['top5']:.2f}"),
        "latency_ms": ("latency ms", lambda row: f"{row['latency_ms']:.2f}"),
    }
    first = next(iter(rows.values()))
    shown = [both for key, both in columns.items() if key in first]
    full = list(rows)[-1]
    return Table(
        ["sub-net", *(heading for heading, _ in shown)],
        [
            [
                Cell(name + (" (full-net)" if name == full and len(rows) > 1 else ""), strong=name == alone),
                *(Cell(text(row), strong=name == alone) for _, text in shown),
            ]
            for name, row in rows.items()
        ],
    )


def _measured(evidence: Evidence | None) -> str:
    if evidence is None:
        return "Accuracy was not recorded when this model was saved."
    text = f"Test set of {tables.escape(evidence.dataset)}, {evidence.test_images:,} images, after the last epoch."
    return text + (f" Latency: {tables.escape(evidence.latency)}." if evidence.latency else "")


def _code(net: DDNN, about: About) -> str:
    if about.alone is not None:
        where = "hf-hub" if "/" in about.model_id else "local-dir"
        return f'import timm\n\nnet = timm.create_model("{where}:{about.model_id}", pretrained=True).eval()'
    smallest, given = next(iter(net.depths)), ", full_net=full_net" if about.by_code else ""
    why = "" if not about.by_code else "\nfull_net = ...  # the full-net was made by code: a network like it"
    return (
        f"import ddnn\n{why}\n"
        f'net = ddnn.from_pretrained("{about.model_id}"{given})\n'
        f"outputs = net(images)  # of every net: Output(logits, features)\n"
        f'logits = net(images, only=["{smallest}"])["{smallest}"].logits  # of one, and nothing else is computed\n'
        f'small = net.subnet("{smallest}")  # an ordinary, independent network'
    )


def _preprocessing(given: Preprocessing | None) -> str:
    if given is None:
        return "How images become the input was not recorded when this model was saved."
    mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (given.mean, given.std))
    return (
        f"Images in RGB, the shorter side resized to {given.resize} pixels, the middle {given.size} x {given.size} cut "
        f"out, scaled to \\[0, 1\\], less the mean ({mean}), divided by the deviation ({std})."
    )


def _evidence(evidence: Evidence | None) -> str | None:
    if evidence is None:
        return None
    if evidence.comparison is None:
        return (
            "The table is that of one run with one seed. Whether these networks are better than the same networks "
            "trained alone was not measured for this card; `ddnn compare` measures it."
        )
    summary = summary_of(evidence.comparison)
    lines = [*map(str, sentences.verdicts(summary)), sentences.price(summary)]
    return "\n\n".join(
        [
            f"**{tables.escape(sentences.headline(summary))}**",
            "\n".join(f"- {tables.escape(line)}" for line in lines),
            "Top-1 in percent of all methods, each with the same recipe and data order; in brackets the difference to "
            "the same network trained alone, in points, with its 95% confidence interval:",
            tables.markdown_table(tables.accuracy_table(summary)),
            "\n".join(f"- {tables.escape(note)}" for note in sentences.notes(summary)),
        ]
    )


def _class_list(names: Sequence[str]) -> str:
    shown = ", ".join(map(tables.escape, names[:MANY_CLASSES]))
    return shown + (f" and {len(names) - MANY_CLASSES} more, all in config.json" if len(names) > MANY_CLASSES else "")


def _limits(evidence: Evidence | None) -> str:
    told = (
        f"Accuracy was measured on images like those of {tables.escape(evidence.dataset)} and says nothing of others."
        if evidence
        else "Which images it was trained and tested on was not recorded."
    )
    return f"{told} A classifier gives every image one of its classes, also one that shows none of them."


def _metadata(rows: Mapping[str, Row], about: About, title: str) -> "ModelCardData":
    from huggingface_hub import EvalResult, ModelCardData

    source = about.evidence.dataset if about.evidence else ""
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=source,
            dataset_name=source,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=f"top-1 of {name}",
            metric_value=row["top1"],
        )
        for name, row in rows.items()
        if about.evidence is not None and about.alone in (None, name)
    ]
    tags = ["image-classification", "ddnn", "nested-networks", "knowledge-distillation"]
    public = source in ("cifar10", "cifar100") or source.count("/") == 1  # an id of the hub; the others are not there
    return ModelCardData(
        license=about.license,
        library_name="ddnn" if about.alone is None else "timm",
        pipeline_tag="image-classification",
        tags=tags if about.alone is None else [*tags, "timm"],
        datasets=[source] if public else None,
        metrics=["accuracy"] if results else None,
        model_name=title if results else None,
        eval_results=results or None,
    )
