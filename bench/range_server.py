"""The least that a client's ranged reads need: ``range_server.py FOLDER PORT``, on loopback.

Files by ``sendfile``, with no check of who asks: so cheap that the client is what is measured.
It knows GET with a range and nothing else of S3.
"""

import contextlib
import os
import re
import socketserver
import sys
from pathlib import Path

_RANGE = re.compile(rb"^range: *bytes=(\d+)-(\d+)", re.IGNORECASE)


class _Handler(socketserver.StreamRequestHandler):
    root = Path()
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while line := self.rfile.readline():
                self._answer(line.split()[1].partition(b"?")[0].decode())

    def _answer(self, path: str) -> None:
        found = None
        while (header := self.rfile.readline()).strip():
            found = _RANGE.match(header) or found
        if not (self.root / path.lstrip("/")).is_file():
            self.wfile.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        with (self.root / path.lstrip("/")).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first, last = (int(found[1]), min(int(found[2]), size - 1)) if found else (0, size - 1)
            self.wfile.write(
                b"HTTP/1.1 206 Partial Content\r\nContent-Type: application/octet-stream\r\n"
                b'ETag: "0"\r\nLast-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\n'
                b"Content-Length: %d\r\nContent-Range: bytes %d-%d/%d\r\n\r\n"
                % (last - first + 1, first, last, size)
            )
            while first <= last:
                first += os.sendfile(
                    self.connection.fileno(), file.fileno(), first, last + 1 - first
                )


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128


def main(folder: str, port: str) -> None:
    _Handler.root = Path(folder)
    with _Server(("127.0.0.1", int(port)), _Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
