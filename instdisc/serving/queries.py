"""What a search asks for, read from the body of its request."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

_FIELD = "image"


class BadQueryError(Exception):
    """A body that asks for nothing that can be searched for; says why."""


class Asked(NamedTuple):
    """One of these."""

    image: bytes | None = None
    vector: npt.NDArray[np.float32] | None = None
    key: str | None = None


async def read_query(body: bytes, headers: Mapping[str, str], dimensions: int) -> Asked:
    """What a body asks for: JSON with `vector` or `key`, a form with a file `image`, or else an image by itself.

    Args:
        body: Of the request.
        headers: Its headers.
        dimensions: Of the vectors of the index.

    Raises:
        BadQueryError: It is none of these.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return _of_json(body, dimensions)
    if kind == "multipart/form-data":
        return Asked(image=await _of_form(body, headers))
    if kind == "application/x-www-form-urlencoded":
        raise BadQueryError("the body is a form without a file: send one as multipart/form-data")
    if not body:
        raise BadQueryError("the body is empty (0 bytes), expected an image, or JSON with a vector or a key")
    return Asked(image=body)


def _of_json(body: bytes, dimensions: int) -> Asked:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadQueryError("the body is no JSON") from error
    if not isinstance(values, dict) or set(values) not in ({"vector"}, {"key"}):
        raise BadQueryError(
            'expected {"vector": [numbers]} or {"key": "name of an image"}; k goes into the URL'
        )
    if "key" in values:
        if not isinstance(values["key"], str):
            raise BadQueryError("key is no text")
        return Asked(key=values["key"])
    return Asked(vector=_unit(values["vector"], dimensions))


def _unit(numbers: object, dimensions: int) -> npt.NDArray[np.float32]:
    if not isinstance(numbers, list) or any(
        isinstance(number, bool) or not isinstance(number, int | float) for number in numbers
    ):
        raise BadQueryError("vector is no list of numbers")
    if len(numbers) != dimensions:
        raise BadQueryError(f"vector has {len(numbers)} numbers, those of this index have {dimensions}")
    try:
        vector = np.array(numbers, np.float64)
    except OverflowError:
        vector = np.array([np.inf])
    length = float(np.linalg.norm(vector))
    if not np.isfinite(vector).all() or not np.isfinite(length):
        raise BadQueryError("vector has NaN, infinity or numbers too large, expected finite ones")
    if length < np.finfo(np.float32).tiny:
        raise BadQueryError("vector is all zeros, which has no direction")
    return (vector / length).astype(np.float32)


async def _of_form(body: bytes, headers: Mapping[str, str]) -> bytes:
    async def pieces() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(Headers(headers), pieces(), max_files=1, max_fields=8).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise BadQueryError("the form cannot be read: send one file as multipart/form-data") from error
    file = form.get(_FIELD)
    if not isinstance(file, UploadFile):
        raise BadQueryError(f"the form has no file in its field {_FIELD!r}")
    data = await file.read()
    await form.close()
    if not data:
        raise BadQueryError("the file is empty (0 bytes), expected an image")
    return data
