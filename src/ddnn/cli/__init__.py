"""The command line: one verb, one function.

`app` holds the options before the verb; every other module here adds verbs of one kind.
"""

from ddnn.cli import training, suggest, deployment, device, cascade, serving, sharing  # isort: skip  # noqa: F401  # they hang their verbs on the app, in this order
from ddnn.cli.app import app, main

__all__ = ["app", "main"]
