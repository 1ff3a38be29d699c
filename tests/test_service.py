"""A queue before a model: how deep it answers, what it refuses, and the same over HTTP."""

import http.client
import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
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
from ddnn.runtime.model import Model
from ddnn.runtime.service import Service, by_accuracy, in_time

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
    assert in_time(arrivals, 10.0, free, [0.0, 3.0, 5.0], [0.0] * 3, most=len(arrivals)) is fits


def test_those_who_wait_for_their_answers_send_no_more_than_they_are() -> None:
    arrivals = [0.1 * i for i in range(100)]  # one by one a worker can do three in a second

    def fits(seconds: list[float], most: int) -> bool:
        return in_time(arrivals, 1.0, [0.0], seconds, [0.0] * len(seconds), most)

    assert not fits([0.0, 0.3], most=100)
    assert fits([0.0, 0.3], most=1)
    assert fits([0.0, 0.3], most=3)
    assert not fits([0.0, 0.3], most=4)
    assert fits([0.0, 0.3, 0.4, 0.5, 0.5], most=8)  # four wait while four run
    assert not fits([0.0, 0.3, 0.4, 0.5, 0.6], most=8)


def test_one_batch_may_take_longer_but_not_all_of_them() -> None:
    for margin, fits in ((1.0, True), (1.1, False)):
        assert in_time([0.0] * 3, 10.0, [0.0], [0.0, 3.0], [0.0, margin], most=3) is fits


# ---- answers


def test_an_answer_is_that_of_the_depth_it_names(model: Model) -> None:
    with Service(model, latency_ms=2000) as service:
        futures = [service.submit(image(i)) for i in range(20)]
        answers = [future.result() for future in futures]
    for i, answer in enumerate(answers):
        expected = bundles.reference(answer.depth, image(i)[None])[0]
        assert np.abs(answer.logits - expected).max() < 1e-5 * np.abs(expected).max()
        assert 0 < answer.latency_ms < 2000
    counts = service.counts()
    assert (sum(counts.answered.values()), counts.late, counts.refused, counts.waiting) == (20, 0, 0, 0)


def test_raw_pixels_are_taken_as_a_model_takes_them(model: Model) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (21, 13, 3), dtype=np.uint8)
    with Service(model, latency_ms=2000) as service:
        answer = service.submit(pixels).result()
    np.testing.assert_allclose(answer.logits, model(pixels[None], answer.depth)[0], rtol=1e-6)


def test_the_most_accurate_come_first(bundle: Path, model: Model, tmp_path: Path) -> None:
    assert by_accuracy(model) == DEEP  # it is not known
    for name, top1 in {"small": 0.5, "middle": 0.7, "large": 0.6}.items():
        object.__setattr__(model.nets[name], "top1", top1)
    assert by_accuracy(model) == ["middle", "large", "small"]


def test_with_little_to_do_the_deepest_answers_and_with_much_a_shallower_one(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(model, monkeypatch, small=1, middle=10, large=20)
    with Service(model, latency_ms=200, batch=4, workers=1) as service:
        for i in range(3):
            assert service.submit(image(i)).result().depth == "large"
            time.sleep(0.1)
        many = [service.submit(image()) for _ in range(16)]  # 320, 160 or 16 ms
        depths = [future.result().depth for future in many]
    assert set(depths) & {"middle", "small"}
    assert sum(service.counts().answered.values()) == 19


def test_what_no_depth_can_answer_in_time_is_refused_when_it_comes(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(model, monkeypatch, small=20, middle=30, large=40)
    with Service(model, latency_ms=100, batch=2, workers=1) as service:
        taken = []

        def ask() -> None:
            while len(taken) < 50:
                taken.append(service.submit(image()))

        with pytest.raises(OverloadError, match=r"images wait; one that came 0 ms ago could not be answered in 100 ms"):
            ask()
        assert 1 <= len(taken) <= 6
        assert all(future.result() for future in taken)
        assert service.counts().refused == 1
        time.sleep(0.2)
        assert service.submit(image()).result(), "and later there is time again"


def test_what_is_late_already_is_refused(model: Model) -> None:
    with Service(model, latency_ms=100) as service:
        with pytest.raises(
            OverloadError, match=r"0 images wait; one that came \d+ ms ago could not be answered in 100"
        ):
            service.submit(image(), arrived=time.monotonic() - 0.11)
        assert service.submit(image(), arrived=time.monotonic() - 0.01).result().latency_ms > 10


def test_no_more_wait_than_may(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(model, monkeypatch, small=20, middle=20, large=20)
    with Service(model, latency_ms=10000, batch=1, workers=1, waiting=3) as service:
        futures = [service.submit(image())]
        time.sleep(0.01)  # it runs
        futures += [service.submit(image()) for _ in range(3)]
        with pytest.raises(OverloadError, match="3 images wait"):
            service.submit(image())
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
    assert depths.index("large") < 100
    assert depths[-1] == "large", "though whoever asks asks more often, the quicker the answers"


def test_closing_answers_what_waits_and_takes_no_more(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(model, monkeypatch, small=5, middle=5, large=5)
    service = Service(model, latency_ms=5000, batch=1, workers=2)
    futures = [service.submit(image()) for _ in range(8)]
    service.close()
    assert all(future.done() for future in futures)
    with pytest.raises(RequestError, match="this service is closed"):
        service.submit(image())


def test_one_that_is_cancelled_is_not_run(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(model, monkeypatch, small=30, middle=30, large=30)
    with Service(model, latency_ms=5000, batch=1, workers=1) as service:
        first, second, third = (service.submit(image()) for _ in range(3))
        assert second.cancel()
        assert first.result()
        assert third.result()
    assert sum(service.counts().answered.values()) == 2


def test_an_error_reaches_whoever_asked_and_the_service_goes_on(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with Service(model, latency_ms=2000, workers=1) as service:
        with monkeypatch.context() as broken:

            def changed(*_: object) -> None:
                raise BundleError("weights.bin has changed")

            broken.setattr(Model, "__call__", changed)
            with pytest.raises(BundleError, match=r"weights.bin has changed"):
                service.submit(image()).result()
        assert service.submit(image()).result().depth == "large"


def test_many_threads_may_submit(model: Model) -> None:
    found: dict[int, Any] = {}
    with Service(model, latency_ms=10000, workers=2) as service:

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
        ({"latency_ms": 0}, "latency_ms=0 must be a number above 0"),
        ({"latency_ms": float("nan")}, "latency_ms=nan must be a number above 0"),
        ({"latency_ms": 5, "batch": 0}, "batch=0 must be a whole number of at least 1"),
        ({"latency_ms": 5, "workers": 1.5}, "workers=1.5 must be a whole number of at least 1"),
        ({"latency_ms": 5, "waiting": True}, "waiting=True must be a whole number of at least 1"),
    ],
)
def test_numbers_that_cannot_be_are_named(model: Model, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Service(model, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((5, 5), np.uint8), r"the images are uint8 \[1, 5, 5\]; allowed are"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"the images are uint8 \[1, 2, 8, 8, 3\]; allowed are"),
        (np.full((3, 8, 8), np.nan, np.float32), "pixels that are NaN"),
        ([[1], [2, 3]], "the image is no array"),
    ],
)
def test_what_is_no_image_is_refused_at_once(model: Model, given: Any, message: str) -> None:
    with Service(model, latency_ms=100) as service, pytest.raises(RequestError, match=message):
        service.submit(given)


# ---- over HTTP


@contextmanager
def served(model: Model, **arguments: Any) -> Iterator[tuple[str, Service]]:
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
        thread = threading.Thread(target=server.serve, args=(service, "127.0.0.1", 0, started.append))
        thread.start()
        while not (made and made[0].started):
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield started[0].removeprefix("http://"), service
        finally:
            made[0].should_exit = True
            thread.join()


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
    with served(model, latency_ms=2000) as (address, service):
        status, content, _ = asked(address, path="/predict?top=2", body=photo())
        assert status == 200
        expected = model.predict(tmp_path / "photo.png", content["depth"], top=2)
        assert [each["class"] for each in content["classes"]] == [name for name, _ in expected.classes]
        for each, (_, sure) in zip(content["classes"], expected.classes, strict=True):
            assert each["confidence"] == pytest.approx(sure, rel=1e-5)
        assert 0 < content["latency_ms"] < 2000
        status, content, _ = asked(address, "GET", "/")
        assert status == 200
        assert list(content["depths"]) == list(model.nets)
        assert content["answered"] == service.counts().answered
        assert (content["late"], content["refused"], content["waiting"]) == (0, 0, 0)


def test_what_http_does_not_accept_ends_in_a_sentence(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_BYTES", 20000)
    monkeypatch.setattr(server, "MOST_PIXELS", 5000)
    with served(model, latency_ms=2000) as (address, _):
        for given, status, sentence in (
            ({"body": b"no image"}, 400, "the body cannot be read as an image: "),
            ({"body": photo()[:200]}, 400, "the body cannot be read as an image: "),
            ({"body": photo((80, 70))}, 400, "the image has 80 x 70 pixels; allowed are 5000"),
            ({"body": bytes(30000)}, 413, "the body is larger than 20000 bytes"),
            ({"body": photo(), "path": "/predict?top=0"}, 400, "top=0 must be a whole number"),
            ({"body": photo(), "path": "/predict?top=some"}, 400, "top=some must be a whole number"),
            ({"path": "/elsewhere"}, 404, "Not Found"),
            ({"method": "GET"}, 405, "Method Not Allowed"),
        ):
            found, content, _ = asked(address, **given)  # type: ignore[arg-type]
            assert found == status
            assert content["error"].startswith(sentence)
        assert asked(address, body=photo())[0] == 200


def test_a_body_that_does_not_come_is_not_waited_for(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_SECONDS", 0.2)
    with served(model, latency_ms=2000) as (address, _):
        connection = http.client.HTTPConnection(address, timeout=30)
        connection.putrequest("POST", "/predict")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"begins")
        response = connection.getresponse()
        assert response.status == 408
        assert "did not come in 0.2 s" in json.loads(response.read())["error"]
        connection.close()


def test_overload_is_a_503_that_says_to_come_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(model, monkeypatch, small=50, middle=50, large=50)
    with served(model, latency_ms=60, batch=1, workers=1) as (address, service):
        service.submit(image())
        status, content, response = asked(address, body=photo())
        assert status == 503
        assert "could not be answered in 60 ms" in content["error"]
        assert response.headers["Retry-After"] == "1"


@pytest.mark.parametrize("asking", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_asked_to_end(bundle: Path, asking: signal.Signals) -> None:
    command = [sys.executable, "-m", "ddnn", "serve", str(bundle), "--latency-ms", "2000", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            address = line.removeprefix("POST an image to http://").partition("/")[0]
            status, content, _ = asked(address, body=photo())
            process.send_signal(asking)
            rest = process.stderr.read()
        finally:
            process.kill()
    assert process.returncode == 0
    assert (status, content["depth"]) == (200, "large")
    assert rest == "answered by small 0, middle 0, large 1; 0 late, 0 refused\n"


def test_an_address_that_is_taken_is_named(model: Model) -> None:
    with served(model, latency_ms=2000) as (address, service):
        host, port = address.split(":")
        with pytest.raises(RequestError, match=f"cannot listen at {address}: "):
            server.serve(service, host, int(port))
