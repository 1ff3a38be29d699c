"""A queue before a model: how deep it answers, what it refuses, and the same over HTTP."""

import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import bundles
import ddnn
from ddnn.errors import BundleError, OverloadError, RequestError
from ddnn.runtime import server
from ddnn.runtime import service as service_module
from ddnn.runtime.model import Model
from ddnn.runtime.service import Service, _Demand, _Pace, in_time, ladder

DEEP = ["large", "middle", "small"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.make(tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture
def model(bundle: Path) -> Model:
    return ddnn.load(bundle, threads=1)


def slowed(model: Model, monkeypatch: pytest.MonkeyPatch, **milliseconds: float) -> dict[str, float]:
    """Let each depth sleep so long for every image; the mapping returned may be changed later."""
    run = Model.__call__

    def slow(self: Model, images: Any, depth: str | None = None) -> Any:
        time.sleep(milliseconds[depth or "large"] * len(images) / 1000)
        return run(self, images, depth)

    monkeypatch.setattr(Model, "__call__", slow)
    return milliseconds


class Gate:
    """Lets no batch end until it is opened."""

    def __init__(self) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()

    def shut(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run = Model.__call__

        def held(model: Model, images: Any, depth: str | None = None) -> Any:
            self.reached.set()
            assert self.opened.wait(60)
            return run(model, images, depth)

        monkeypatch.setattr(Model, "__call__", held)


def image(seed: int = 0) -> np.ndarray:
    return bundles.normalised(seed + 1)[seed]


# ---- the plan


@pytest.mark.parametrize(
    ("arrivals", "free", "fits"),
    [  # batches of 1 take 3, of 2 take 5; 10 is in time
        ([], [5.0], True),
        ([0.0], [0.0], True),  # alone: 3
        ([0.0], [7.0], True),  # the worker is busy until 7, and done at 10
        ([0.0], [7.1], False),
        ([0.0, 0.0], [5.0], True),  # both together take 5
        ([0.0, 0.0], [5.1], False),
        ([0.0, 0.0, 0.0], [2.0], True),  # two until 7, the third until 10
        ([0.0, 0.0, 0.0], [2.1], False),
        ([0.0, 0.0, 0.0], [5.0, 7.0], True),  # by two workers
        ([0.0, 0.0, 0.0], [5.0, 7.1], False),
        ([0.0, 1.0], [0.0], True),  # the first does not wait for the second: until 3, then until 6
        ([0.0, 0.0, 12.0], [5.0], True),  # what comes later finds a worker that waits
    ],
)
def test_images_are_in_time_if_the_batches_they_run_in_are(
    arrivals: list[float], free: list[float], fits: bool
) -> None:
    assert in_time(arrivals, 10.0, free, [0.0, 3.0, 5.0], [0.0] * 3, len(arrivals)) is fits


def test_those_who_wait_for_their_answers_send_no_more_than_they_are() -> None:
    arrivals = [0.1 * i for i in range(100)]  # one by one a worker can do three in a second

    def fits(seconds: list[float], peak: int) -> bool:
        return in_time(arrivals, 1.0, [0.0], seconds, [0.0] * len(seconds), peak)

    assert not fits([0.0, 0.3], peak=100)
    assert fits([0.0, 0.3], peak=1)
    assert fits([0.0, 0.3], peak=3)
    assert not fits([0.0, 0.3], peak=4)
    assert fits([0.0, 0.3, 0.4, 0.5, 0.5], peak=8)  # four wait while four run
    assert not fits([0.0, 0.3, 0.4, 0.5, 0.6], peak=8)


def test_one_batch_may_take_longer_but_not_all_of_them() -> None:
    for margin, fits in ((1.0, True), (1.1, False)):
        assert in_time([0.0] * 3, 10.0, [0.0], [0.0, 3.0], [0.0, margin], 3) is fits


def test_those_who_are_lost_need_not_be_in_time_but_take_their_turn() -> None:
    seconds, margins = [0.0, 3.0, 5.0], [0.0] * 3
    assert not in_time([-8.0, 0.0], 10.0, [0.0], seconds, margins, 2)
    assert in_time([-8.0, 0.0], 10.0, [0.0], seconds, margins, 2, lost=1)
    assert not in_time([-8.0, 0.0], 10.0, [6.0], seconds, margins, 2, lost=1), "together they take until 11"
    assert in_time([-8.0, 0.0], 10.0, [6.0], seconds, margins, 2, lost=2)


def test_pace_follows_what_is_seen_and_is_not_startled() -> None:
    pace = _Pace({"a": [0.0, 1.0, 1.5], "b": [0.0, 2.0, 3.0]})
    assert pace.expected("a") == ([0.0, 1.0, 1.5], pytest.approx([0.0, 0.2, 0.3]))
    pace.saw("a", 1, 1000.0)
    seconds, margins = pace.expected("b")
    assert seconds == pytest.approx([0.0, 2.5, 3.75]), "three times as long, an eighth of it"
    assert margins == pytest.approx([0.0, 2.3, 3.45])
    for _ in range(200):
        pace.saw("b", 2, 6.0)
    assert pace.expected("a")[0] == pytest.approx([0.0, 2.0, 3.0]), "twice as slow, whatever the depth"
    assert pace.expected("a")[1] == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)


def test_demand_is_how_many_came_lately_and_fades() -> None:
    demand = _Demand(10.0)
    for i in range(1000):
        demand.saw(i / 10, there=1 + i % 3)
    coming = demand.expected(100.0, 2.0)
    assert coming == pytest.approx([100.0 + 0.1 * (i + 1) for i in range(len(coming))], rel=0.02)
    assert len(coming) in (19, 20)
    assert (demand.peak(100.0, 0), demand.peak(100.0, 5)) == (3, 5)
    assert demand.expected(200.0, 2.0) == []
    assert demand.peak(200.0, 0) == 1


# ---- answers


def test_an_answer_is_that_of_the_depth_it_names(model: Model) -> None:
    with Service(model, latency_ms=60000) as service:
        futures = [service.submit(image(i)) for i in range(20)]
        answers = [future.result() for future in futures]
        counts = service.counts()
    for i, answer in enumerate(answers):
        expected = bundles.reference(answer.depth, image(i)[None])[0]
        assert np.abs(answer.logits - expected).max() < 1e-5 * np.abs(expected).max()
        assert 0 < answer.latency_ms < 60000
    assert sum(counts.answered.values()) == 20
    assert counts[1:] == (0, 0, 0, 0, 0)


def test_raw_pixels_are_taken_as_a_model_takes_them(model: Model) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (21, 13, 3), dtype=np.uint8)
    with Service(model, latency_ms=60000) as service:
        answer = service.submit(pixels).result()
    np.testing.assert_allclose(answer.logits, model(pixels[None], answer.depth)[0], rtol=1e-6)


def test_an_array_may_be_changed_once_it_is_submitted(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    with Service(model, latency_ms=60000, workers=1) as service:
        gate.shut(monkeypatch)
        service.submit(image())
        given = image(1)
        future = service.submit(given)
        given[:] = np.nan
        gate.opened.set()
        answer = future.result()
    expected = bundles.reference(answer.depth, image(1)[None])[0]
    assert np.abs(answer.logits - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_ladder_leads_from_the_most_accurate_to_the_fastest(model: Model) -> None:
    def rungs(**milliseconds: float) -> list[str]:
        return ladder(model, {name: [0.0, seconds] for name, seconds in milliseconds.items()})

    assert rungs(small=1, middle=2, large=3) == DEEP
    assert rungs(small=2, middle=1, large=3) == ["large", "middle"], "who is slower and less accurate never runs"
    assert rungs(small=3, middle=3, large=3) == ["large"]
    for name, top1 in {"small": 0.5, "middle": 0.6, "large": 0.6}.items():
        object.__setattr__(model.nets[name], "top1", top1)
    assert rungs(small=1, middle=2, large=3) == ["middle", "small"], "of equally accurate ones the faster"
    object.__setattr__(model.nets["small"], "top1", None)
    assert rungs(small=1, middle=2, large=3) == DEEP, "it is not known"


def test_with_little_to_do_the_deepest_answers_and_with_much_a_shallower_one(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(model, monkeypatch, small=1, middle=10, large=20)
    with Service(model, latency_ms=200, batch=4, workers=1) as service:
        assert service.submit(image()).result().depth == "large"
        many = [service.submit(image()) for _ in range(16)]  # 320, 160 or 16 ms
        depths = [future.result().depth for future in many]
    assert set(depths) & {"middle", "small"}


def test_what_no_depth_can_answer_in_time_is_refused_when_it_comes(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(model, monkeypatch, small=20, middle=30, large=40)
    with Service(model, latency_ms=100, batch=2, workers=1) as service:
        taken = []

        def ask() -> None:
            while len(taken) < 50:
                taken.append(service.submit(image()))

        with pytest.raises(
            OverloadError, match=r"images wait; one that came \d+ ms ago could not be answered in 100 ms"
        ):
            ask()
        with pytest.raises(OverloadError):
            service.expect()
        assert len(taken) < 50
        assert all(future.result() for future in taken)
        assert service.counts().refused == 2
        service.expect()
        assert service.submit(image()).result(), "and later there is time again"


def test_what_is_late_already_is_refused(model: Model) -> None:
    with Service(model, latency_ms=5000) as service:
        with pytest.raises(
            OverloadError, match=r"0 images wait; one that came \d+ ms ago could not be answered in 5000"
        ):
            service.submit(image(), arrived=time.monotonic() - 6)
        assert service.submit(image(), arrived=time.monotonic() - 1).result().latency_ms > 1000


def test_time_that_it_takes_to_resize_counts(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: Any) -> Any:
        time.sleep(0.15)
        return bundles.normalised(1)

    with Service(model, latency_ms=100) as service:
        monkeypatch.setattr(service_module, "batch_of", slow)
        with pytest.raises(OverloadError, match=r"could not be answered in 100 ms"):
            service.submit(np.zeros((9, 9, 3), np.uint8))


def test_one_that_is_lost_keeps_no_others_out(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    with Service(model, latency_ms=10000, workers=1) as service:
        service._pace.base = {name: [0.5 * i for i in range(9)] for name in model.nets}
        gate.shut(monkeypatch)
        futures = [service.submit(image())]
        assert gate.reached.wait(60)
        service._waiting.append(
            service_module._Waiting(time.monotonic() - 9.9, image(), Future())
        )  # nothing can answer that in time
        futures.append(service.submit(image()))
        with pytest.raises(OverloadError):
            service.submit(image(), arrived=time.monotonic() - 9.8)
        gate.opened.set()
        assert all(future.result() for future in futures)


def test_those_that_came_first_run_first(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, order = Gate(), []
    with Service(model, latency_ms=60000, batch=1, workers=1) as service:
        gate.shut(monkeypatch)
        service.submit(image())
        assert gate.reached.wait(60)
        now = time.monotonic()
        for ago in (1, 3, 2):
            service.submit(image(), arrived=now - ago).add_done_callback(lambda _, ago=ago: order.append(ago))
        gate.opened.set()
    assert order == [3, 2, 1]


def test_no_more_wait_than_may(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    with Service(model, latency_ms=60000, batch=1, workers=1, waiting=3) as service:
        gate.shut(monkeypatch)
        futures = [service.submit(image())]
        assert gate.reached.wait(60)
        futures += [service.submit(image()) for _ in range(3)]
        with pytest.raises(OverloadError, match="3 images wait"):
            service.submit(image())
        assert service.counts()[-2:] == (3, 1)
        assert futures.pop().cancel()
        futures.append(service.submit(image()))  # in its place
        gate.opened.set()
        assert all(future.result() for future in futures)


def test_a_machine_that_was_slow_for_a_while_answers_deep_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    taking = slowed(model, monkeypatch, small=1, middle=2, large=4)
    with Service(model, latency_ms=40, workers=1) as service:
        taking.update(small=60, middle=60, large=60)
        for _ in range(10):
            service.submit(image()).result()
        assert service.submit(image()).result().depth == "small", "nothing seems quick enough, but nothing waits"
        assert service.counts().late == 11
        taking.update(small=1, middle=2, large=4)
        depths = [service.submit(image()).result().depth for _ in range(300)]
    assert "large" in depths[:200]
    assert "large" in depths[200:], "though whoever asks asks more often, the quicker the answers"


@pytest.mark.parametrize("clients", [1, 8])
def test_those_who_ask_again_when_they_are_answered_are_no_more_than_they_are(model: Model, clients: int) -> None:
    left = [300]
    done = threading.Event()
    with Service(model, latency_ms=60000, workers=1) as service:

        def again(_: Any) -> None:
            left[0] -= 1
            if left[0] > 0:
                service.submit(image()).add_done_callback(again)
            else:
                done.set()

        for _ in range(clients):
            service.submit(image()).add_done_callback(again)
        assert done.wait(60)
        assert service._demand._peak <= clients


def test_closing_answers_what_waits_and_takes_no_more(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(model, monkeypatch, small=5, middle=5, large=5)
    service = Service(model, latency_ms=60000, batch=1, workers=2)
    futures = [service.submit(image()) for _ in range(8)]
    futures[-1].add_done_callback(lambda _: service.close())  # in a worker, which does not wait for itself
    service.close()
    assert all(future.done() for future in futures)
    with pytest.raises(RequestError, match="this service is closed"):
        service.submit(image())
    service.close()


def test_one_that_is_cancelled_is_not_run(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    with Service(model, latency_ms=60000, batch=1, workers=1) as service:
        gate.shut(monkeypatch)
        first = service.submit(image())
        assert gate.reached.wait(60)
        second, third, fourth = (service.submit(image()) for _ in range(3))
        assert second.cancel()
        third.set_exception(KeyError())  # whose future it is can do that as well
        gate.opened.set()
        assert first.result()
        assert fourth.result()
    assert sum(service.counts().answered.values()) == 2


def test_an_error_reaches_whoever_asked_and_the_service_goes_on(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with Service(model, latency_ms=60000, workers=1) as service:
        with monkeypatch.context() as broken:

            def changed(*_: object) -> None:
                raise BundleError("weights.bin has changed")

            broken.setattr(Model, "__call__", changed)
            with pytest.raises(BundleError, match=r"weights.bin has changed"):
                service.submit(image()).result()
        assert service.submit(image()).result()
        assert service.counts().failed == 1


def test_what_is_called_with_an_answer_may_fail_and_the_service_goes_on(model: Model) -> None:
    with Service(model, latency_ms=60000, workers=1) as service:
        service.submit(image()).add_done_callback(lambda _: sys.exit(3))
        assert service.submit(image()).result(timeout=60)


def test_many_threads_may_submit(model: Model) -> None:
    found: dict[int, Any] = {}
    with Service(model, latency_ms=60000, workers=2) as service:

        def ask(number: int) -> None:
            for i in range(number, 64, 4):
                found[i] = service.submit(image(i)).result()

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, answer in found.items():
        expected = bundles.reference(answer.depth, image(i)[None])[0]
        assert np.abs(answer.logits - expected).max() < 1e-5 * np.abs(expected).max()
    assert len(found) == 64


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"latency_ms": 0}, "latency_ms=0 must be a number from 0.01 to 1000000000"),
        ({"latency_ms": float("nan")}, "latency_ms=nan must be a number"),
        ({"latency_ms": 5, "batch": 0}, "batch=0 must be a whole number from 1 to 1024"),
        ({"latency_ms": 5, "workers": 1.5}, "workers=1.5 must be a whole number from 1 to 256"),
        ({"latency_ms": 5, "workers": 60000}, "workers=60000 must be a whole number"),
        ({"latency_ms": 5, "waiting": True}, "waiting=True must be a whole number from 1 to 8192"),
    ],
)
def test_numbers_that_cannot_be_are_named(model: Model, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Service(model, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((np.zeros((5, 5), np.uint8),), r"the image is uint8 \[5, 5\]; allowed are"),
        ((np.zeros((2, 8, 8, 3), np.uint8),), r"the image is uint8 \[2, 8, 8, 3\]; allowed are"),
        ((np.zeros((8, 8, 3), np.int64),), "int64"),
        ((np.full((3, 8, 8), np.nan, np.float32),), "pixels that are NaN"),
        (([[1], [2, 3]],), "the image is no array"),
        ((None,), "the image is object"),
        ((np.zeros((8, 8, 3), np.uint8), float("nan")), r"arrived=nan must be a time.monotonic\(\)"),
        ((np.zeros((8, 8, 3), np.uint8), "now"), r"arrived='now' must be"),
    ],
)
def test_what_is_no_image_or_moment_is_refused_at_once(model: Model, given: tuple[Any, ...], message: str) -> None:
    with Service(model, latency_ms=100) as service, pytest.raises(RequestError, match=message):
        service.submit(given[0], arrived=given[1] if len(given) > 1 else None)


# ---- over HTTP


@contextmanager
def served(model: Model, host: str = "127.0.0.1", **arguments: Any) -> Iterator[tuple[str, Service]]:
    """A server in a thread of this process, and the service behind it."""
    import uvicorn

    started: list[str] = []
    made: list[uvicorn.Server] = []

    class Kept(uvicorn.Server):
        def __init__(self, config: uvicorn.Config) -> None:
            super().__init__(config)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch, Service(model, **arguments) as service:
        patch.setattr(uvicorn, "Server", Kept)
        listening = server.listen(host, 0)
        thread = threading.Thread(target=server.serve, args=(service, listening, started.append))
        thread.start()
        while not (made and made[0].started):
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield started[0].removeprefix("http://"), service
        finally:
            made[0].should_exit = True
            thread.join()
            listening.close()


def asked(
    address: str, method: str = "POST", path: str = "/predict", body: bytes = b""
) -> tuple[int, dict[str, Any], http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.request(method, path, body)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content, response


def photo(size: tuple[int, int] = (13, 21)) -> bytes:
    pixels = np.random.default_rng(5).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_an_image_over_http_is_answered_as_predict_answers(model: Model, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(photo())
    with served(model, latency_ms=60000) as (address, service):
        status, content, _ = asked(address, path="/predict?top=2", body=photo())
        assert status == 200
        expected = model.predict(tmp_path / "photo.png", content["depth"], top=2)
        assert [each["class"] for each in content["classes"]] == [name for name, _ in expected.classes]
        for each, (_, sure) in zip(content["classes"], expected.classes, strict=True):
            assert each["confidence"] == pytest.approx(sure, rel=1e-5)
        assert 0 < content["latency_ms"] < 60000
        status, content, _ = asked(address, "GET", "/")
        assert status == 200
        assert list(content["depths"]) == list(model.nets)
        assert content["answered"] == service.counts().answered
        assert [content[key] for key in ("late", "refused", "failed", "waiting", "running")] == [0] * 5


def test_what_http_does_not_accept_ends_in_a_sentence(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_BYTES", 20000)
    monkeypatch.setattr(server, "MOST_PIXELS", 5000)
    with served(model, latency_ms=60000) as (address, _):
        for given, status, sentence in (
            ({"body": b"no image"}, 400, "the body cannot be read as an image: it is none of JPEG, PNG"),
            ({"body": photo()[:200]}, 400, "the body cannot be read as an image: "),
            ({"body": photo((80, 70))}, 400, "the body cannot be read as an image: 80 x 70 pixels are more than the "),
            ({"body": photo((2, 2000))}, 400, "an image of 2 x 2000 pixels is too long and narrow"),
            ({"body": bytes(30000)}, 413, "the body is larger than 20000 bytes"),
            ({"body": photo(), "path": "/predict?top=0"}, 400, "top=0 must be a whole number"),
            ({"body": photo(), "path": "/predict?top=some"}, 400, "top=some must be a whole number"),
            ({"body": photo(), "path": f"/predict?top=1{'0' * 5000}"}, 400, "top=10000000000000000000 must be"),
            ({"body": photo(), "path": "/predict?depth=small"}, 400, "depth is no parameter of /predict; top is the"),
            ({"path": "/elsewhere"}, 404, "Not Found"),
            ({"method": "GET"}, 405, "Method Not Allowed"),
        ):
            found, content, _ = asked(address, **given)  # type: ignore[arg-type]
            assert found == status
            assert content["error"].startswith(sentence)
        assert asked(address, body=photo())[0] == 200


def test_a_body_that_does_not_come_is_not_waited_for(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_SECONDS", 0.2)
    with served(model, latency_ms=60000) as (address, _):
        connection = http.client.HTTPConnection(address, timeout=30)
        connection.putrequest("POST", "/predict")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"begins")
        response = connection.getresponse()
        assert response.status == 408
        assert "did not come in 0.2 s" in json.loads(response.read())["error"]
        connection.close()


def test_a_client_that_goes_leaves_no_traceback(
    model: Model, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with served(model, latency_ms=60000) as (address, _):
        host, port = address.split(":")
        with socket.create_connection((host, int(port))) as gone:
            gone.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nbeg")
            time.sleep(0.1)
        assert asked(address, body=photo())[0] == 200
    assert "Traceback" not in "".join(capfd.readouterr())
    assert not caplog.records


def test_overload_is_a_503_that_says_to_come_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, decoded = Gate(), []
    with served(model, latency_ms=60000, batch=1, workers=1, waiting=1) as (address, service):
        gate.shut(monkeypatch)
        service.submit(image())
        assert gate.reached.wait(60)
        service.submit(image())
        with monkeypatch.context() as patched:
            patched.setattr(server, "from_bytes", lambda *given: decoded.append(given))
            status, content, response = asked(address, body=photo())
        gate.opened.set()
        assert status == 503
        assert content["error"].startswith("1 images wait; one that came ")
        assert response.headers["Retry-After"] == "1"
        assert not decoded, "it is refused before it is decoded"


def test_errors_that_nobody_expects_are_json_too(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    with served(model, latency_ms=60000) as (address, service):
        monkeypatch.setattr(Model, "__call__", broken)
        status, content, _ = asked(address, body=photo())
        assert (status, content["error"]) == (500, "internal error (ZeroDivisionError)")
        assert service.counts().failed == 1
    assert "internal error" in caplog.text


@pytest.mark.parametrize(("asking", "answered"), [(signal.SIGINT, 1), (signal.SIGTERM, 0)])
def test_the_command_serves_until_it_is_asked_to_end(bundle: Path, asking: signal.Signals, answered: int) -> None:
    """Be it right after it says that it is ready."""
    command = [sys.executable, "-m", "ddnn", "serve", str(bundle), "--latency-ms", "60000", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            takes, line = process.stderr.readline(), process.stderr.readline()
            address = line.removeprefix("POST an image to http://").partition("/")[0]
            found = [asked(address, body=photo())[0] for _ in range(answered)]
            process.send_signal(asking)
            _, rest = process.communicate(timeout=60)
        finally:
            process.kill()
    assert found == [200] * answered
    assert process.returncode == 0
    assert re.fullmatch(r"one image takes small [\d.]+ ms, middle [\d.]+ ms, large [\d.]+ ms\n", takes)
    assert re.fullmatch(r"answered by small \d, middle \d, large \d; 0 late, 0 refused, 0 failed\n", rest)


def test_a_time_in_which_no_depth_can_answer_is_refused(bundle: Path) -> None:
    command = [sys.executable, "-m", "ddnn", "serve", str(bundle), "--latency-ms", "0.01", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "error: no depth can answer in 0.01 ms, even without decoding; give a longer time" in done.stderr


def test_an_address_that_cannot_be_listened_at_is_named() -> None:
    with server.listen("127.0.0.1", 0) as taken:
        for host, port in (
            ("127.0.0.1", taken.getsockname()[1]),
            ("", 0),
            ("\u00fc" * 70, 0),
            ("no.such.host.invalid", 0),
        ):
            with pytest.raises(RequestError, match=f"cannot listen at {host!r}, port {port}: "):
                server.listen(host, port)


def test_it_listens_at_addresses_of_version_6(model: Model) -> None:
    try:
        server.listen("::1", 0).close()
    except RequestError:
        pytest.skip("this machine has none")
    with served(model, "::1", latency_ms=60000) as (address, _):
        assert re.fullmatch(r"\[::1\]:\d+", address)
        assert asked(address, body=photo())[0] == 200
