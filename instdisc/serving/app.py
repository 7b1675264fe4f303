"""The API as an ASGI application; `make_app` is called in every replica."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.metrics import Metrics, exported
from instdisc.common.metrics import SERVING
from instdisc.serving.access import Gate, Rates
from instdisc.serving.changing import CHANGING
from instdisc.serving.reading import OPEN, READING
from instdisc.serving.service import Service
from instdisc.settings.serve import ServeConfig

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}
_LOCAL_NAMES = ["localhost", "127.0.0.1", "[::1]", "testserver"]


def make_app(config: ServeConfig, digest: bytes | None, number: int) -> FastAPI:
    """The application of one replica.

    Args:
        config: What is served.
        digest: The SHA-256 of the token, None if there is none.
        number: Of the replica.
    """
    metrics = Metrics(SERVING, run=config.index.rstrip("/").rpartition("/")[2], rank=number)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = app.state.service
        await service.open()
        run = service.state.source
        with exported(
            metrics,
            config.metrics,
            local_rank=number,
            world_size=config.replicas,
            directory=run.run.targets if run.has_run else None,
        ):
            yield
        await service.close()

    app = FastAPI(
        title="instdisc",
        description="The nearest images of an index. Errors are JSON with one field, `error`.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.service = Service(config, metrics)
    app.state.gate = Gate(digest, is_open=config.is_local)
    app.state.rates = Rates(config.limits.rate)
    app.include_router(OPEN)
    app.include_router(READING)
    app.include_router(CHANGING)
    app.add_exception_handler(HTTPException, _told)
    app.add_exception_handler(RequestValidationError, _told_what_is_invalid)
    app.add_exception_handler(Exception, _told_nothing)
    app.add_middleware(_WithHeaders, metrics=metrics)
    if config.is_local:  # else a web page could reach this machine by a name of its own that leads here
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*_LOCAL_NAMES, config.host])
    return app


class _WithHeaders:
    """Adds headers to all answers, and counts those that are errors."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if message["status"] >= 400:
                    self._metrics.add("serving_refused_total")
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)


async def _told_what_is_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, 400)


async def _told_nothing(request: Request, error: Exception) -> Response:
    """What no one expected is in the log of the server, and nowhere else."""
    return JSONResponse({"error": "the server failed at this request; its log says why"}, 500, _HEADERS)
