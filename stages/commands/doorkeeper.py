"""Who may talk to the viewer: whoever was given its address, with the token in it, from a page of the viewer's own.

A page of any other site can send requests to this machine, under its own name or under one that it makes point here
(DNS rebinding). So names are checked, origins are, and a token that only the printed address holds.
"""

from __future__ import annotations

import http
import ipaddress
import re
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, urlsplit

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Doorkeeper:
    """Checks every request, for a page or for a socket, before the viewer sees it.

    Args:
        host: the address that is listened on.
        port: of it.

    Attributes:
        token: what the address that is printed ends with; a visitor's browser keeps it as a cookie.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.token = secrets.token_urlsafe(24)

    @property
    def _cookie(self) -> str:
        return f"galatea-{self.port}"  # cookies do not tell ports apart

    @property
    def address(self) -> str:
        """To open in a browser."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.port}/?token={self.token}"

    def refusal(self, path: str, headers: Any) -> str | None:
        """Why a request is not answered; ``None`` when it is.

        Args:
            headers: with ``get_all(name)``.
        """
        hosts, origins = headers.get_all("Host"), headers.get_all("Origin")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return "this is not an address of the viewer"
        if len(origins) > 1 or (origins and origins[0] != f"http://{hosts[0]}"):
            return "pages of other sites may not use the viewer"
        if not any(
            secrets.compare_digest(token.encode(), self.token.encode()) for token in self._tokens(path, headers)
        ):
            return "open the whole address that galatea view has printed, with its token"
        return None

    def _is_ours(self, host: str) -> bool:
        match = re.fullmatch(r"(\[[^\[\]]+\]|[^:\[\]]+)(?::(\d+))?", host)
        if match is None or (match[2] or "80") != str(self.port):  # browsers leave 80 out
            return False
        name = match[1]
        if name in _LOOPBACK or name.strip("[]").lower() == self.host.lower():
            return True
        if not _is_any(self.host):
            return False
        # Whatever address of this machine it is: a name that somebody else makes point here is none.
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name.lower() == socket.gethostname().lower()
        return True

    def _tokens(self, path: str, headers: Any) -> Iterator[str]:
        yield from parse_qs(urlsplit(path).query).get("token", [])
        for line in headers.get_all("Cookie"):
            for part in line.split(";"):
                name, _, value = part.strip().partition("=")
                if name == self._cookie:
                    yield value

    def wrap(self, answer: Callable[[Any, Any], Any] | None) -> Callable[[Any, Any], Any]:
        """The ``process_request`` of a WebSocket server, behind the check."""

        def guarded(connection: Any, request: Any) -> Any:
            if (reason := self.refusal(request.path, request.headers)) is not None:
                return connection.respond(http.HTTPStatus.FORBIDDEN, f"{reason}\n")
            response = None if answer is None else answer(connection, request)
            if response is not None:
                cookie = f"{self._cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
                response.headers["Set-Cookie"] = cookie
                response.headers["Referrer-Policy"] = "no-referrer"
            return response

        return guarded

    @contextmanager
    def at_the_door(self) -> Iterator[None]:
        """The server that viser starts meanwhile asks us; it has no option for it.

        Raises:
            RuntimeError: when none was started, as by a viser that we do not know: its own would ask nobody.
        """
        from websockets.asyncio import server

        serve, asks = server.serve, False

        def guarded(*args: Any, process_request: Any = None, **options: Any) -> Any:
            nonlocal asks
            asks = True
            return serve(*args, process_request=self.wrap(process_request), **options)

        with mock.patch.object(server, "serve", guarded):
            yield
        if not asks:
            raise RuntimeError("this version of viser starts its server in another way: nobody would be checked")


def free_port(host: str, first: int) -> int:
    """The first free port from ``first`` on, of a thousand.

    Raises:
        OSError: when there is none, or ``host`` is not an address of this machine.
        OverflowError: for a number that no port has.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, first, type=socket.SOCK_STREAM)[0]
    error: OSError | None = None
    for port in range(first, min(first + 1000, 1 << 16)):
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address[0], port, *address[2:]))
                return int(probe.getsockname()[1])
            except OSError as found:
                error = found
    raise error or OverflowError("a port is a number from 0 to 65535")


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
