"""A service over HTTP: images in, classes out. What it accepts is bounded in bytes, pixels, time and number.

    POST /predict   the body is an image file; ?top=5
    GET /           the depths, and what became of the images so far

It speaks plain HTTP, to be put behind whatever ends TLS and knows who may ask.
"""

import asyncio
import contextlib
import io
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import anyio
import anyio.to_thread
import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ddnn import picture
from ddnn.errors import BundleError, DDNNError, OverloadError, RequestError
from ddnn.runtime.cascade import probabilities
from ddnn.runtime.machine import available_cpus
from ddnn.runtime.pixels import Pixels, open_rgb, square
from ddnn.runtime.service import Service

MOST_BYTES = 16 * 2**20
"""Of an image file."""
MOST_PIXELS = 25_000_000
"""Of an image; decoded, 75 MB."""
MOST_CONNECTIONS = 256
"""At a time; more are answered with 503."""
BODY_SECONDS = 30.0
"""In which a body must have come."""


def application(service: Service) -> Starlette:
    """The ASGI application, for any server of such."""
    decoders = anyio.CapacityLimiter(2 * available_cpus())

    async def predict(request: Request) -> JSONResponse:
        top = _top(request)
        body = await _body(request)
        arrived = time.monotonic()
        pixels = await anyio.to_thread.run_sync(_decoded, service, body, limiter=decoders)
        answer = await asyncio.wrap_future(service.submit(pixels, arrived=arrived))
        found = probabilities(answer.logits[None])[0]
        best = np.argsort(-found, kind="stable")[:top]
        classes = [{"class": service.model.classes[i], "confidence": float(found[i])} for i in best]
        return JSONResponse({"depth": answer.depth, "classes": classes, "latency_ms": answer.latency_ms})

    async def about(_request: Request) -> JSONResponse:
        depths = {name: {"top1": net.top1, "macs": net.macs} for name, net in service.model.nets.items()}
        return JSONResponse({"latency_ms": service.latency_ms, "depths": depths, **service.counts()._asdict()})

    return Starlette(
        routes=[Route("/predict", predict, methods=["POST"]), Route("/", about)],
        exception_handlers={DDNNError: _sentence, HTTPException: _refusal},
    )


def serve(service: Service, host: str, port: int, ready: Callable[[str], None] = lambda address: None) -> None:
    """Serve until the process is asked to end; then answer what has come. Port 0 is any that is free.

    `ready` is told the address. Raises `RequestError` where it cannot be listened at.
    """
    import uvicorn

    config = uvicorn.Config(
        application(service),
        log_level="error",  # it warns of every connection too many
        access_log=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=10,
    )
    try:
        listening = socket.create_server((host, port), backlog=config.backlog)
    except (OSError, OverflowError) as error:
        raise RequestError(f"cannot listen at {host}:{port}: {error}") from None
    with listening, _unmoved():
        ready(f"http://{host}:{listening.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[listening])


@contextlib.contextmanager
def _unmoved() -> Iterator[None]:
    """Signals to end mean nothing within it: uvicorn has its own answer, and raises them again when it has ended."""
    if threading.current_thread() is not threading.main_thread():  # where none arrive
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _body(request: Request) -> bytes:
    """All of it; `HTTPException` for one that is too large or too slow."""
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                content += piece
                if len(content) > MOST_BYTES:
                    raise HTTPException(413, f"the body is larger than {MOST_BYTES} bytes")
    except TimeoutError:
        raise HTTPException(408, f"the body did not come in {BODY_SECONDS:g} s") from None
    return bytes(content)


def _top(request: Request) -> int:
    asked = request.query_params.get("top", "5")
    if not (asked.isascii() and asked.isdigit() and 1 <= int(asked[:9]) <= 10**6):
        raise RequestError(f"top={asked[:20]} must be a whole number from 1 to 1000000")
    return int(asked)


def _decoded(service: Service, body: bytes) -> Pixels:
    """What the nets see of an image, uint8 [S, S, 3]. Raises `RequestError`."""
    file = io.BytesIO(body)
    try:
        width, height = picture.size(partial(Image.open, file, formats=picture.FORMATS))
    except picture.UnreadableError as error:
        raise RequestError(f"the body cannot be read as an image: {error}") from None
    if width * height > MOST_PIXELS:
        raise RequestError(f"the image has {width} x {height} pixels; allowed are {MOST_PIXELS}")
    return square(open_rgb(io.BytesIO(body), "the body"), service.model.manifest.input)


async def _sentence(_request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, OverloadError):
        return JSONResponse({"error": str(error)}, 503, {"Retry-After": "1"})
    return JSONResponse({"error": str(error)}, 500 if isinstance(error, BundleError) else 400)


async def _refusal(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, dict(error.headers or {}))
