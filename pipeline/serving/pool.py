"""The servers that a client asks: found, checked, shared fairly, left when they fail and taken back when they answer.

A server counts from the moment at which it has given the known answers, on the connection that will be used.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from pipeline.config.serving import Serving
from pipeline.errors import UserError
from pipeline.serving import wire

LOOK_S = 2.0
"""Seconds between looks at where the servers are."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_LOOK_WITHOUT_S = 0.25
_RECHECK_S = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a server is."""

    address: wire.Address
    start: str = ""
    """Tells one start of a server from the next at the same address, where that is known."""


Locate = Callable[[], list[Place]]
"""Says where the servers are now; empty while nobody knows."""


@dataclass(eq=False)
class Link:
    """A connection to a server that has shown which model it serves. Shared by all workers of a process."""

    client: triton.InferenceServerClient
    address: wire.Address
    identity: str | None
    serving: Serving
    """The client's settings within this server's limits."""
    under_way: int = 0
    """Padded tokens that the server has been asked for and has not answered yet."""
    last_loan: int = 0
    """Servers that have equally little to do take turns."""


@dataclass(eq=False)
class _Server:
    place: Place
    link: Link | None = None
    trying: bool = False
    lost: bool = False
    try_at: float = 0.0
    pause_s: float = _FIRST_PAUSE_S
    refusal: str | None = None
    """Why it cannot be used, though it answers."""


class ServerPool:
    """Hands out links, each time that of the server with the least to do.

    One thread keeps watch: it looks where the servers are and has those without a link tried, after pauses that grow
    and are drawn at random, so that the clients of a restarted server do not come all at once. Each try has a thread
    of its own: a server that hangs must not hold up the others.
    """

    def __init__(
        self,
        locate: Locate,
        open_link: Callable[[wire.Address], Link],
        expected: Callable[[], bool],
    ) -> None:
        """`open_link` connects to a server and checks it: UserError or InferenceServerException when it will not do.

        While `expected` says that a server is on its way, borrowers wait for ever.
        """
        self._locate = locate
        self._open_link = open_link
        self._expected = expected
        self._servers: list[_Server] = []
        self._fault = "no endpoint is published"
        """The last reason for which a server was not used."""
        self._where = "the run's reward server"
        self._broken: Exception | None = None
        self._dropped: list[Link] = []
        """Failed, and not closed yet: other workers may still wait for replies on them."""
        self._loans = 0
        self._closed = False
        self._changed = threading.Condition()
        self._watch = threading.Thread(target=self._keep_watch, name="reward-servers", daemon=True)
        self._watch.start()

    def borrow(self, tokens: int, since: float, patience_s: float) -> Link:
        """The link of the server with the least under way, for `tokens` more; to be given back.

        While there is none, waits until `patience_s` after the time (of time.monotonic()) `since`.
        Raises UserError then, or when every server was found to be unfit; RuntimeError when the pool is closed.
        """
        with self._changed:
            while not self._closed:
                links = [server.link for server in self._servers if server.link is not None]
                if links:
                    link = min(links, key=lambda one: (one.under_way, one.last_loan))
                    link.under_way += tokens
                    self._loans += 1
                    link.last_loan = self._loans
                    return link
                if self._broken is not None:
                    raise self._broken
                refusals = [server.refusal for server in self._servers if server.refusal is not None]
                waited_s = time.monotonic() - since
                patient = waited_s < patience_s or self._expected()
                if refusals and (len(refusals) == len(self._servers) or not patient):
                    raise UserError(refusals[0])
                if not patient:
                    raise UserError(
                        f"{self._where}: no reward server answers there since {waited_s:.0f} s ({self._fault}); "
                        "check TRITON_HOST and the server's log"
                    )
                self._changed.wait(min(_RECHECK_S, max(0.01, patience_s - waited_s)))
        raise RuntimeError("the scorer was closed")

    def give_back(self, link: Link, tokens: int, *, answered: bool) -> None:
        """End a loan; `answered` says that the server did what was asked."""
        with self._changed:
            link.under_way -= tokens
            if link in self._dropped and not link.under_way:
                self._dropped.remove(link)
                link.client.close()
            for server in self._servers:
                if answered and server.link is link:
                    server.pause_s = _FIRST_PAUSE_S

    def drop(self, link: Link, fault: str) -> None:
        """Leave a server that failed, until it gives the known answers again. The caller still gives the link back."""
        with self._changed:
            for server in self._servers:
                if server.link is link:
                    server.link = None
                    self._dropped.append(link)
                    self._failed(server, fault)

    def close(self) -> None:
        """Cut all connections, which cancels what is under way on them."""
        with self._changed:
            self._closed = True
            links = self._dropped + [server.link for server in self._servers if server.link is not None]
            self._servers, self._dropped = [], []  # a client that lives on to the interpreter's end complains there
            self._changed.notify_all()
        for link in links:
            link.client.close()

    def _failed(self, server: _Server, fault: str, refusal: str | None = None) -> None:
        """Note a failure, and when to try again. Of an outage only the first is logged, and what it turns out to be."""
        self._where, self._fault = str(server.place.address), fault
        server.try_at = time.monotonic() + server.pause_s * random.uniform(0.5, 1.0)
        server.pause_s = min(_LONGEST_PAUSE_S, server.pause_s * 2)
        if not server.lost or refusal not in (None, server.refusal):
            others = sum(one.link is not None for one in self._servers)
            line = refusal or f"{server.place.address}: no reward server answers ({fault})"
            logger.warning("%s; %s", line, f"{others} other(s) go on" if others else "trying again")
        server.lost, server.refusal = True, refusal
        self._changed.notify_all()

    def _keep_watch(self) -> None:
        look_at = 0.0
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                if now >= look_at:
                    self._changed.release()  # the places are files, and may be slow
                    try:
                        places = self._locate()
                        self._broken = None
                    except Exception as error:  # handed to whoever asks for rewards and has no server
                        places, self._broken = [], error
                    finally:
                        self._changed.acquire()
                    self._update(places)
                    look_at = time.monotonic() + (LOOK_S if self._servers else _LOOK_WITHOUT_S)
                waiting = [server for server in self._servers if server.link is None and not server.trying]
                for server in [one for one in waiting if one.try_at <= now]:
                    server.trying = True
                    threading.Thread(target=self._try, args=(server,), name="reward-try", daemon=True).start()
                due = min([look_at, *(server.try_at for server in waiting if not server.trying)])
                self._changed.wait(max(0.01, due - time.monotonic()))

    def _update(self, places: list[Place]) -> None:
        """Go by the places that are known now; while none is, those known before stay."""
        if not places or places == [server.place for server in self._servers]:
            return
        if not self._servers:
            self._where, self._fault = str(places[0].address), "it has not answered yet"
        known = {server.place: server for server in self._servers}
        self._servers = [known.pop(place) if place in known else _Server(place) for place in places]
        for server in known.values():
            if server.link is not None and server.link.under_way:
                self._dropped.append(server.link)
            elif server.link is not None:
                server.link.client.close()

    def _try(self, server: _Server) -> None:
        """Connect to a server and see whether it will do."""
        link, fault, refusal = None, "", None
        try:
            link = self._open_link(server.place.address)
        except UserError as error:
            fault = refusal = str(error)
        except InferenceServerException as error:
            fault = wire.error_line(error)
        except Exception as error:  # handed to whoever asks for rewards and has no server
            self._broken, fault = error, str(error)
        with self._changed:
            server.trying = False
            if link is not None and (self._closed or server not in self._servers):
                link.client.close()
            elif link is not None:
                again = "answers again" if server.lost else "gives the known answers"
                logger.info("%s: the reward server %s", server.place.address, again)
                server.link, server.lost, server.refusal = link, False, None
            else:
                self._failed(server, fault, refusal)
            self._changed.notify_all()
