"""ddnn: one training run gives several nested networks.

>>> net = ddnn.nest(torchvision.models.resnet34(), {"resnet18": (2, 2, 2, 2)})
>>> outputs = net(images)                      # name -> Output(logits, features), the full-net last
>>> terms = ddnn.EKD()(outputs, target)        # name of a term -> scalar
>>> sum(terms.values()).backward()
>>> net.subnet("resnet18")                     # an ordinary torchvision ResNet-18

and on a device, without torch:

>>> model = ddnn.load("bundle")
>>> logits = model(images, depth="resnet18")
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ddnn.version import __version__

if TYPE_CHECKING:
    from ddnn.backbone import Backbone
    from ddnn.errors import DDNNError
    from ddnn.families.family import Family
    from ddnn.hub.folder import from_pretrained, save_pretrained
    from ddnn.hub.remote import push_to_hub
    from ddnn.network import DDNN, Output, nest, recalibrate
    from ddnn.objective import EKD
    from ddnn.runtime import Service, load

# Loaded when first used, so that `import ddnn` costs nothing and needs no torch.
_HOME = {
    "Backbone": "ddnn.backbone",
    "DDNN": "ddnn.network",
    "DDNNError": "ddnn.errors",
    "EKD": "ddnn.objective",
    "Family": "ddnn.families.family",
    "Output": "ddnn.network",
    "Service": "ddnn.runtime",
    "from_pretrained": "ddnn.hub.folder",
    "load": "ddnn.runtime",
    "nest": "ddnn.network",
    "push_to_hub": "ddnn.hub.remote",
    "recalibrate": "ddnn.network",
    "save_pretrained": "ddnn.hub.folder",
}

__all__ = [
    "DDNN",
    "EKD",
    "Backbone",
    "DDNNError",
    "Family",
    "Output",
    "Service",
    "__version__",
    "from_pretrained",
    "load",
    "nest",
    "push_to_hub",
    "recalibrate",
    "save_pretrained",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'ddnn' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        from ddnn.extras import advice

        if (sentence := advice(error)) is None:
            raise
        raise ModuleNotFoundError(f"ddnn.{name}: {sentence}", name=error.name) from None
