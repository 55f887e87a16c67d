"""The source of a pull: an NBD export, and whether it is a fleecing export of ours.

It is ours exactly when it offers the meta context ``x-fleecenbd:access``. Then its description
names the session: ``vda as of MOMENT, session NAME UUID``; one that broke says so behind that. A
TRIM releases there; anywhere else it would discard the disk's own data, and is never sent.

A connection that is lost is made anew, and must lead to the same session: one of the same name that
was begun since is another one. What is asked for and refused tells why in the server's own words.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fleecenbd.client.endpoints import SourceLost
from fleecenbd.client.plan import ACCESS, ALLOCATION
from fleecenbd.storage.device import Buffer, Extent
from fleecenbd.storage.nbd_client import NbdClient
from fleecenbd.storage.nbd_errors import NbdLost, NbdRefused
from fleecenbd.storage.nbd_handshake import NbdFacts

CONNECTIONS_MAX = 4
"""Connections, where nothing else is asked for; and not more than there are processors."""
REQUESTS_PER_CONNECTION = 16
"""Requests in flight, where nothing else is asked for."""
CLUSTER_MIN = 4096
"""Bytes: what a TRIM is taken to need where the server does not say."""

_SESSION = re.compile(
    r", session \S+ ([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})(?:,|$)"
)

Result = TypeVar("Result")


class NbdSource:
    """endpoints.Source, by libnbd. Made by ``open_source``."""

    def __init__(self, client: NbdClient, session_id: str | None, requests: int | None) -> None:
        facts = client.facts
        self.name = client.name
        self.size = facts.size
        self.cluster = facts.block_size_preferred or CLUSTER_MIN
        self.session_id = session_id
        self.contexts = facts.contexts
        self.can_trim = ACCESS in facts.contexts and facts.can_trim
        self.requests = requests or REQUESTS_PER_CONNECTION * client.connections
        self._client = client

    async def pread(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes."""
        return await _or_lost(self._client.pread(offset, length))

    async def trim(self, offset: int, length: int) -> None:
        """Release the range."""
        assert self.can_trim, "anywhere else a TRIM would discard the disk's own data"
        await _or_lost(self._client.trim(offset, length))

    async def extents(self, context: str, offset: int, length: int) -> list[Extent]:
        """What a meta context says of the range."""
        return await _or_lost(self._client.block_status(context, offset, length))

    async def close(self) -> None:
        """Say goodbye, and hang up."""
        self._client.close()
        await self._client.wait_closed()


async def open_source(
    uri: str,
    *,
    contexts: Sequence[str] = (),
    connections: int | None = None,
    requests: int | None = None,
    retries: int = 5,
    tell: Callable[[str], None] = lambda text: None,
) -> NbdSource:
    """Connect to an export that is to be read.

    ``contexts``: meta contexts beside base:allocation and that of fleecing exports.
    ``connections``: at most; a server that does not allow several gets one. ``requests`` in flight
    over all of them. ``retries``: attempts in a row to connect again; ``tell`` gets a line for the
    user at each. Raises OSError: SourceLost if somebody answers who has no such export.
    """
    accepted = _Accepted(uri)
    client = await _or_lost(
        NbdClient.open(
            uri,
            contexts=(ALLOCATION, ACCESS, *contexts),
            connections=connections or min(CONNECTIONS_MAX, os.cpu_count() or 1),
            retries=retries,
            tell=tell,
            accept=accepted,
            explains=True,
        )
    )
    return NbdSource(client, accepted.session_id, requests)


class _Accepted:
    """What the first connection led to, and whether the others lead there too."""

    def __init__(self, uri: str) -> None:
        self.session_id: str | None = None
        self._uri = uri
        self._is_first = True

    def __call__(self, facts: NbdFacts) -> None:
        session_id = session_id_of(facts)
        if self._is_first:
            self._is_first = False
            self.session_id = session_id
        elif session_id != self.session_id:
            raise SourceLost(
                errno.ESTALE,
                f"another session answers there now ({facts.description or 'no description'}); "
                f"session {self.session_id} is over, and what is left of it cannot be read any "
                "more",
                self._uri,
            )


def session_id_of(facts: NbdFacts) -> str | None:
    """The id that a fleecing export's description names; None for any other export."""
    if ACCESS not in facts.contexts:
        return None
    found = _SESSION.search(facts.description)
    return None if found is None else found[1]


async def _or_lost(call: Coroutine[Any, Any, Result]) -> Result:
    """What ends everything is a SourceLost."""
    try:
        return await call
    except (NbdLost, NbdRefused) as error:
        raise SourceLost(error.errno, error.strerror, error.filename) from error
