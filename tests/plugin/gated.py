"""plugins/fleece.py with copies that wait: nbdkit loads this file instead.

A temp image's write first reads the FIFO that GATE names to its end, so that it goes on when the
test closes its own end.
"""

import os

from tests.behind_nbdkit import PLUGIN

__file__ = str(PLUGIN)
exec(compile(PLUGIN.read_text(), PLUGIN, "exec"), globals())

from fleecenbd.storage import system_calls  # noqa: E402
from fleecenbd.storage.temp import TempImage  # noqa: E402

_init, _write_all = TempImage.__init__, system_calls.write_all


def _init_gated(self, descriptor, name, size, **options):  # type: ignore[no-untyped-def]
    _init(self, descriptor, name, size, **options)
    self.pwrite_now = lambda offset, data: False


def _write_all_gated(descriptor, offset, data, name):  # type: ignore[no-untyped-def]
    gate = os.environ["GATE"]
    if name.endswith("@n") and os.path.exists(gate):
        fifo = os.open(gate, os.O_RDONLY)  # ``open`` is the plugin's own here
        while os.read(fifo, 4096):
            pass
        os.close(fifo)
    return _write_all(descriptor, offset, data, name)


TempImage.__init__ = _init_gated
system_calls.write_all = _write_all_gated
