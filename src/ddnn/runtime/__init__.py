"""Bundles on a device: loaded, measured, picked from, run. Needs numpy, onnxruntime and Pillow, and no torch.

manifest.py    what a bundle says of itself, and whether its files are as it says
pixels.py      from images to what the nets are given
sessions.py    graphs made ready to run; shared.py, initializers.py: over one memory map of the weights
model.py       `load` and what it returns
cascade.py     start shallow, go deeper only where unsure
"""

from ddnn.runtime.cascade import Cascaded
from ddnn.runtime.model import Model, Prediction, load

__all__ = ["Cascaded", "Model", "Prediction", "load"]
