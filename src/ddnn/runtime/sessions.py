"""Graphs made ready to run, by name, each when it is first asked for; safe from many threads."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from ddnn.errors import BundleError, first_line
from ddnn.runtime.machine import give_back
from ddnn.runtime.manifest import Checked

Array = npt.NDArray[np.generic]
Opened = tuple[Path, Mapping[str, Array]]
"""A graph's file, and tensors in memory that take the place of those it names."""

_ERRORS_ONLY = 3


def options(threads: int) -> onnxruntime.SessionOptions:
    """How every session runs."""
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1
    chosen.log_severity_level = _ERRORS_ONLY
    # Each session has threads of its own. Waiting in a loop for work, as they do by default, they would take the CPUs
    # from those of another depth: two depths in turns take twice as long as without.
    chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return chosen


class Sessions:
    """The sessions of one model. `locate(name)` says where a graph lies and which tensors it takes from memory.

    `checked`: the files that these come from. They are opened long after they were checked, at the first call of a
    depth; a session of any others is refused.
    """

    def __init__(self, locate: Callable[[str], Opened], checked: Checked, threads: int, *, optimise: bool) -> None:
        self._locate = locate
        self._checked = checked
        self._threads = threads
        self._optimise = optimise
        self._made: dict[tuple[str, ...], onnxruntime.InferenceSession] = {}
        self._kept: list[onnxruntime.OrtValue] = []  # sessions refer to them without owning them
        self._making = threading.Lock()

    def run(
        self, graph: str, outputs: Sequence[str], inputs: Mapping[str, Array], *, nothing_else: bool = False
    ) -> list[Array]:
        """Run a batch; with `nothing_else`, only what these outputs need. Raises `BundleError` where it cannot."""
        session = self.get(graph, outputs if nothing_else else ())
        try:
            return list(session.run(list(outputs), dict(inputs)))
        except Exception as error:  # onnxruntime's errors have no base class of their own
            raise BundleError(
                f"onnxruntime {onnxruntime.__version__} cannot run {graph}: {first_line(error, kind=False)}"
            ) from None

    def get(self, graph: str, only: Sequence[str] = ()) -> onnxruntime.InferenceSession:
        """The session of a graph, or of what `only` these outputs of it need; made if need be. Raises `BundleError`."""
        key = (graph, *only)
        if key not in self._made:
            with self._making:
                if key not in self._made:
                    self._checked.unchanged()
                    session = self._make(graph, only)
                    self._checked.unchanged()  # nor while it was made
                    self._made[key] = session
                    give_back()
        return self._made[key]

    def _make(self, graph: str, only: Sequence[str]) -> onnxruntime.InferenceSession:
        path, tensors = self._locate(graph)
        chosen = options(self._threads)
        if not self._optimise:
            chosen.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            for name, array in tensors.items():
                value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
                self._kept.append(value)
                chosen.add_initializer(name, value)
            model: str | bytes = str(path)
            if only:
                from ddnn.runtime.graphs import cut_to  # protobuf takes a while to load

                chosen.add_session_config_entry(
                    "session.model_external_initializers_file_folder_path", str(path.parent)
                )
                model = cut_to(path.read_bytes(), only)
            return onnxruntime.InferenceSession(model, chosen, providers=["CPUExecutionProvider"])
        except Exception as error:  # see `run`
            raise BundleError(
                f"onnxruntime {onnxruntime.__version__} cannot load {path}: {first_line(error, kind=False)}"
            ) from None
