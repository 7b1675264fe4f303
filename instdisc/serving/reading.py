"""What can be read: the page, searches, images, galleries."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse

from cluster.errors import ClusterError, SnapshotError
from instdisc.serving import service as serving
from instdisc.serving.access import COOKIE, TooLargeError, read_body
from instdisc.serving.asking import gate_of, may_ask, may_read, service_of
from instdisc.serving.galleries import explored_place, galleries, map_of
from instdisc.serving.queries import Asked, BadQueryError, read_query
from instdisc.serving.service import NotAnImageError, Service
from instdisc.serving.state import Encoded, NoPictureError, State, describe
from instdisc.serving.together import TooManyWaitError
from instdisc.settings.evaluation import StoredReadout

_PAGE = Path(__file__).with_name("page.html")
_PAGE_POLICY = (
    "default-src 'none'; img-src 'self' blob: data:; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_KEPT_S = 300  # a browser keeps pictures so long
_MOST_LISTED, _LARGEST_THUMBNAIL = 500, 512

logger = logging.getLogger(__name__)

Key = Annotated[str, Query(max_length=10_000, description="As the index has it.")]

OPEN = APIRouter()
"""Needs no token."""
READING = APIRouter(dependencies=[Depends(may_read)])
"""Needs it where others than this machine may ask."""


@OPEN.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> HTMLResponse:
    """The page; all that it shows it asks for."""
    return HTMLResponse(
        _PAGE.read_text(encoding="utf-8"),
        headers={"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-cache"},
    )


@OPEN.get("/health")
async def health() -> dict[str, str]:
    """Whether this replica answers; needs no token."""
    return {"status": "ok"}


@OPEN.post("/session", status_code=204)
async def session(request: Request) -> Response:
    """Give a browser that sends the token a cookie, with which it may read."""
    may_ask(request)
    gate = gate_of(request)
    if not gate.knows_header(request.headers.get("authorization")):
        raise HTTPException(401, "this is not the token", {"WWW-Authenticate": "Bearer"})
    response = Response(status_code=204)
    secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, gate.cookie, httponly=True, samesite="strict", secure=secure)
    return response


@READING.get("/index")
async def index(request: Request) -> dict[str, Any]:
    """What is served, and the limits."""
    service = service_of(request)
    limits = service.config.limits
    return {
        **describe(service.state),
        "limits": {"request_bytes": limits.request_bytes, "pixels": limits.pixels, "k": limits.k},
    }


@READING.post(
    "/search",
    dependencies=[Depends(may_ask)],
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {"image": {"type": "string", "format": "binary"}},
                    }
                },
                "image/*": {"schema": {"type": "string", "format": "binary"}},
                "application/json": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "vector": {"type": "array", "items": {"type": "number"}},
                            "key": {"type": "string"},
                        },
                    }
                },
            },
        }
    },
)
async def search(
    request: Request, k: Annotated[int, Query(ge=1)] = 24, readout: StoredReadout = "plain"
) -> dict[str, Any]:
    """The exact k nearest images of an image, a vector or a key, whose own image is left out."""
    service = service_of(request)
    if k > service.config.limits.k:
        raise HTTPException(400, f"k is {k}, the most are {service.config.limits.k}")
    state = service.state
    if readout not in state.tables:
        raise HTTPException(400, "no whitened rows are held: serve without --no-whitened")
    try:
        body = await read_body(
            request.stream(), service.config.limits.request_bytes, request.headers.get("content-length")
        )
        asked = await read_query(body, request.headers, state.index.tables["embeddings"][0][1])
        return await _search(service, state, asked, k, readout)
    except TooLargeError:
        raise HTTPException(
            413, f"the body is too large, the most are {service.config.limits.request_bytes:,} bytes"
        ) from None
    except BadQueryError as error:
        raise HTTPException(400, str(error)) from error
    except NotAnImageError as error:
        raise HTTPException(413 if error.too_large else 400, str(error)) from error
    except TooManyWaitError as error:
        raise HTTPException(503, "too many queries wait: try again", {"Retry-After": "1"}) from error
    except (TimeoutError, ClusterError, OSError) as error:
        logger.warning("a search failed: %s", error)
        text = "not all rows of the index can be searched at the moment: try again"
        raise HTTPException(503, text, {"Retry-After": "5"}) from error


async def _search(
    service: Service, state: State, asked: Asked, k: int, readout: StoredReadout
) -> dict[str, Any]:
    excluded = -1
    if asked.key is not None:
        excluded = _row(state, asked.key)
        vector = await asyncio.to_thread(state.vector, excluded)
    elif asked.vector is not None:
        vector = asked.vector
    else:
        assert asked.image is not None
        vector = await service.embed(asked.image)
    found = await service.search(serving.Query(state, readout, vector, k, excluded))
    rows = found.rows.tolist()
    there = await asyncio.to_thread(lambda: [state.is_where_it_was(row) for row in rows])
    answer: dict[str, Any] = {
        "generation": state.index.generation,
        "readout": readout,
        "neighbors": [
            {"key": state.key(row), "label": state.label(row), "similarity": round(similarity, 6)}
            for row, similarity in zip(rows, found.scores.astype(np.float64).tolist(), strict=True)
        ],
    }
    if not all(there):
        gone = [state.key(row) for row, is_there in zip(rows, there, strict=True) if not is_there]
        answer["moved"] = gone
        answer["note"] = (
            f"{len(gone)} of these images are not where they were: whoever runs the server can say where they are "
            "now with python -m instdisc.embed --output INDEX --data.root PLACE"
        )
    return answer


def _row(state: State, key: str) -> int:
    row = state.row_of(key)
    if row is None:
        raise HTTPException(404, "the index has no image of that key")
    return row


@READING.get("/images")
async def images(
    request: Request,
    text: Annotated[str, Query(max_length=1000, description="Part of a key or label, in any case.")] = "",
    label: Annotated[str | None, Query(max_length=1000, description="A class, exactly.")] = None,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=0, le=_MOST_LISTED)] = 60,
) -> dict[str, Any]:
    """Images of the index in its order, by a part of key or label."""
    state = service_of(request).state
    rows = await asyncio.to_thread(state.filtered, text, label)
    return {
        "total": len(rows),
        "images": [
            {"key": state.key(row), "label": state.label(row)}
            for row in rows[offset : offset + limit].tolist()
        ],
    }


@READING.get("/image", response_class=Response)
async def image(request: Request, key: Key) -> Response:
    """The whole image of a key."""
    state = service_of(request).state
    row = _row(state, key)
    return await _picture(request, lambda: state.image(row))


@READING.get("/thumbnail", response_class=Response)
async def thumbnail(
    request: Request, key: Key, side: Annotated[int, Query(ge=16, le=_LARGEST_THUMBNAIL)] = 192
) -> Response:
    """A small picture of the image of a key."""
    state = service_of(request).state
    row = _row(state, key)
    return await _picture(request, lambda: state.thumbnail(row, side))


async def _picture(request: Request, make: Callable[[], Encoded]) -> Response:
    loop = asyncio.get_running_loop()
    try:
        made = await loop.run_in_executor(service_of(request).pictures, make)
    except NoPictureError as error:
        raise HTTPException(410, str(error)) from error
    return Response(made.data, media_type=made.kind, headers={"Cache-Control": f"private, max-age={_KEPT_S}"})


@READING.get("/galleries")
async def found_galleries(request: Request) -> dict[str, Any]:
    """The duplicates, strangers and clusters that instdisc.explore found in this state of the index."""
    return await _explored(request, galleries)


@READING.get("/map")
async def found_map(request: Request) -> dict[str, Any]:
    """The places that instdisc.explore gave to images of this state of the index; up to 10,000 of them."""
    return await _explored(request, map_of)


async def _explored(request: Request, read: Callable[[State, Path], dict[str, Any]]) -> dict[str, Any]:
    service = service_of(request)
    place = explored_place(service.state.index, service.config.explored)
    try:
        return await asyncio.to_thread(read, service.state, place)
    except (SnapshotError, LookupError, TypeError) as error:
        logger.warning("what was found in the index cannot be read: %r", error)
        raise HTTPException(503, "what was found in the index cannot be read") from error
