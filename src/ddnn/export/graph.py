"""From a network to a small ONNX graph: batch norms stay nodes of their own, so that the weights can be shared.

`torch.onnx.export` would fold them into the convolutions before them, which makes the weights of every net its own;
onnxruntime does the same folding when it loads a graph, so nothing is lost by leaving it to it.
"""

from collections.abc import Sequence

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules
from torch import Tensor, nn

from ddnn.export.quiet import quiet

OPSET = 20
"""Version of ONNX's operators that graphs are written for."""

# Those of the exporter's own rewritings that leave weights as they are.
_RULES = (
    rules.mul_by_1_rule,
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.dropout_inference_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.successive_relu_rule,
    rules.remove_optional_bias_from_conv_rule,
    rules.remove_optional_bias_from_gemm_rule,
)


def trace(module: nn.Module, image: Tensor, outputs: Sequence[str]) -> ir.Model:
    """The graph of a module in eval mode; its one input `images` is any number of images like `image` [2, C, S, S]."""
    with quiet():
        program = torch.onnx.export(
            module.eval(),
            (image,),
            input_names=["images"],
            output_names=list(outputs),
            dynamic_shapes=({0: torch.export.Dim("N")},),
            opset_version=OPSET,
            optimize=False,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model
    fold_constants_ir(model)
    ir.passes.Sequential(
        passes.InlinePass(),
        RewritePass(_RULES),
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.DeduplicateInitializersPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)
    for name in list(model.graph.initializers):
        value = model.graph.initializers.pop(name)
        value.name = name.removeprefix("own.").removeprefix("full.")
        model.graph.initializers[value.name] = value
    for node in model.graph:
        _say_pooling(node)
    passes.RemoveUnusedNodesPass()(model)
    return model


def _say_pooling(node: ir.Node) -> None:
    """Call a mean over height and width what it is; runtimes know how to do that in their own layouts and in int8."""
    x = node.inputs[0] if node.op_type == "ReduceMean" else None
    axes = node.inputs[1] if x is not None and len(node.inputs) > 1 else None
    if x is None or x.shape is None or axes is None or axes.const_value is None:
        return
    keeps_rank = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int() == 1
    over = {int(axis) % len(x.shape) for axis in axes.const_value.numpy()}
    if len(x.shape) == 4 and over == {2, 3} and keeps_rank:
        node.op_type = "GlobalAveragePool"
        node.attributes.clear()
        node.resize_inputs(1)


def fold_norms(model: ir.Model) -> None:
    """Fold batch norms into the layers before them, in place: fewer nodes, and weights that are the net's own."""
    RewritePass((rules.fuse_batchnorm_into_conv_rule, rules.fuse_batchnorm_into_gemm_rule))(model)
    passes.RemoveUnusedNodesPass()(model)


def cut(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """The part of a graph that makes the values called `outputs` of those called `inputs`."""
    whole = model.graph
    made = {value.name: value for node in whole for value in node.outputs}
    given = {value.name: value for value in whole.inputs} | made
    ends = [given[name] for name in outputs]
    starts = [given[name] for name in inputs]
    needed: set[ir.Node] = set()
    stack = list(ends)
    while stack:
        value = stack.pop()
        node = value.producer()
        if value not in starts and node is not None and node not in needed:
            needed.add(node)
            stack += [each for each in node.inputs if each is not None]
    return _copied(model, starts, ends, [node for node in whole if node in needed])


def _copied(model: ir.Model, starts: list[ir.Value], ends: list[ir.Value], nodes: list[ir.Node]) -> ir.Model:
    """A new model with copies of the nodes, numbered; tensors are not copied.

    Of small networks the graphs weigh as much as the weights that are spared: so names are short, and attributes and
    shapes that are understood are left out.
    """
    copies = {value: _value(value, value.name) for value in starts}
    opsets = dict(model.graph.opset_imports)
    new = []
    for i, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None and value not in copies:  # else it was made by a node before, or is a tensor
                copies[value] = _value(value, value.name)
        for k, value in enumerate(node.outputs):
            copies[value] = _value(value, value.name) if value in ends else ir.Value(name=f"{i}.{k}" if k else f"{i}")
        inputs = [None if value is None else copies[value] for value in node.inputs]
        results = [copies[value] for value in node.outputs]
        new.append(ir.Node(node.domain, node.op_type, inputs, _said(node, opsets), outputs=results, name=f"{i}"))
    graph = ir.Graph(
        [copies[value] for value in starts],
        [copies[value] for value in ends],
        nodes=new,
        initializers=[value for value in copies.values() if value.const_value is not None],
        opset_imports=opsets,
        name=model.graph.name,
    )
    return ir.Model(graph, ir_version=model.ir_version, producer_name="ddnn")


def _value(value: ir.Value, name: str | None) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)


def _said(node: ir.Node, opsets: dict[str, int]) -> list[ir.Attr]:
    """The attributes of a node that are not what its operator takes anyway."""
    schema = onnx.defs.get_schema(node.op_type, opsets[node.domain], node.domain)
    return [
        attribute
        for name, attribute in node.attributes.items()
        if ir.serde.serialize_attribute(attribute) != schema.attributes[name].default_value
    ]
