"""A pull that is played by a test: what its stdin says goes to the test, which says what it does.

    python fake_pull.py SOCKET URI…      connects to SOCKET, and says who it is, as JSON lines

To the test: {"argv", "environment", "cwd", "pid", "descriptors"}, then {"stdin": line}, and
{"stdin": null} at its end, where it ends by itself, as a pull does, unless it was told to hang.
From the test: {"stdout": text}, {"stderr": text}, {"exit": status}, {"hang": true}, which is deaf
to the end of stdin and to SIGTERM, {"leave": true}, which leaves a process behind that holds the
pipes open.
"""

import json
import os
import select
import selectors
import signal
import socket
import sys


def main() -> None:
    test = socket.socket(socket.AF_UNIX)
    test.connect(sys.argv[1])
    about = {
        "argv": sys.argv[2:],
        "environment": dict(os.environ),
        "cwd": os.getcwd(),
        "pid": os.getpid(),
        "descriptors": sorted(map(int, os.listdir("/proc/self/fd")))[:-1],
        "session": os.getsid(0),
    }
    hangs = False

    def tell(**words: object) -> None:
        test.sendall(json.dumps(words).encode() + b"\n")

    tell(**about)
    ready = selectors.DefaultSelector()
    ready.register(0, selectors.EVENT_READ)
    ready.register(test, selectors.EVENT_READ)
    asked = b""
    while True:
        for key, _ in ready.select():
            if key.fd == 0:
                data = os.read(0, 4096)
                for line in data.splitlines():
                    tell(stdin=json.loads(line))
                if not data:
                    ready.unregister(0)
                    tell(stdin=None)
                    if not hangs:
                        print(
                            '{"event":"failed","error":"interrupted","kept":"/t.part"}', flush=True
                        )
                        sys.exit(130)
                continue
            data = test.recv(65536)
            if not data:
                sys.exit(99)  # the test has gone
            *lines, asked = (asked + data).split(b"\n")
            for line in lines:
                words = json.loads(line)
                if "stdout" in words:
                    os.write(1, words["stdout"].encode())
                if "stderr" in words:
                    os.write(2, words["stderr"].encode())
                if "hang" in words:
                    hangs = True
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                if "leave" in words and os.fork() == 0:
                    gone = select.poll()
                    gone.register(test, 0)
                    gone.poll()  # until the test has hung up
                    os._exit(0)
                if "exit" in words:
                    os._exit(words["exit"])
                tell(done=True)


main()
