"""Opens connections that are no rank's, and leaves most of them open: silent ones, garbage, and parts of messages.

`python flooding.py HOST PORT COUNT` prints "open", and ends when its standard input closes.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import sys

SENT = (b"", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\x10", b"\0\0\0\x02\0\0\0\0{}")


def main(host: str, port: int, count: int) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 1000), most))
    kept = []
    for number in range(count):
        connection = socket.create_connection((host, port))
        with contextlib.suppress(OSError):
            connection.sendall(SENT[number % len(SENT)])
        if number % 5:
            kept.append(connection)
        else:
            connection.close()
    print("open", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
