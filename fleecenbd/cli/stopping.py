"""Why and how the server is asked to stop: signals, and processes that it lives for."""

from __future__ import annotations

import asyncio
import logging
import os
import signal

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopping:
    """The first signal asks to stop; the second, to stop at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()

    def catch_signals(self) -> None:
        """From now on signals come here. One that nohup had ignored (SIGHUP) stays ignored."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self.ask, signal.Signals(number).name)

    def release_signals(self) -> None:
        """From now on signals do what they do by default."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.remove_signal_handler(number)

    def ask(self, why: str) -> None:
        """Stop; or, if that was asked before, at once."""
        if not self.asked.is_set():
            logger.info("stopping: %s", why)
            self.asked.set()
        else:
            logger.warning("stopping at once: %s again", why)
            self.at_once.set()

    def ask_at_end_of(self, pid: int) -> None:
        """Stop when that process, the client that started us, has ended: it may have already."""

        def has_gone() -> None:
            if not self.asked.is_set():
                self.ask(f"the client that started this server (pid {pid}) has gone")

        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            has_gone()
            return
        except OSError as error:
            logger.warning("serving on when the client (pid %d) goes: %s", pid, error)
            return
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            has_gone()

        loop.add_reader(descriptor, ended)
