"""Models in the conventions of the Hugging Face hub: a folder, or a repository, that holds

    model.safetensors    weights of all nets, every tensor once
    config.json          what the network is, its nets, its classes, and how images become its input
    README.md            the model card: the table of sub-nets, and the evidence for it

config.py     config.json
folder.py     `save_pretrained`, `from_pretrained`
remote.py     the hub itself: download, `push_to_hub`
card.py       the model card
finished.py   a finished run as such a folder
plain.py      one sub-net as an ordinary network that timm loads
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddnn.hub.config import Config, Network, Preprocessing
    from ddnn.hub.evidence import Evidence
    from ddnn.hub.finished import save_run, save_subnet_of_run
    from ddnn.hub.folder import from_pretrained, load_config, save_pretrained
    from ddnn.hub.plain import save_for_timm
    from ddnn.hub.remote import push_to_hub, upload

# Loaded when first used: who loads a model needs neither the card's tables nor timm.
_HOME = {
    "Config": "config",
    "Evidence": "evidence",
    "Network": "config",
    "Preprocessing": "config",
    "from_pretrained": "folder",
    "load_config": "folder",
    "push_to_hub": "remote",
    "save_for_timm": "plain",
    "save_pretrained": "folder",
    "save_run": "finished",
    "save_subnet_of_run": "finished",
    "upload": "remote",
}

__all__ = [
    "Config",
    "Evidence",
    "Network",
    "Preprocessing",
    "from_pretrained",
    "load_config",
    "push_to_hub",
    "save_for_timm",
    "save_pretrained",
    "save_run",
    "save_subnet_of_run",
    "upload",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'ddnn.hub' has no attribute {name!r}")
    return getattr(import_module(f"ddnn.hub.{_HOME[name]}"), name)
