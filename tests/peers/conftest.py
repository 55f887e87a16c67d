"""Tests with peers that are newer than Debian 12's: libnbd from 1.18, QEMU from 9.1, nbdkit.

Debian 13 has them; elsewhere `make interop PEERS=trixie` runs these tests in a folder of its own.
With an older libnbd there is nothing here to collect: what would be tested is what it lacks.
"""

import nbd

collect_ignore_glob = [] if hasattr(nbd.NBD, "get_extended_headers_negotiated") else ["test_*"]
