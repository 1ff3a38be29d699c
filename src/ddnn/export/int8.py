"""From a float32 graph to an int8 one: weights by channel, activations by what real images make of them.

Weights have 7 bits, as the products of 8 overrun on x86 processors without VNNI, which then compute something else.
Batch norms are folded into the convolutions first, which makes the float32 weights of every net its own. Their int8
values stay the same in all of them nevertheless: a batch norm multiplies each output channel by one number, and so does
the scale that a channel is quantised with. What differs between the nets is scales and biases alone; see `Sharing`.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from ddnn.export.graph import cut, fold_norms
from ddnn.export.parity import Array
from ddnn.export.quiet import quiet

Integers = npt.NDArray[np.int8]

CHANNELS = 4
"""What the number of a convolution's input channels is filled up to a multiple of: int8 dot products take four values
at a time, and onnxruntime's fast int8 convolution nothing else."""


def quantise(model: ir.Model, calibration: Sequence[Array]) -> tuple[ir.Model, dict[str, Array]]:
    """The int8 twin of a graph with the input `images`, and the float32 weights that its integers stand for, by name.

    `calibration`: batches of real images, normalised, float32 [N, 3, S, S].
    """
    folded = cut(model, ["images"], [str(value.name) for value in model.graph.outputs])
    fold_norms(folded)
    filled = _fill_up(folded)
    passes.RemoveUnusedNodesPass()(folded)
    with tempfile.TemporaryDirectory(prefix="ddnn-int8-") as folder, quiet():
        source, target = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        ir.save(folded, source)
        quantize_static(
            source,
            target,
            _Batches(calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,  # 7 bits: without VNNI two products are added in 16 bits, which those of 8 overrun
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            nodes_to_exclude=filled,
            extra_options={
                "OpTypesToExcludeOutputQuantization": ["Gemm"],  # the logits: nothing is computed of them any more
                "CalibMovingAverage": True,  # the mean over batches of what is least and most in each
            },
        )
        quantised = ir.load(target)
        for value in quantised.graph.initializers.values():
            _put(value, _array(value).copy())  # out of the file, before it goes
    for output in quantised.graph.outputs:
        if (unrounded := _made(quantised).get(_unrounded(str(output.name)))) is not None:
            unrounded.type, unrounded.shape = output.type, output.shape
    return quantised, {str(name): _array(value) for name, value in folded.graph.initializers.items()}


def start_of(model: ir.Model, feature: str) -> str:
    """Name of the value at which an int8 graph can begin where its float32 twin begins at `feature`.

    That is before the feature is rounded to int8, which changes nothing in one that was rounded so before.
    """
    return _unrounded(feature) if _unrounded(feature) in _made(model) else feature


def _unrounded(name: str) -> str:
    return f"{name}_QuantizeLinear_Input"  # as the quantiser calls what it rounds to make an output of a graph


def _made(model: ir.Model) -> dict[str | None, ir.Value]:
    return {value.name: value for node in model.graph for value in node.outputs}


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: Sequence[Array]) -> None:
        self._left = iter(batches)

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self._left, None)
        return None if batch is None else {"images": batch}


def _fill_up(model: ir.Model) -> list[str]:
    """Give convolutions of a few channels, such as the first, some of zeros; the names of the nodes that add them."""
    added = []
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "Conv" else None
        if weight is None or weight.const_value is None or node.attributes.get_int("group", 1) != 1:
            continue
        narrow = _array(weight)
        missing = -narrow.shape[1] % CHANNELS
        if not missing:
            continue
        rest = narrow.ndim - 2
        _put(weight, np.pad(narrow, [(0, 0), (0, missing)] + [(0, 0)] * rest))
        weight.shape = ir.Shape((narrow.shape[0], narrow.shape[1] + missing, *narrow.shape[2:]))
        pads = ir.Value(
            name=f"{node.name}.zeros", const_value=ir.tensor(np.array([0, 0] + [0] * rest + [0, missing] + [0] * rest))
        )
        model.graph.register_initializer(pads)
        pad = ir.Node("", "Pad", [node.inputs[0], pads], name=f"{node.name}.filled")
        pad.outputs[0].name = f"{node.name}.filled"
        model.graph.insert_before(node, pad)
        node.replace_input_with(0, pad.outputs[0])
        added.append(str(pad.name))
    return added


class Sharing:
    """Makes int8 graphs use each other's integers where these say the same.

    Quantised by output channel, weights W * a with one factor a per channel have the scales |a| * s and the integers
    sign(a) * round(W / s), where s belongs to W. So nets that share W but for a, which is what folded batch norms make
    of it, can share the integers: a negative a goes into the scale. An integer may still differ by one where W / s
    lies in the middle between two, so what is checked is that it is as good a rounding of this net's own weight.
    """

    def __init__(self) -> None:
        self._known: dict[str, list[Integers]] = {}

    def take(self, model: ir.Model, weights: dict[str, Array]) -> None:
        """Replace the int8 weights of a graph by those of graphs taken before; `weights`: what they were made of."""
        for name, weight in weights.items():
            value = model.graph.initializers.get(f"{name}_quantized")
            scale = model.graph.initializers.get(f"{name}_scale")
            if value is None or scale is None or _array(scale).ndim != 1:
                continue
            (dequantize, _), *others = value.uses()
            axis = dequantize.attributes.get_int("axis", 1)
            known = self._known.setdefault(name, [])
            for integers in known:
                signs = _fitting_signs(integers, _array(scale), weight, axis)
                if signs is not None and (not others or (signs > 0).all()):
                    _put(value, integers)
                    _flip(dequantize, signs)
                    break
            else:
                known.append(_array(value))


def _fitting_signs(integers: Integers, scale: Array, weight: Array, axis: int) -> Array | None:
    """By which signs of its scales the integers are roundings of the weight, or None if they are not."""
    if integers.shape != weight.shape:
        return None
    others = tuple(i for i in range(weight.ndim) if i != axis)
    signs = np.where((integers * weight).sum(axis=others) < 0, -1, 1).astype(np.float32)
    by_channel = [-1 if i == axis else 1 for i in range(weight.ndim)]
    error = np.abs(integers * (signs * scale).reshape(by_channel) - weight)
    return signs if (error <= 0.501 * scale.reshape(by_channel)).all() else None


def _flip(dequantize: ir.Node, signs: Array) -> None:
    """Give the scales of a weight these signs, and with them those of the bias that is added to it."""
    if (signs > 0).all():
        return
    scale = dequantize.inputs[1]
    assert scale is not None
    _put(scale, signs * _array(scale))
    for node, _ in dequantize.outputs[0].uses():
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        made = None if bias is None else bias.producer()
        if made is not None and made.op_type == "DequantizeLinear":
            integers, steps = made.inputs[:2]
            assert integers is not None
            assert steps is not None
            _put(integers, _array(integers) * signs.astype(np.int32))
            _put(steps, _array(steps) * signs)


def _array(value: ir.Value) -> npt.NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _put(value: ir.Value, array: npt.NDArray[Any]) -> None:
    value.const_value = ir.tensor(array, name=value.name)
