"""From a trained DDNN to what devices run: one bundle for all depths, or each sub-net alone in a format of its own."""

from ddnn.export.alone import export_alone
from ddnn.export.bundle import export_bundle
from ddnn.export.finished import export_run
from ddnn.export.manifest import About
from ddnn.export.trial import Int8

__all__ = ["About", "Int8", "export_alone", "export_bundle", "export_run"]
