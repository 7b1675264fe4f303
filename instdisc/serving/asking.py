"""What routes ask of a request before they answer it."""

from __future__ import annotations

from typing import cast

from fastapi import HTTPException, Request

from instdisc.serving.access import COOKIE, Gate
from instdisc.serving.service import Service


def service_of(request: Request) -> Service:
    """What answers the request."""
    return cast(Service, request.app.state.service)


def gate_of(request: Request) -> Gate:
    """What knows the token."""
    return cast(Gate, request.app.state.gate)


def may_read(request: Request) -> None:
    """Refuse a request without the token or its cookie, where one is needed."""
    gate = gate_of(request)
    if gate.is_open or gate.knows_header(request.headers.get("authorization")):
        return
    if gate.knows_cookie(request.cookies.get(COOKIE)):
        return
    raise HTTPException(
        401, "a token is needed: send Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
    )


def may_ask(request: Request) -> None:
    """Refuse a request that comes too soon after others of its address."""
    address = request.client.host if request.client else ""
    wait_s = request.app.state.rates.wait_s(address)
    if wait_s:
        raise HTTPException(
            429, "too many requests from this address: wait", {"Retry-After": str(max(1, round(wait_s)))}
        )


def may_change(request: Request) -> None:
    """Refuse a request without the token, or too soon; a cookie is not enough."""
    may_ask(request)
    gate = gate_of(request)
    if not gate.has_token:
        raise HTTPException(403, "this server changes nothing: whoever runs it gives it a token for that")
    if not gate.knows_header(request.headers.get("authorization")):
        raise HTTPException(
            401, "a token is needed: send Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
        )
