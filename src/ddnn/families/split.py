"""Take a network's own forward apart: what it does before its first block, between its blocks, and after its last one.

`torch.fx` follows the forward through whatever holds the blocks and no deeper: blocks and all other modules stay
calls of ordinary modules. What lies between two blocks is then cut out as a function of the network and of what the
first of the two gave. So stem and head are the library's own code, whatever its version, and need not be written again.
"""

import inspect
import operator
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from ddnn.errors import first_line

Function = Callable[[nn.Module, Tensor], Tensor]


class IndivisibleError(Exception):
    """A forward can't be taken apart at its blocks; the text says why.

    `after` is the last unit whose output does not suffice for what comes next, if that is the reason.
    """

    def __init__(self, reason: str, after: int | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Piece:
    """A part of a forward: `piece(net, x)`. With `runs_unit`, the unit that it leads to is its last part."""

    def __init__(self, training: fx.Graph, at_rest: fx.Graph, *, runs_unit: bool = False) -> None:
        self.runs_unit = runs_unit
        self.modules = tuple(dict.fromkeys(n.target for g in (training, at_rest) for n in _calls(g)))
        """Names of the modules it calls."""
        self.in_line = _in_line(training) and _in_line(at_rest) and _targets(training) == _targets(at_rest)
        """Whether it is nothing but these modules, each on the output of the one before."""
        self._at_rest = _Code.of(at_rest)
        self._training = _Code.of(training)

    def __call__(self, net: nn.Module, x: Tensor) -> Tensor:
        """Run it, as `net` would in the mode that it is in."""
        return (self._training if net.training else self._at_rest).run(net, x)

    def __deepcopy__(self, memo: object) -> "Piece":
        return self  # it never changes and knows no network


class _Code:
    """The function that a graph stands for; it can be pickled, as its source and what that refers to."""

    def __init__(self, source: str, refers_to: dict[str, Any]) -> None:
        self.source = source
        self.refers_to = {k: import_module(v.name) if isinstance(v, _Module) else v for k, v in refers_to.items()}
        scope: dict[str, Any] = dict(self.refers_to)
        exec(compile(source, "<piece of a forward>", "exec"), scope)
        self.run: Function = scope["forward"]

    @classmethod
    def of(cls, graph: fx.Graph) -> "_Code":
        code = graph.python_code("self")
        return cls(code.src, dict(code.globals))

    def __reduce__(self) -> tuple[Any, ...]:
        named = {k: _Module(v.__name__) if isinstance(v, ModuleType) else v for k, v in self.refers_to.items()}
        return type(self), (self.source, named)


class _Module(NamedTuple):
    """Stands for a Python module where that can't be pickled."""

    name: str


@dataclass(frozen=True)
class Pieces:
    """A forward, taken apart at its units: each a block, or a whole stage where the family says so."""

    stem: Function
    """Images -> input of the first unit."""
    before: tuple[Piece | None, ...]
    """For every unit what runs between the one before and it, None for nothing; or all up to its end."""
    head: Function
    """Output of the last unit -> logits."""
    head_modules: tuple[str, ...]
    """Names of the modules that `head` calls."""


@dataclass(frozen=True)
class _Trace:
    """One traced forward: where it begins, the units in the order they run, what it returns."""

    image: fx.Node
    units: list[list[fx.Node]] = field(default_factory=list)
    """The calls of every unit, one per module of it."""
    result: Any = None


def split(net: nn.Module, units: Sequence[Sequence[str]]) -> Pieces:
    """Take the forward of `net` apart; `units` are the names of the modules of each unit, in the order they run.

    Raises `IndivisibleError` if it can't be done: a unit is skipped, runs twice, or needs more than the output of the
    one before, or `torch.fx` can't follow the forward.
    """
    traces = [_trace(net, units, training) for training in (True, False)]
    whole = [any(_others(call) for trace in traces for call in trace.units[i]) for i in range(len(units))]
    parts = [list(_cut(trace, units, whole)) for trace in traces]
    stem, *before, head = (
        Piece(*graphs, runs_unit=runs_unit)
        for graphs, runs_unit in zip(zip(*parts, strict=True), [False, *whole, False], strict=True)
    )
    return Pieces(
        stem=stem,
        before=tuple(None if piece.in_line and not piece.modules else piece for piece in before),
        head=head,
        head_modules=head.modules,
    )


def holders(names: Iterable[str]) -> set[str]:
    """The names of all modules that hold these modules, the network itself ("") among them."""
    return {".".join(name.split(".")[:depth]) for name in names for depth in range(name.count(".") + 1)}


class _Tracer(fx.Tracer):
    """Goes into the modules named and no others."""

    def __init__(self, through: set[str]) -> None:
        super().__init__(param_shapes_constant=True)
        self.through = through

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.through

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and not self._is_buffer(a):
            raise IndivisibleError("it makes a tensor of its own between its blocks")  # fx would hang it on the network
        return super().create_arg(a)

    def _is_buffer(self, a: Tensor) -> bool:
        return any(a is buffer for buffer in self.root.buffers())


def _trace(net: nn.Module, units: Sequence[Sequence[str]], training: bool) -> _Trace:
    through = holders(name for names in units for name in names)
    parameters = list(inspect.signature(net.forward).parameters.values())
    defaults = {p.name: p.default for p in parameters[1:] if p.default is not inspect.Parameter.empty}
    with _mode([net.get_submodule(name) for name in through], training), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arguments that it takes for constants
        drawn = _random_state()
        try:
            graph = _Tracer(through).trace(net, concrete_args=defaults or None)
        except IndivisibleError:
            raise
        except Exception as error:  # whatever a forward may do with what is no tensor
            raise IndivisibleError(f"torch.fx can't follow it ({first_line(error)})") from None
    if _random_state() != drawn:  # what is drawn now would be decided for good
        raise IndivisibleError("it draws random numbers between its blocks")
    image = next((node for node in graph.nodes if node.op == "placeholder"), None)
    if image is None:
        raise IndivisibleError("it takes no images")
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    return _Trace(image, [[_only_call(graph, name) for name in names] for names in units], result)


def _random_state() -> tuple[object, ...]:
    """Of the generators that Python code draws from."""
    return random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())


@contextmanager
def _mode(modules: Sequence[nn.Module], training: bool) -> Iterator[None]:
    """These modules, without those in them, in training or not."""
    were = [module.training for module in modules]
    try:
        for module in modules:
            module.training = training
        yield
    finally:
        for module, was in zip(modules, were, strict=True):
            module.training = was


def _only_call(graph: fx.Graph, name: str) -> fx.Node:
    calls = [node for node in _calls(graph) if node.target == name]
    if len(calls) != 1:
        raise IndivisibleError(f"it runs {name} {len(calls)} times" if calls else f"it does not run {name}")
    return calls[0]


def _cut(trace: _Trace, units: Sequence[Sequence[str]], whole: Sequence[bool]) -> Iterator[fx.Graph]:
    """The stem, what leads to each unit from there or from the unit before, and the head."""
    start = _input(trace.units[0][0])
    yield _between(trace.image, start, "it makes the input of its first block from more than images")
    for i, (names, calls) in enumerate(zip(units, trace.units, strict=True)):
        for name, call, last in zip(names[1:], calls[1:], calls[:-1], strict=True):
            if _input(call) is not last:
                raise IndivisibleError(f"{name} does not run on what {last.target} gives")
        reason = f"{names[0]} is given more than what comes from the block before it"
        yield _between(start, calls[-1] if whole[i] else _input(calls[0]), reason, i - 1 if i else None)
        start = calls[-1]
    if not isinstance(trace.result, fx.Node):
        raise IndivisibleError("it returns more than one tensor")
    reason = f"after {start.target} it uses more than what that block gives"
    yield _between(start, trace.result, reason, len(units) - 1)


def _input(call: fx.Node) -> fx.Node:
    if not call.args or not isinstance(call.args[0], fx.Node):
        raise IndivisibleError(f"it does not give {call.target} a tensor as its first argument")
    return call.args[0]


def _others(call: fx.Node) -> list[fx.Node]:
    """What a unit is given besides its input."""
    return [node for node in call.all_input_nodes if node is not call.args[0]]


def _between(start: fx.Node, end: fx.Node, reason: str, after: int | None = None) -> fx.Graph:
    """The graph of `end` as a function of `start` alone; `reason` says what is wrong if it is not one."""
    needed: set[fx.Node] = set()
    sizes: set[fx.Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node is start or node in needed:
            continue
        if node.op == "placeholder":
            raise IndivisibleError(reason, after)
        needed.add(node)
        if _is_batch_size(node) and not _follows(node, start):
            sizes.add(node)  # the number of images, wherever it was read, is that of `start` too
        else:
            stack += node.all_input_nodes
    graph = fx.Graph()
    copies = {start: graph.placeholder("x")}
    for node in start.graph.nodes:  # in its order, so that whatever works in place does so at the same time
        if node in sizes:
            copies[node] = graph.call_method("size", (copies[start], 0))
        elif node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[end])
    graph.lint()
    return graph


def _follows(node: fx.Node, start: fx.Node) -> bool:
    """Whether a node is computed from `start` alone."""
    stack, seen = [node], {start}
    while stack:
        one = stack.pop()
        if one.op == "placeholder" and one is not start:
            return False
        if one not in seen:
            seen.add(one)
            stack += one.all_input_nodes
    return True


def _is_batch_size(node: fx.Node) -> bool:
    """Whether it is `x.shape[0]`, `x.size(0)` or `x.size()[0]`."""
    if node.op == "call_method" and node.target == "size":
        return [*node.args[1:], *node.kwargs.values()] in ([0],)
    if node.op == "call_function" and node.target is operator.getitem and node.args[1] in (0,):
        shape = node.args[0]
        if isinstance(shape, fx.Node):
            whole = shape.op == "call_method" and shape.target == "size" and len(shape.args) == 1
            return whole or (shape.target is getattr and shape.args[1] in ("shape",))
    return False


def _calls(graph: fx.Graph) -> list[Any]:
    return [node for node in graph.nodes if node.op == "call_module"]


def _targets(graph: fx.Graph) -> list[Any]:
    return [node.target for node in _calls(graph)]


def _in_line(graph: fx.Graph) -> bool:
    last, *inner, output = graph.nodes
    for node in inner:
        if node.op != "call_module" or node.args != (last,) or node.kwargs:
            return False
        last = node
    return bool(output.args[0] is last)
