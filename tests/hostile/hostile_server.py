"""A server on a socket that answers every request with the bytes that a test wants."""

import contextlib
import socket
import threading
import time


class HostileServer:
    """Accepts connections, reads a request, and lets `behave(connection, request)` answer."""

    def __init__(self, behave, read_request=True):
        self.behave, self.read_request = behave, read_request
        self.requests = 0
        self.stopped = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection, contextlib.suppress(OSError):
            request = read_request(connection)
            if request:
                self.requests += 1
                self.behave(connection, self)

    def wait(self, seconds):
        """Wait, but not longer than the test."""
        self.stopped.wait(seconds)


def read_request(connection):
    """Headers and body of a request."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(65536)
        if not chunk:
            return data
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length:")
    )
    while len(body) < length:
        chunk = connection.recv(65536)
        if not chunk:
            break
        body += chunk
    return head + b"\r\n\r\n" + body


def answer(body, status="200 OK", length=True, **headers):
    """A behavior that sends a complete answer."""
    body = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status}"] + [f"{k.replace('_', '-')}: {v}" for k, v in headers.items()]
    lines.append("Connection: close")  # the client does not send another request on it
    if length:
        lines.append(f"Content-Length: {len(body)}")
    head = ("\r\n".join(lines) + "\r\n\r\n").encode()

    def behave(connection, _server):
        connection.sendall(head + body)

    return behave


def send(*parts, then=None, every=0.0):
    """A behavior that sends parts with a pause after each, and then closes, hangs or resets."""

    def behave(connection, server):
        for part in parts:
            connection.sendall(part)
            time.sleep(every)
        if then == "hang":
            server.wait(30)
        elif then == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    return behave


def repeat(start, part, every=0.0):
    """A behavior that sends `part` for ever after `start`."""

    def behave(connection, server):
        connection.sendall(start)
        while not server.stopped.is_set():
            connection.sendall(part)
            time.sleep(every)

    return behave
