"""The page and the figures that are kept with a bundle."""

from collections.abc import Mapping
from pathlib import Path

from ddnn import page
from ddnn.figure import Drawing, inline
from ddnn.files import write_atomic
from ddnn.runtime import sentences, tables
from ddnn.runtime.curve import Curve
from ddnn.runtime.figures import draw_cascade, draw_profile
from ddnn.runtime.manifest import Manifest, Net
from ddnn.runtime.profile import Profile


def write_cascade(curve: Curve, manifest: Manifest, folder: Path) -> list[Path]:
    """Write `cascade.html`, a page that needs nothing else, and its figure; return the files.

    Raises `ModuleNotFoundError` where matplotlib or jinja2 is missing.
    """
    from markupsafe import Markup

    drawing = draw_cascade(curve)
    text = page.render(
        Path(__file__).parent / "templates", "cascade.html", curve=curve, manifest=manifest, drawing=drawing,
        figure=Markup(inline(drawing, "cascade")), sentences=sentences, tables=tables,
    )  # fmt: skip
    write_atomic(folder / "cascade.html", text.encode())
    return [folder / "cascade.html", *_write_figure(drawing, folder)]


def write_profile(profile: Profile, nets: Mapping[str, Net], folder: Path) -> list[Path]:
    """Write the figure of a profile and return its files. Raises `ModuleNotFoundError` where matplotlib is missing."""
    return _write_figure(draw_profile(profile, nets), folder)


def _write_figure(drawing: Drawing, folder: Path) -> list[Path]:
    files = {f"{drawing.name}.svg": drawing.svg.encode(), f"{drawing.name}.png": drawing.png}
    for name, content in files.items():
        write_atomic(folder / name, content)
    return [folder / name for name in files]
