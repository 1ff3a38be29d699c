"""Bundles on a device: loaded, measured, picked from, run. Needs numpy, onnxruntime and Pillow, and no torch.

manifest.py    what a bundle says of itself, and whether its files are as it says
pixels.py      from images to what the nets are given
sessions.py    graphs made ready to run; shared.py: over one memory map of the weights; graphs.py: ONNX files
model.py       `load` and what it returns
checks.py      whether a value is a number; kept.py: what a bundle keeps of a machine
profile.py     latency and memory (footprint.py) of every depth on this machine (machine.py), and `pick`
cascade.py     start shallow, go deeper only where unsure
service.py     a queue before it, deep or shallow by what waits; server.py: over HTTP
tuning.py      a cascade measured: labelled images (heldout.py), thresholds chosen on them (thresholds.py), the result
               (curve.py)
output.py      the page of it, of sentences.py, tables.py and figures.py
"""

from ddnn.runtime.cascade import Cascaded
from ddnn.runtime.model import Model, Prediction, load
from ddnn.runtime.service import Answer, Service

__all__ = ["Answer", "Cascaded", "Model", "Prediction", "Service", "load"]
