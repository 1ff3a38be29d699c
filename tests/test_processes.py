"""Several processes train the network that one would: shares of batches, statistics, gradients, votes."""

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from conftest import Quiet, exact
from ddnn import data, recipe
from ddnn.checkpoint import RunFolder
from ddnn.data.batches import own_rows
from ddnn.errors import Preempted, RunError
from ddnn.processes import ALONE, Processes, check_divides, meet, synchronised_norms
from ddnn.trained import load_data
from ddnn.trainer import train
from launching import EXACT, finished, furthest, steps_kept, torchrun

Make = Callable[..., RunFolder]
CPU = torch.device("cpu")


@pytest.mark.parametrize(("batch", "accumulate", "count"), [(12, 1, 3), (12, 2, 3), (16, 4, 2), (8, 1, 1)])
def test_processes_share_every_piece_of_a_batch_evenly(batch: int, accumulate: int, count: int) -> None:
    rows = [own_rows(batch, accumulate, (k, count)) for k in range(count)]
    assert sorted(torch.cat(rows).tolist()) == list(range(batch))
    size = batch // accumulate
    for own in rows:
        pieces = [set((piece // size).tolist()) for piece in own.chunk(accumulate)]
        assert pieces == [{j} for j in range(accumulate)]  # a process's j-th piece is of the batch's j-th piece


@pytest.mark.parametrize("policy", ["none", "trivialaugment"])  # the batch at once, and image by image
def test_parts_put_together_are_the_whole_batch_bitwise(policy: str) -> None:
    changes = [f"augment.policy={policy}", "augment.crop=pad", "augment.flip=true", "augment.erasing=0.5"]
    chosen = recipe.load("digits", [*changes, "data.limit=60", "train.batch_size=24", "data.workers=0"])
    images = load_data(chosen)

    def batches(part: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
        return list(data.train_batches(images, chosen, epoch=3, device=CPU, part=part))

    parts = [batches((k, 3)) for k in range(3)]
    for i, (x, target) in enumerate(batches((0, 1))):
        assert torch.equal(torch.cat([part[i][0] for part in parts]), x)
        assert torch.equal(torch.cat([part[i][1] for part in parts]), target)


@pytest.mark.parametrize("count", [2, 3, 7])  # 7: some have nothing
def test_evaluation_shows_every_image_to_one_process(count: int) -> None:
    chosen = recipe.load("digits", ["data.limit=50"])
    images = load_data(chosen)
    seen = [
        x for k in range(count) for x, _ in data.eval_batches(images, images.test, 9, CPU, part=(k, count))
    ]  # fmt: skip
    whole = torch.cat([x for x, _ in data.eval_batches(images, images.test, 9, CPU)])
    assert torch.equal(torch.cat(seen).flatten(1).sort(0).values, whole.flatten(1).sort(0).values)


def test_a_batch_that_cannot_be_shared_evenly_is_refused() -> None:
    check_divides(24, 2, 3)
    with pytest.raises(RunError, match=r"train.batch_size=64 cannot be shared evenly by 3 processes; .*multiple of 3"):
        check_divides(64, 1, 3)
    with pytest.raises(RunError, match="multiple of 8"):
        check_divides(12, 4, 2)


def test_a_process_alone_talks_to_itself() -> None:
    assert [ALONE.agree(wish) for wish in (0, 2, 1)] == [0, 2, 1]
    assert ALONE.from_first("this") == "this"
    assert ALONE.first
    net = nn.BatchNorm2d(3)
    with synchronised_norms(net, ALONE):
        assert type(net) is nn.BatchNorm2d


def meeting(store: dist.HashStore, ranks: list[int], count: int, patience_s: float = 20) -> list[str]:
    """What `meet` returns to each of these, in threads of their own."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda rank: meet(store, rank, count, timedelta(seconds=patience_s)), ranks))


def test_processes_meet_under_a_name_that_no_attempt_had_before() -> None:
    """Though the store still holds what earlier attempts left there, one of which never got as far."""
    store = dist.HashStore()
    first = meeting(store, [0, 1, 2], 3)
    with pytest.raises(RunError, match=r"not all 3 processes came within 0.2 s"):
        meeting(store, [0, 2], 3, patience_s=0.2)
    with pytest.raises(RunError, match="not all 3 processes came"):
        meeting(store, [1], 3, patience_s=0.2)
    again = meeting(store, [2, 1, 0], 3)
    assert len({*first}) == len({*again}) == 1
    assert first[0] != again[0]


# -- two processes ------------------------------------------------------------------------------------------------


def norms() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net.double().train()


def images(count: int) -> Tensor:
    return 5 + torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double()


def sharpness(y: Tensor) -> Tensor:
    return (y.tanh() * torch.linspace(-1, 1, y[0].numel()).double().view(y[0].shape)).sum()


def work(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    both = Processes(rank, 2, dist.group.WORLD)

    # batch norm over unequal parts: 4 and 2 of the 6 images
    net, x = norms(), images(6).requires_grad_()
    mine = slice(0, 4) if rank == 0 else slice(4, 6)
    with synchronised_norms(net, both):
        for _ in range(2):
            y = net(x[mine])
        sharpness(y).backward()
        assert torch.equal(net.eval()(images(2)), nn.Sequential(*net)(images(2)))
    assert [type(m) for m in net] == [nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d]
    assert x.grad is not None
    gradients = {name: both.sum(p.grad) for name, p in net.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save({"y": y[:4], "x": x.grad[mine], "state": net.state_dict(), **gradients}, folder / "norms.pt")

    # the highest wish of both comes back with the next call
    wishes = [[0, 1, 0, 2, 0, 0], [0, 0, 2, 0, 0, 0]][rank]
    assert [both.agree(wish) for wish in wishes] == [0, 0, 1, 2, 2, 0]
    assert both.agree(0) == 0
    assert both.most(float(rank)) == 1.0
    assert both.from_first(f"of {rank}") == "of 0"

    # averaged gradients; none where nobody has one
    a, b = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))
    a.grad = torch.full((2, 3), 1.0 + rank)
    both.average_gradients([a, b])
    assert torch.equal(a.grad, torch.full((2, 3), 1.5))
    assert b.grad is None

    both.check_same("the recipe", "equal")
    with pytest.raises(RunError, match=r"the data of process 1 on \S+ is not that of process 0"):
        both.check_same("the data", f"of {rank}")
    both.agree(0)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(work, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    found = torch.load(tmp_path / "norms.pt", weights_only=True)
    net, x = norms(), images(6).requires_grad_()
    for _ in range(2):
        y = net(x)
    sharpness(y).backward()
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(found["y"], y[:4], **close)
    assert x.grad is not None
    torch.testing.assert_close(found["x"], x.grad[:4], **close)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, **close)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(found["state"][name], tensor, **close)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "count"),
    [
        ((), 2),
        (("train.lean=true", "optim.clip_norm=1", "train.ema=0.9"), 2),
        (("train.accumulate=2", "objective.ramp=[0.5, 1]", "objective.subnet_weight={resnet8=0, resnet14=1}"), 2),
        (("augment.crop=pad", "augment.flip=true", "augment.erasing=0.5", "network.head=private"), 4),
        (("train.full_net_share=0.5", "train.accumulate=2"), 2),
    ],
    ids=["plain", "lean", "pieces, a net without a term", "changed images", "sub-nets that join"],
)  # fmt: skip
def test_any_number_of_processes_trains_the_same_weights(how: tuple[str, ...], count: int, tmp_path: Path) -> None:
    """To 1e-9 in float64: rounding of sums in another order is all that differs."""
    unchanged = ("augment.flip=false", "augment.crop=none")
    recipe_ = ("digits", *EXACT, *unchanged, *how)
    train(RunFolder.create(tmp_path / "1", recipe.load(recipe_[0], list(recipe_[1:]))), Quiet())
    printed = finished(torchrun(count, *recipe_, "--out", tmp_path / "many"))
    assert printed.count("test set, last epoch") == 1  # one process speaks, and writes
    assert furthest(tmp_path / "1", tmp_path / "many") < 1e-9
    one, many = (RunFolder.open(tmp_path / name) for name in ("1", "many"))
    assert one.metrics()[-1]["validation"] == many.metrics()[-1]["validation"]
    for net, row in (many.read_json("summary.json") or {})["subnets"].items():
        assert row["top1"] == (one.read_json("summary.json") or {})["subnets"][net]["top1"]


@pytest.mark.slow
def test_without_synchronised_norms_it_trains_too_and_differs(tmp_path: Path) -> None:
    train(RunFolder.create(tmp_path / "1", recipe.load("digits", list(EXACT))), Quiet())
    finished(torchrun(2, "digits", *EXACT, "train.sync_norm=false", "--out", tmp_path / "2"))
    assert furthest(tmp_path / "1", tmp_path / "2") > 1e-3


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes_and_says_what_is_not_exact(tmp_path: Path, tiny: Make) -> None:
    folder = tmp_path / "run"
    chosen = recipe.load("digits", list(EXACT))

    class Stopped(Exception):  # noqa: N818
        pass

    class At(Quiet):
        def epoch(self, metrics: dict[str, object]) -> None:
            raise Stopped

    with pytest.raises(Stopped):
        train(RunFolder.create(folder, chosen), At())
    assert steps_kept(folder)[-1] == 5
    printed = finished(torchrun(2, "--resume", folder))
    assert "on 1 process(es) until step 5 and goes on with 2" in printed
    assert "no longer bitwise" in printed
    train(RunFolder.create(tmp_path / "whole", chosen), Quiet())
    assert furthest(folder, tmp_path / "whole") < 1e-9


def test_launched_processes_need_one_place(
    ddnn: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    code, _, err = ddnn("train", "digits")
    assert code == 2
    assert "--out" in err
    code, _, err = ddnn("train", "no-such-recipe", "--out", "x")
    assert code == 2
    assert not err  # process 0 says it


def test_an_existing_run_of_the_same_recipe_is_gone_on_with(tiny: Make) -> None:
    run = tiny("run")
    assert RunFolder.create_or_open(run.path, run.recipe).recipe == run.recipe
    other = run.recipe.model_copy(update={"train": run.recipe.train.model_copy(update={"epochs": 7})})
    with pytest.raises(RunError, match="holds a run of another recipe"):
        RunFolder.create_or_open(run.path, other)


# -- SIGTERM ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 5, 7])  # of 5 steps an epoch
def test_sigterm_keeps_the_step_it_came_in(tiny: Make, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddnn.trainer.LOOK_EVERY", 1)
    often = "train.checkpoint_minutes=5"
    before = signal.getsignal(signal.SIGTERM)
    run, whole = tiny("run", often), tiny("whole", often)
    with pytest.raises(Preempted, match=rf"SIGTERM after step {step}, .*--resume {run.path}"):
        train(run, Quiet(lambda done: signal.raise_signal(signal.SIGTERM) if done == step else None))
    assert steps_kept(run.path)[-1] == step
    assert signal.getsignal(signal.SIGTERM) == before
    train(RunFolder.open(run.path), Quiet())
    train(whole, Quiet())
    ours, theirs = ((each.path / "model.safetensors").read_bytes() for each in (run, whole))
    assert ours == theirs
    assert exact(run) == exact(whole)


def test_what_another_process_was_asked_in_the_last_step_of_an_epoch_ends_this_one(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no step after it in which the two would agree."""
    monkeypatch.setattr(Processes, "most", lambda *_: 1.0)
    run = tiny("run")
    with pytest.raises(Preempted, match=r"SIGTERM after step 5, of which a checkpoint was kept"):
        train(run, Quiet())
    assert steps_kept(run.path)[-1] == 5


def test_sigterm_is_not_taken_for_an_error_of_what_it_interrupts(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception as error:
            raise ValueError("a network that can't run") from error

    monkeypatch.setattr("ddnn.trainer.build", interrupted)
    run = tiny("run")
    with pytest.raises(Preempted, match=f"stopped by SIGTERM; go on with: ddnn train --resume {run.path}"):
        train(run, Quiet())


def test_sigterm_between_epochs_ends_at_once(tiny: Make) -> None:
    class Between(Quiet):
        def epoch(self, metrics: dict[str, object]) -> None:
            signal.raise_signal(signal.SIGTERM)

    run = tiny("run")
    with pytest.raises(Preempted):
        train(run, Between())
    assert steps_kept(run.path)[-1] == 5
    assert train(RunFolder.open(run.path), Quiet())["epochs"] == 2
    assert [epoch["epoch"] for epoch in run.metrics()] == [1, 2]


def test_a_step_interval_for_checkpoints(tiny: Make) -> None:
    seen: list[list[int]] = []
    run = tiny("run", "train.checkpoint_minutes=5", "train.checkpoint_steps=2")

    class Looking(Quiet):
        def epoch(self, metrics: dict[str, object]) -> None:
            seen.append(steps_kept(run.path))

    train(run, Looking())
    assert seen == [[4, 5], [8, 10]]
