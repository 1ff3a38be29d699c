"""Self-contained HTML pages: a template of their own, with the style and the tables that all pages share."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cell:
    """One cell: the number, what belongs to it, and whether to stress it."""

    text: str
    detail: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Headings, and rows whose first cell names them."""

    headings: list[str]
    rows: list[list[Cell]]


def render(templates: Path, name: str, **values: object) -> str:
    """The page that the template `name` in a folder makes of the values; whatever they hold is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([templates, Path(__file__).parent / "templates"]), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(name).render(**values)
