"""What changes the index; all of it needs the token."""

from __future__ import annotations

import logging
from collections.abc import Coroutine
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request
from pydantic import BaseModel

from cluster.errors import ClusterError
from instdisc.common.errors import ConfigError
from instdisc.serving.access import TooLargeError, read_body
from instdisc.serving.asking import may_change, service_of
from instdisc.serving.changes import ChangeRefusedError
from instdisc.serving.service import Service

logger = logging.getLogger(__name__)

CHANGING = APIRouter(dependencies=[Depends(may_change)])
"""Needs the token, whoever asks."""


@CHANGING.post("/images/add")
async def add(request: Request) -> dict[str, Any]:
    """Embed the new and changed images of the places that the server was told with --add-from."""
    service = service_of(request)
    before = service.state.num_rows
    changed = await _changed(service, service.changes.add())
    return {"added": service.state.num_rows - before, **changed}


class Keys(BaseModel):
    """Which images."""

    keys: list[str]


@CHANGING.post(
    "/images/remove",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": Keys.model_json_schema()}},
        }
    },
)
async def remove(request: Request) -> dict[str, Any]:
    """Remove images by their keys; those that are unknown are named."""
    service = service_of(request)
    most = service.config.limits.request_bytes
    try:
        body = await read_body(request.stream(), most, request.headers.get("content-length"))
        asked = Keys.model_validate_json(body)
    except TooLargeError:
        raise HTTPException(413, f"the body is too large, the most are {most:,} bytes") from None
    except ValueError as error:
        raise HTTPException(400, 'expected {"keys": ["name of an image", ...]}') from error
    before = service.state.num_rows
    changed = await _changed(service, service.changes.remove(asked.keys))
    return {"removed": before - service.state.num_rows, **changed}


async def _changed(service: Service, change: Coroutine[Any, Any, dict[str, Any] | None]) -> dict[str, Any]:
    """Make a change, and serve the index as it is then."""
    try:
        said = await change
        await service.refresh()
    except ChangeRefusedError as error:
        raise HTTPException(409 if error.is_busy else 400, str(error)) from error
    except (ConfigError, ClusterError, OSError) as error:
        logger.warning("the index cannot be opened after a change: %s", error)
        text = "the index was changed, but cannot be served as it is now; what was served stays"
        raise HTTPException(503, text) from error
    return {"generation": service.state.index.generation, "rows": service.state.num_rows, **(said or {})}
