"""A service over HTTP: images in, classes out. What it accepts is bounded in bytes, pixels and time.

    POST /predict   the body is an image file; ?top=5
    GET /           the depths, and what became of the images so far

It speaks plain HTTP and leaves connections that say nothing open, so it belongs behind something that ends TLS, knows
who may ask, and limits connections.
"""

import asyncio
import contextlib
import io
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ddnn.cpus import available_cpus
from ddnn.errors import DDNNError, OverloadError, RequestError
from ddnn.runtime.manifest import Input
from ddnn.runtime.pixels import from_bytes
from ddnn.runtime.service import Answer, Service

if TYPE_CHECKING:
    import uvicorn

MOST_BYTES = 16 * 2**20
"""Of an image file."""
MOST_PIXELS = 25_000_000
"""Of an image, and of it resized; one takes 100 MB, and as many are decoded at a time as there are CPUs."""
MOST_REQUESTS = 128
"""At a time, connections that are open counted as well; what comes then is answered with 503."""
BODY_SECONDS = 30.0
"""In which a body must have come."""

log = logging.getLogger("ddnn")


def application(service: Service) -> Starlette:
    """The ASGI application, for any server of such."""
    decoders = anyio.CapacityLimiter(available_cpus())

    async def predict(request: Request) -> JSONResponse:
        top = _top(request)
        body = await _body(request)
        submit = partial(decoded_and_submitted, body, time.monotonic())
        answer = await asyncio.wrap_future(await anyio.to_thread.run_sync(submit, limiter=decoders))
        likely = service.model.most_likely(answer.logits, top)
        classes = [{"class": name, "confidence": sure} for name, sure in likely]
        return JSONResponse({"depth": answer.depth, "classes": classes, "latency_ms": answer.latency_ms})

    def decoded_and_submitted(body: bytes, arrived: float) -> Future[Answer]:
        service.expect(arrived)  # decoding is most of the work, and in vain for what is refused
        return service.submit(from_bytes(body, service.model.manifest.input, MOST_PIXELS), arrived=arrived)

    async def about(_request: Request) -> JSONResponse:
        depths = {name: {"top1": net.top1, "macs": net.macs} for name, net in service.model.nets.items()}
        return JSONResponse({"latency_ms": service.latency_ms, "depths": depths, **service.counts()._asdict()})

    return Starlette(
        routes=[Route("/predict", predict, methods=["POST"]), Route("/", about)],
        exception_handlers={
            DDNNError: _sentence,
            HTTPException: _refusal,
            ClientDisconnect: _gone,
            Exception: _failure,
        },
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket to serve at; port 0 is any that is free. Raises `RequestError` where it cannot be listened at."""
    try:
        if not host:
            raise ValueError("it is no address")
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=MOST_REQUESTS)
    except (OSError, OverflowError, TypeError, ValueError) as error:
        raise RequestError(f"cannot listen at {host!r}, port {port}: {error}") from None


def serve(service: Service, listening: socket.socket, ready: Callable[[str], None] = lambda address: None) -> None:
    """Serve until the process is asked to end; then answer what has come. `ready` is told the address."""
    import uvicorn

    config = uvicorn.Config(
        application(service),
        log_level="critical",  # it warns of every request too many; errors are logged here
        access_log=False,
        limit_concurrency=MOST_REQUESTS,
        timeout_graceful_shutdown=int(BODY_SECONDS + 2 * service.latency_ms / 1000) + 1,
    )
    server = uvicorn.Server(config)
    _warm_up(service.model.manifest.input)
    host, port = listening.getsockname()[:2]
    with _ending(server):
        ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        server.run(sockets=[listening])


def _warm_up(wanted: Input) -> None:
    """Decode an image now, so that the first one that comes does not wait for what is loaded for that."""
    Image.init()
    file = io.BytesIO()
    Image.new("RGB", (wanted.size, wanted.size)).save(file, "JPEG")
    from_bytes(file.getvalue(), wanted, MOST_PIXELS)


@contextlib.contextmanager
def _ending(server: "uvicorn.Server") -> Iterator[None]:
    """Within it, signals to end are for the server: before it listens to them, and when it raises them again."""
    if threading.current_thread() is not threading.main_thread():  # where none arrive
        yield
        return

    def end(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _body(request: Request) -> bytes:
    """All of it; `HTTPException` for one that is too large or too slow."""
    too_large = HTTPException(413, f"the body is larger than {MOST_BYTES} bytes")
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated[:20]) > MOST_BYTES:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                content += piece
                if len(content) > MOST_BYTES:
                    raise too_large
    except TimeoutError:
        raise HTTPException(408, f"the body did not come in {BODY_SECONDS:g} s") from None
    return bytes(content)


def _top(request: Request) -> int:
    if unknown := set(request.query_params) - {"top"}:
        raise RequestError(f"{min(unknown)[:20]} is no parameter of /predict; top is the only one")
    asked = request.query_params.get("top", "5")
    if not (asked.isascii() and asked.isdigit() and len(asked) <= 6 and int(asked)):
        raise RequestError(f"top={asked[:20]} must be a whole number from 1 to 999999")
    return int(asked)


async def _sentence(_request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, OverloadError):
        return JSONResponse({"error": str(error)}, 503, {"Retry-After": "1"})
    if isinstance(error, RequestError):
        return JSONResponse({"error": str(error)}, 400)
    log.error("%s", error)  # a file of the bundle has changed: nothing the client has done
    return JSONResponse({"error": str(error)}, 500)


async def _refusal(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, dict(error.headers or {}))


async def _gone(_request: Request, _error: Exception) -> JSONResponse:
    return JSONResponse({"error": "the client is gone"}, 400)  # which nobody reads


async def _failure(_request: Request, error: Exception) -> JSONResponse:
    log.error("internal error", exc_info=error)
    return JSONResponse({"error": f"internal error ({type(error).__name__})"}, 500)
