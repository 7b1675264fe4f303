"""Settings of the page and API over an index."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from cluster.ranges import Amount, Count, Positive, Range, Ranged
from cluster.settings import ActorsConfig, MetricsConfig

TOKEN_VARIABLE = "INSTDISC_TOKEN"
"""The environment variable that holds the token where no file does."""


@dataclass(frozen=True, kw_only=True)
class LimitsConfig(Ranged):
    """What a request may ask for."""

    request_bytes: Count = 32_000_000
    """The largest body of a request; beyond it 413."""
    pixels: Annotated[int, Range(at_least=1, at_most=178_956_970)] = 50_000_000
    """Of an image that is searched for; its header is looked at before anything is decoded."""
    k: Annotated[int, Range(at_least=1, at_most=10_000)] = 200
    """Neighbors that a query may ask for."""
    rate: Amount = 50.0
    """Searches and changes per second that a replica accepts from one address, and as many more at once; beyond it
    429. 0: any number."""
    waiting: Count = 512
    """Queries that wait in a replica; beyond it 503."""
    seconds: Positive = 30.0
    """Longest wait for an answer; beyond it 503."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Ranged):
    """What is served, where, and to whom."""

    index: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="INDEX")]
    """An index that instdisc.embed made: a directory, or a URL that fsspec opens."""
    host: str = "127.0.0.1"
    """The address to listen on, by default one that this machine alone reaches. Any other needs a token."""
    port: Annotated[int, Range(at_least=1, at_most=65_535)] = 8000
    """The port."""
    token_file: Path | None = None
    """A file with the token that requests must carry; by default the environment variable INSTDISC_TOKEN."""
    replicas: Count = 1
    """Processes that answer, each with all rows or with actors of its own."""
    whitened: bool = True
    """Hold the whitened rows too, for queries with the read-out `whitened`; without them half the memory."""
    add_from: Annotated[tuple[str, ...], tyro.conf.arg(metavar="IMAGES [IMAGES ...]")] = ()
    """Where new images appear, in any form that --data.path of instdisc.embed takes: POST /images/add, which needs the
    token, embeds what the index lacks of them. Nothing else is ever added."""
    explored: Path | None = None
    """Where instdisc.explore wrote what it found, for the galleries; by default where it writes for this index."""
    actors: Annotated[ActorsConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: ActorsConfig(num_actors=0)
    )
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    @property
    def is_local(self) -> bool:
        """Whether nobody but this machine reaches the address."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
