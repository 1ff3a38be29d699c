"""Several processes that train one network: who they are, what they agree on, what they add up.

`torchrun` starts them and says in the environment who each one is; without it there is one, and everything here does
nothing. Each process works on its own part of every batch. Gradients are averaged by torch's
`DistributedDataParallel`, or, in the memory-saving mode, whose backward comes in pieces, by `average_gradients`. What
is said between processes besides gradients goes over a gloo group of its own, from CPU to CPU, so that a GPU never
waits for it.
"""

import contextlib
import hashlib
import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddnn.errors import RunError, first_line
from ddnn.launch import launched


@dataclass(eq=False)
class Processes:
    """This process among those that train together; alone by default."""

    rank: int = 0
    """From 0 to `count` - 1. Process 0 writes the run folder."""
    count: int = 1
    talk: Any = None
    """The gloo group for what is said besides gradients; None for a single process."""
    _vote: tuple[Tensor, Any] | None = field(default=None, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the one process that writes."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """This process's share of every batch: which part, of how many."""
        return self.rank, self.count

    # -- what all must know ---------------------------------------------------------------------------------------

    def agree(self, wish: int) -> int:
        """The highest wish that any process had at the call before this one; 0 at the first call.

        One call late, so that nobody waits: the answer is on its way while the next step is computed. A process alone
        gets its own wish at once.
        """
        if self.count == 1:
            return wish
        answer = self._answer()
        vote = torch.tensor([wish])
        self._vote = vote, dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.talk, async_op=True)
        return answer

    def _answer(self) -> int:
        if self._vote is None:
            return 0
        vote, work = self._vote
        work.wait()
        self._vote = None
        return int(vote)

    def from_first(self, thing: Any) -> Any:
        """What process 0 has for `thing`; what the others give is ignored."""
        if self.count == 1:
            return thing
        box = [thing if self.first else None]
        dist.broadcast_object_list(box, src=0, group=self.talk)
        return box[0]

    def sum(self, numbers: Tensor) -> Tensor:
        """Sum over all processes of a tensor on the CPU; a new tensor."""
        if self.count == 1:
            return numbers
        total = numbers.clone()
        dist.all_reduce(total, group=self.talk)
        return total

    def most(self, number: float) -> float:
        """The largest of all processes' numbers."""
        if self.count == 1:
            return number
        largest = torch.tensor([number], dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.talk)
        return float(largest)

    def check_same(self, what: str, here: str) -> None:
        """`RunError` in every process if `here` is not the same in all of them; names those that differ from the first.

        `what` begins the sentence, as in "the data".
        """
        if self.count == 1:
            return
        box: list[Any] = [None] * self.count
        dist.all_gather_object(box, (socket.gethostname(), here), group=self.talk)
        others = [f"{rank} on {host}" for rank, (host, theirs) in enumerate(box) if theirs != box[0][1]]
        if others:
            raise RunError(
                f"{what} of process {', '.join(others)} is not that of process 0 on {box[0][0]}; all must have the same"
            )

    # -- weights and gradients ------------------------------------------------------------------------------------

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the values that process 0 has, in place."""
        if self.count == 1:
            return
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)

    def wrap(self, net: nn.Module) -> DistributedDataParallel:
        """`net` with gradients that are averaged over the processes while a backward goes on."""
        # Parameters and statistics are the same everywhere already; every parameter has a gradient in every step.
        return DistributedDataParallel(
            net, forward_sync_buffers=False, find_unused_parameters=False, gradient_as_bucket_view=True, init_sync=False
        )

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average what `.grad` holds over all processes, in one flat message per type."""
        if self.count == 1:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_type.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            flat /= self.count
            for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(piece.view(gradient.shape))


ALONE = Processes()
"""A process that trains by itself."""


@contextlib.contextmanager
def together(device: torch.device, patience: timedelta) -> Iterator[Processes]:
    """Meet the other processes of this training, if it was launched with several.

    `patience`: how long one waits for another, at most, before it gives up. A process that is lost ends the training
    of all with a `RunError`; what was saved stays.
    """
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield Processes()
        return
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=patience))  # type: ignore[attr-defined]
        store = dist.PrefixStore(meet(store, rank, count, patience), store)  # type: ignore[attr-defined]
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=patience)
        processes = Processes(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=patience))
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"the {os.environ['WORLD_SIZE']} processes cannot meet at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} from {socket.gethostname()}: {first_line(error, kind=False)}"
        ) from error
    try:
        yield processes
        processes._answer()  # the one to the last call is still on its way
    except RuntimeError as error:
        if not _lost(error):
            raise
        raise RunError(
            f"another process was lost, or did not answer for {patience.total_seconds():g} s "
            f"(train.patience_minutes); the training goes on from its last checkpoint when it is started again. torch "
            f"on {socket.gethostname()} says: {first_line(error, kind=False)}"
        ) from None
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def meet(store: Any, rank: int, count: int, patience: timedelta) -> str:
    """Wait until all processes are here, and return a name for this meeting that no other one ever had.

    torchrun keeps its store when it starts processes again, with the addresses of dead ones still in it, and on several
    hosts nothing it says tells one attempt from another. So each process leaves a mark of its own, process 0 reads them
    out until all have agreed to the same list, and what follows is kept under that list's name. Raises `RunError` where
    not all come in time.
    """

    def read(key: str) -> str:
        return str(store.get(key).decode()) if store.check([key]) else ""

    mark = uuid.uuid4().hex
    store.set(f"ddnn/here/{rank}", mark)
    end = time.monotonic() + patience.total_seconds()
    while time.monotonic() < end:
        if rank == 0:
            marks = ",".join(read(f"ddnn/here/{r}") for r in range(count))
            store.set("ddnn/all", marks)
            if all(read(f"ddnn/agreed/{r}") == marks for r in range(1, count)):
                store.set("ddnn/begin", marks)
                return hashlib.sha256(marks.encode()).hexdigest()
        else:
            marks = read("ddnn/all")
            if marks.split(",")[rank : rank + 1] == [mark]:
                store.set(f"ddnn/agreed/{rank}", marks)
                if read("ddnn/begin") == marks:
                    return hashlib.sha256(marks.encode()).hexdigest()
        time.sleep(0.02)
    raise RunError(f"not all {count} processes came within {patience.total_seconds():g} s (train.patience_minutes)")


def _lost(error: RuntimeError) -> bool:
    """Whether an error is one of talking to the others, which torch mostly gives no type of its own."""
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("gloo", "Gloo", "NCCL", "Connection", "Broken pipe", "Timed out", "timed out")
    )


def check_divides(batch_size: int, accumulate: int, count: int) -> None:
    """`RunError` unless every process gets the same number of images of every part of a batch."""
    if batch_size % (accumulate * count):
        shared = f"{count} processes" + (f" x train.accumulate={accumulate}" if accumulate > 1 else "")
        raise RunError(
            f"train.batch_size={batch_size} cannot be shared evenly by {shared}; it is the whole batch, of all "
            f"processes together, and must be a multiple of {accumulate * count}"
        )


# -- BatchNorm over all processes -----------------------------------------------------------------------------------


@contextlib.contextmanager
def synchronised_norms(net: nn.Module, processes: Processes) -> Iterator[None]:
    """Let every BatchNorm inside normalise by the statistics of all processes' images together, while this lasts.

    torch's own `SyncBatchNorm` works on GPUs only, and its conversion makes new modules, which would untie those that
    sub-nets share. Here the modules stay what they are; afterwards they are ordinary again.
    """
    norms: Sequence[nn.modules.batchnorm._BatchNorm] = []
    if processes.count > 1:
        norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kinds = [type(norm) for norm in norms]
    for norm, kind in zip(norms, kinds, strict=True):
        norm.__class__ = _synchronised(kind)
    try:
        yield
    finally:
        for norm, kind in zip(norms, kinds, strict=True):
            norm.__class__ = kind


_kinds: dict[type[nn.Module], type[nn.Module]] = {}


def _synchronised(kind: type[Any]) -> type[Any]:
    """The class that is `kind`, but in training normalises over all processes."""
    if kind not in _kinds:

        class Synchronised(kind):  # type: ignore[misc]
            def forward(self, x: Tensor) -> Tensor:
                if not self.training:
                    result: Tensor = super().forward(x)
                    return result
                return _batch_norm(self, x)

        _kinds[kind] = Synchronised
    return _kinds[kind]


def _batch_norm(norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    norm._check_input_dim(x)
    y, mean, variance, n = _Normalise.apply(x, norm.eps)
    if norm.track_running_stats:
        assert norm.num_batches_tracked is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.num_batches_tracked.add_(1)
        rate = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), rate)
            norm.running_var.lerp_((variance * (n / (n - 1))).to(norm.running_var.dtype), rate)
    if not norm.affine:
        return y  # type: ignore[no-any-return]
    shape = (1, -1, *(1,) * (x.ndim - 2))
    return torch.addcmul(norm.bias.to(y.dtype).view(shape), y, norm.weight.to(y.dtype).view(shape))


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) by channel, over all processes; and the mean, variance and count.

    The backward is that of Ioffe and Szegedy 2015 (arXiv 1502.03167), whose two sums over the batch are over all
    processes too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        variance, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), dim=axes, correction=0)
        n = mean.new_full((1,), x.numel() // x.shape[1])
        # Chan, Golub and LeVeque 1983: means and variances of parts make those of the whole without cancellation
        everyone = torch.cat([mean, variance, n])
        parts = [torch.empty_like(everyone) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, everyone)
        means, variances, counts = torch.stack(parts).split([len(mean), len(variance), 1], dim=1)
        total = counts.sum()
        share = counts / total
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean).square())).sum(0)
        shape = (1, -1, *(1,) * (x.ndim - 2))
        scale = (variance + eps).rsqrt()
        y = ((x - mean.view(shape)) * scale.view(shape)).to(x.dtype)
        ctx.save_for_backward(y, scale, total)
        ctx.mark_non_differentiable(mean, variance, total)
        ctx.axes, ctx.shape = axes, shape
        return y, mean, variance, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        y, scale, total = ctx.saved_tensors
        gradient = gradients[0].to(scale.dtype)
        sums = torch.stack([gradient.sum(ctx.axes), (gradient * y).sum(ctx.axes)])
        dist.all_reduce(sums)
        plain, along = (sums / total).unbind(0)
        inner = gradient - plain.view(ctx.shape) - y * along.view(ctx.shape)
        return (inner * scale.view(ctx.shape)).to(y.dtype), None
