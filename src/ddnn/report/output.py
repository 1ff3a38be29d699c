"""The files of a report."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from ddnn import page
from ddnn.errors import RunError
from ddnn.figure import Drawing, inline
from ddnn.files import write_atomic
from ddnn.report import sentences, tables
from ddnn.report.comparison import read, read_curves
from ddnn.report.drawing import draw_all
from ddnn.report.summary import Summary, summary_of


@dataclass(frozen=True)
class Section:
    """All there is to say of one comparison."""

    anchor: str
    folder: str
    summary: Summary
    drawings: dict[str, Drawing]
    missing: list[str]

    @property
    def title(self) -> str:
        """What was compared."""
        return sentences.title(self.summary.comparison)

    def inline(self, name: str) -> Markup:
        """A figure as part of the page; matplotlib has escaped its texts."""
        return Markup(inline(self.drawings[name], f"{self.anchor}-{name}"))


def write(folders: Sequence[Path], out: Path) -> list[Path]:
    """Report on the comparisons in `folders`; return the files written into `out`.

        report.md     tables
        report.html   everything, on a page that needs nothing else
        figures/      every figure as SVG and PNG, `FOLDER-` before its name if there are several comparisons

    Raises `RunError` before anything is written if one of the folders holds no usable comparison.
    """
    if not folders:
        raise RunError("there is no comparison to report on; name the folder of one")
    comparisons = [read(folder) for folder in folders]
    anchors = _unique([folder.resolve().name for folder in folders])
    sections = []
    for folder, comparison, anchor in zip(folders, comparisons, anchors, strict=True):
        summary, curves = summary_of(comparison), read_curves(folder, comparison)
        drawings = {drawing.name: drawing for drawing in draw_all(summary, curves)}
        sections.append(Section(anchor, folder.name, summary, drawings, sentences.missing(summary, curves)))
    files: dict[str, bytes] = {}
    for section in sections:
        for drawing in section.drawings.values():
            stem = _figure_path(section, drawing, len(sections))
            files |= {f"{stem}.svg": drawing.svg.encode(), f"{stem}.png": drawing.png}
    # The pages come last, so none ever refers to a figure that is not there.
    files |= {"report.md": _markdown(sections).encode(), "report.html": _page(sections).encode()}
    for name, content in files.items():
        write_atomic(out / name, content)
    return [out / name for name in sorted(files, key=lambda name: name.startswith("figures/"))]


def _unique(names: Sequence[str]) -> list[str]:
    """Names fit for files, no two the same."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "comparison"
        numbered = (f"{plain}-{number}" for number in itertools.count(2))
        found.append(plain if plain not in found else next(n for n in numbered if n not in found))
    return found


def _figure_path(section: Section, drawing: Drawing, sections: int) -> str:
    return f"figures/{section.anchor + '-' if sections > 1 else ''}{drawing.name}"


def _markdown(sections: Sequence[Section]) -> str:
    parts = ["# Comparison\n" if len(sections) == 1 else "# Comparisons\n"]
    if len(sections) > 1:
        parts.append("".join(_contents_line(section) for section in sections))
    for section in sections:
        figures = {d.caption: f"{_figure_path(section, d, len(sections))}.svg" for d in section.drawings.values()}
        anchor = f'<a id="{section.anchor}"></a>\n\n' if len(sections) > 1 else ""
        parts.append(anchor + tables.markdown_of(section.summary, section.missing, figures))
    return "\n".join(parts)


def _contents_line(section: Section) -> str:
    return (
        f"- [{tables.escape(section.title)}](#{section.anchor}): {tables.escape(sentences.headline(section.summary))}\n"
    )


def _page(sections: Sequence[Section]) -> str:
    return page.render(
        Path(__file__).parent / "templates", "page.html", sections=sections, sentences=sentences, tables=tables
    )
