"""A loaded bundle: all its depths, run by name, by a budget, or as a cascade."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddnn.cpus import available_cpus
from ddnn.errors import RequestError
from ddnn.runtime import curve, profile
from ddnn.runtime import manifest as manifests
from ddnn.runtime.cascade import Cascaded, Threshold, answer_of, cascade, checked, plan, probabilities
from ddnn.runtime.checks import check_above_0, is_whole
from ddnn.runtime.kept import machine_folder
from ddnn.runtime.machine import this_machine
from ddnn.runtime.manifest import IMAGES, LOGITS, Manifest, Net
from ddnn.runtime.pixels import Floats, batch_of, from_file, normalised
from ddnn.runtime.sessions import Sessions
from ddnn.runtime.shared import Shared


class Prediction(NamedTuple):
    """What a net makes of one image."""

    depth: str
    """Name of the net that answered."""
    classes: tuple[tuple[str, float], ...]
    """Class and confidence, the probability the net gives it; the most likely first."""


class Model:
    """A bundle ready to run, made by `load`. Every call says which depth; none changes the model.

    All of it may be called from many threads at a time. Graphs are made ready when they are first used; `warm` does so
    in advance.
    """

    def __init__(
        self, manifest: Manifest, nets: dict[str, Net], threads: int, sessions: Sessions, shared: bool
    ) -> None:
        self.manifest = manifest
        self.nets = nets
        """What the manifest says of every loaded net, by name, shallow to deep."""
        self.threads = threads
        """CPUs that one call uses."""
        self.shared = shared
        self._sessions = sessions

    @property
    def depths(self) -> dict[str, tuple[int, ...]]:
        """Names of the loaded nets, shallow to deep, and the blocks each keeps per stage."""
        return {name: net.depths for name, net in self.nets.items()}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return self.manifest.classes

    def __call__(self, images: Any, depth: str | None = None) -> Floats:
        """The logits, float32 [N, classes], of N images by the net called `depth`; by the deepest if none is named.

        `images`: uint8 [N, H, W, 3], raw RGB pixels of any size, which are resized, cropped and normalised as in
        evaluation; or float32 [N, 3, S, S], normalised already.

        Raises `RequestError` for an unknown depth and for any other array.
        """
        net = self._net(depth)
        batch = batch_of(images, self.manifest.input)
        if not len(batch):
            return self._no_logits()
        (logits,) = self._sessions.run(net.graph, [LOGITS], {IMAGES: batch})
        return answer_of(logits, len(batch), len(self.classes), net)

    def cascade(self, images: Any, threshold: Threshold) -> Cascaded:
        """Answer with the shallowest net, and go deeper only with the images whose answer is unsure.

        `images` as in a call. `threshold`: the confidence, the probability of the most likely class, from which on an
        answer stands; one for all nets, or one for each but the deepest, shallow to deep. 0 stops all images, a number
        above 1 none; 2 leaves the net out, computing no more of it than deeper nets start from. Measured thresholds
        come from `ddnn cascade`.

        Raises `RequestError`, also where only some of the depths are loaded.
        """
        self._need_all()
        nets = list(self.nets.values())
        thresholds = checked(threshold, nets)
        batch = batch_of(images, self.manifest.input)
        if not len(batch):
            return Cascaded(self._no_logits(), np.zeros(0, dtype=np.intp))
        return cascade(self._sessions, nets, len(self.classes), batch, thresholds)

    def read(self, path: str | Path) -> Floats:
        """The image in a file as the nets take it: float32 [3, S, S]. Raises `RequestError` where it can't be read."""
        wanted = self.manifest.input
        return normalised(from_file(path, wanted)[None], wanted)[0]

    def predict(
        self, path: str | Path, depth: str | None = None, *, top: int = 5, threshold: Threshold | None = None
    ) -> Prediction:
        """The `top` most likely classes of the image in a file, by one depth, or by a cascade with this threshold.

        Raises `RequestError` for what is no image, larger than PIL's limit (`PIL.Image.MAX_IMAGE_PIXELS`), or where
        both a depth and a threshold are given.
        """
        if threshold is not None and depth is not None:
            raise RequestError(f"both the depth {depth} and a threshold are given; a cascade chooses the depth itself")
        if not is_whole(top, 1):
            raise RequestError(f"top={top!r} must be a whole number of at least 1")
        net = self._net(depth)
        batch = self.read(path)[None]
        if threshold is None:
            logits, name = self(batch, depth), net.name
        else:
            answer = self.cascade(batch, threshold)
            logits, name = answer.logits, list(self.nets)[int(answer.answered[0])]
        return Prediction(name, self.most_likely(logits[0], top))

    def most_likely(self, logits: Floats, top: int) -> tuple[tuple[str, float], ...]:
        """The `top` most likely classes and their probabilities, of the logits [classes] of one image."""
        found = probabilities(logits[None])[0]
        best = np.argsort(-found, kind="stable")[:top]
        return tuple((self.classes[i], float(found[i])) for i in best)

    def within(
        self,
        latency_ms: float | None = None,
        memory_mb: float | None = None,
        *,
        p95: bool = False,
        batch: int = 1,
    ) -> str:
        """The most accurate loaded depth that answers a batch in this time, as `ddnn profile` measured it here.

        `latency_ms`: of the median call, or with `p95` of all but one in twenty. `memory_mb`: most MiB that a process
        with only that depth took.

        Raises `BudgetError` if none does, saying by how much, and `RequestError` where this machine has no profile.
        """
        if not is_whole(batch, 1):
            raise RequestError(f"batch={batch!r} must be a whole number of at least 1")
        for unit, limit in (("ms", latency_ms), ("MiB", memory_mb)):
            check_above_0(limit, unit)
        condition = profile.Condition(int(batch), self.threads, self.shared)
        rows = profile.read(self.manifest, this_machine()).rows_for(condition, self.nets, self.manifest.folder)
        return profile.pick(rows, self.nets, latency_ms=latency_ms, memory_mb=memory_mb, p95=p95).depth

    def thresholds(self, accuracy: float | None = None, latency_ms: float | None = None) -> list[float]:
        """Thresholds for `cascade`, as `ddnn cascade` measured them on this machine.

        The quickest that reach an accuracy, or the most accurate with such a mean latency; those that command chose if
        neither is given. Raises `BudgetError` if none does, saying by how much, and `RequestError` where nothing was
        measured on this machine for a model loaded like this one, with all depths.
        """
        curve.check_wanted(accuracy, latency_ms)
        self._need_all()
        measured = curve.read(self.manifest, this_machine()).under(self.manifest, self.threads, self.shared)
        if accuracy is not None or latency_ms is not None:
            measured = curve.choose(measured, accuracy=accuracy, latency_ms=latency_ms)
        return list(measured.points[measured.chosen].thresholds)

    def warm(self, *depths: str, threshold: Threshold | None = None) -> None:
        """Make depths (all loaded ones if none is named) ready, so that the next call is as fast as any other.

        With a `threshold`, instead what a cascade with it may run.
        """
        size = self.manifest.input.size
        image = np.zeros((1, 3, size, size), dtype=np.float32)
        if threshold is not None:
            nets = list(self.nets.values())
            for step in plan(nets, checked(threshold, nets)):
                self._sessions.get(step.part.graph, () if step.asked else step.features)
            self.cascade(image, threshold)
            return
        for name in depths or self.nets:
            self(image, name)

    def _net(self, depth: str | None) -> Net:
        if depth is None:
            return next(reversed(self.nets.values()))
        if not isinstance(depth, str) or depth not in self.nets:  # what is no text may not even be looked up
            loaded = " loaded" if len(self.nets) < len(self.manifest.nets) else ""
            raise RequestError(f"no depth {depth!r}{loaded} in this bundle; it has {', '.join(self.nets)}")
        return self.nets[depth]

    def _need_all(self) -> None:
        if len(self.nets) < len(self.manifest.nets):
            raise RequestError("a cascade needs all depths; load the bundle without only")

    def _no_logits(self) -> Floats:
        return np.zeros((0, len(self.classes)), dtype=np.float32)


def load(
    bundle: str | Path, only: Iterable[str] | None = None, *, threads: int | None = None, shared: bool = False
) -> Model:
    """Load the bundle in a folder, or `only` some of its depths, which takes but their memory.

    `threads`: CPUs that one call uses, all this process may use by default; 1 is right where many threads call.
    `shared`: hold the weights of all depths, in all processes, once, in a copy of the bundle that is laid out for this
    machine and made the first time (docs/runtime.md says what that saves and costs).

    Raises `BundleError` for a bundle that is damaged, incomplete or of a newer format, `RequestError` for a depth it
    does not have. A file that changes after this is not read: a call that needs it raises `BundleError`.
    """
    try:
        folder = Path(os.path.realpath(bundle))  # which links and the working directory change no more
    except (TypeError, ValueError):
        raise RequestError(f"{bundle!r} is no path to a bundle") from None
    manifest = manifests.read(folder)
    if isinstance(only, str):
        only = [only]
    elif only is not None and not isinstance(only, Iterable):
        raise RequestError(f"only={only!r} must be names of depths; the bundle {bundle} has {', '.join(manifest.nets)}")
    wanted = list(manifest.nets if only is None else only)
    for name in wanted:
        if not isinstance(name, str) or name not in manifest.nets:
            raise RequestError(f"no depth {name!r} in the bundle {bundle}; it has {', '.join(manifest.nets)}")
    if not wanted:
        raise RequestError(f"only names no depth of the bundle {bundle}; it has {', '.join(manifest.nets)}")
    if threads is not None and not (is_whole(threads, 1) and threads <= 1024):
        raise RequestError(f"threads={threads!r} must be a whole number from 1 to 1024")
    nets = {name: net for name, net in manifest.nets.items() if name in wanted}
    count = available_cpus() if threads is None else int(threads)
    if shared:
        checked = manifest.check_files(manifest.files)
        copy = Shared.open(manifest, checked, machine_folder(manifest.folder, this_machine()))
        sessions = Sessions(copy.locate, copy.checked, count, optimise=False)
    else:
        graphs = [net.graph for net in nets.values()] + [net.cascade.graph for net in nets.values() if net.cascade]
        checked = manifest.check_files(graphs)
        sessions = Sessions(lambda graph: (manifest.folder / graph, {}), checked, count, optimise=True)
    return Model(manifest, nets, count, sessions, shared)
