"""The gate of the server: who may ask, what, and how much.

The server shows private files of the user who started it. Three kinds of strangers are kept out:
other computers (loopback address, or a token), other users of the computer (a token, if wanted),
and other web pages in the user's browser (Host and fetch headers, a cookie of this site only).
"""

import hashlib
import ipaddress
import secrets
import socket
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_URL = 4096
"""Bytes of an address."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def content_policy(script_hashes: Iterable[str]) -> str:
    """The content security policy: nothing but the files of the server.

    Args:
        script_hashes: digests of the scripts inside of index.html, such as "sha256-...".
    """
    scripts = " ".join(["'self'", *(f"'{digest}'" for digest in script_hashes)])
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'self'; "
        "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def is_loopback(host: str) -> bool:
    """Whether only programs of this computer reach a server at the address `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Gate:
    """Checks every request, and adds the security headers to every answer.

    Args:
        app: the application.
        host: address that the server listens on.
        token: what a request must know. None: no token is needed.
        policy: the content security policy.
    """

    def __init__(self, app: ASGIApp, host: str, token: str | None, policy: str) -> None:
        self.app, self.host, self.token = app, host, token
        self.headers = {"Content-Security-Policy": policy, **_HEADERS}
        names = [host] if is_loopback(host) else [host, socket.gethostname(), socket.getfqdn()]
        self.names = {name.lower() for name in names}  # here, because getfqdn may ask a name server
        digest = hashlib.sha256((token or "").encode()).hexdigest()[:8]
        self.cookie = f"flowgrain_{digest}"  # one per server: cookies are shared by all ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self.headers.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        answer = self._refuse(scope) or self._sign_in(scope) or self.app
        await answer(scope, receive, send_with_headers)

    def _refuse(self, scope: Scope) -> Response | None:
        """The response to a request that is refused with any token. None if it is allowed."""
        headers = Headers(scope=scope)
        if len(scope.get("raw_path", b"")) + len(scope["query_string"]) > MAX_URL:
            return refusal(414, "The address is too long.")
        if not self._is_own_name(headers.get("host", "")):
            return refusal(
                403,
                "Use the address that flowgrain view printed, or a tunnel to it.",
            )
        voting = scope["method"] == "POST" and scope["path"] == "/api/votes"
        if scope["method"] not in ("GET", "HEAD") and not voting:
            return refusal(405, "Only votes are written.")
        if voting and headers.get("x-flowgrain") != "1":
            return refusal(403, "The header X-Flowgrain: 1 is missing.")
        site = headers.get("sec-fetch-site", "none")
        if site not in ("same-origin", "none") and headers.get("sec-fetch-mode") != "navigate":
            return refusal(403, "Another web page must not use this server.")
        return None

    def _is_own_name(self, header: str) -> bool:
        """Whether a Host header names this server, and not a domain that points at its address."""
        name = header.rsplit(":", 1)[0] if not header.endswith("]") else header
        name = name.strip("[]").lower()
        if name in _LOOPBACK:
            return True
        if is_loopback(self.host):
            return False
        return name in self.names or _is_address(name)

    def _sign_in(self, scope: Scope) -> Response | None:
        """None for a request with the token. The token in an address becomes a cookie."""
        if self.token is None:
            return None
        given = dict(parse_qsl(scope["query_string"].decode("latin-1"))).get("token")
        if given is not None and scope["path"] == "/" and self._is_token(given):
            # Not a redirect: a browser that comes from another site would not send the cookie.
            page = '<!doctype html><meta http-equiv="refresh" content="0; url=/">'
            answer = HTMLResponse(page)
            answer.set_cookie(self.cookie, given, httponly=True, samesite="strict")
            return answer
        try:
            cookies = SimpleCookie(Headers(scope=scope).get("cookie", ""))
        except CookieError:
            cookies = SimpleCookie()
        if self.cookie in cookies and self._is_token(cookies[self.cookie].value):
            return None
        return refusal(401, "Open the address with the token that flowgrain view printed.")

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), (self.token or "").encode())


def refusal(status: int, text: str) -> Response:
    """An answer that closes the connection, because a body may be left on it."""
    return JSONResponse({"error": text}, status, {"Connection": "close"})


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
