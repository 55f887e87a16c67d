"""A checksum of a disk that does not depend on the order in which it was copied.

The disk is cut into blocks of 1 MiB (the last one may be shorter). Each has a digest, taken from
what was read before it is released; the checksum, the *root*, is the digest of all blocks' digests
one after the other, in the disk's order. So blocks may come in any order, from several runs, and
one that is known to be zeroes costs nothing.

Of a pull that copies only what is dirty, a block's digest is that of its dirty bytes, in order, and
a block with none of them has no digest. The file names the ranges then, for they are what can be
compared.

``TARGET.ALGORITHM`` has a line for each word, and a line for each range:

    fleecenbd checksum 1
    algorithm blake2b
    block 1048576
    size 107374182400
    root 7c1f…
    range 0 65536          only of a pull of dirty ranges: offset and length, in order

docs/pull.md has the lines of Python that compute it anew, and a test runs them.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeAlias

from fleecenbd.engine.zeroes import ZEROES
from fleecenbd.storage.device import Buffer

FIRST_LINE = b"fleecenbd checksum 1\n"
BLOCK_SIZE = 1 << 20
"""Bytes of a block. A part of the format."""

DEFAULT_ALGORITHM = "blake2b"
"""What ``--verify`` compares where no ``--checksum`` was asked for."""

THREAD_LENGTH_MIN = 64 << 10
"""Bytes from which on a digest is computed in a thread: hashlib lets others run meanwhile."""

Piece: TypeAlias = "Buffer | int"
"""Bytes, or a number of zeroes."""


class RunInThread(Protocol):
    """Calls a function where the loop does not wait for it."""

    async def __call__(self, function: Callable[[], bytes]) -> bytes:
        """Its result."""


async def in_executor(function: Callable[[], bytes]) -> bytes:
    """In one of asyncio's own threads."""
    return await asyncio.get_running_loop().run_in_executor(None, function)


def algorithms() -> list[str]:
    """Those that can be asked for: every one of Python's with a length of its own."""
    names = {name.replace("-", "_").lower() for name in hashlib.algorithms_guaranteed}
    return sorted(name for name in names if not name.startswith("shake"))


class Checksums:
    """Digests of blocks by one algorithm."""

    def __init__(
        self,
        algorithm: str,
        size: int,
        *,
        block_size: int = BLOCK_SIZE,
        run: RunInThread = in_executor,
    ) -> None:
        """``size``: of the disk, in bytes. Raises OSError for an algorithm that is not there."""
        if algorithm not in algorithms():
            raise OSError(
                errno.EINVAL,
                f"there is no checksum {algorithm!r}; choose one of {', '.join(algorithms())}",
            )
        self.algorithm = algorithm
        self.digest_length = hashlib.new(algorithm).digest_size
        self._size = size
        self._block_size = block_size
        self._run = run
        self._zeroes: dict[int, bytes] = {}
        """The digest of so many zeroes."""

    async def of(self, pieces: Sequence[Piece]) -> bytes:
        """The digest of the pieces, one after the other."""
        length = sum(piece if isinstance(piece, int) else len(piece) for piece in pieces)
        if length < THREAD_LENGTH_MIN:
            return self._compute(pieces)
        return await self._run(lambda: self._compute(pieces))

    def _compute(self, pieces: Sequence[Piece]) -> bytes:
        digest = hashlib.new(self.algorithm)
        for piece in pieces:
            if isinstance(piece, int):
                while piece > 0:
                    step = min(piece, len(ZEROES))
                    digest.update(memoryview(ZEROES)[:step])
                    piece -= step
            else:
                digest.update(piece)
        return digest.digest()

    def of_zeroes(self, length: int) -> bytes:
        """The digest of ``length`` zeroes: computed once."""
        found = self._zeroes.get(length)
        if found is None:
            found = self._zeroes[length] = self._compute([length])
        return found

    def block_length(self, block: int) -> int:
        """Bytes of a block."""
        return min(self._block_size, self._size - block * self._block_size)

    def root(self, blocks: Iterable[int], digests: Mapping[int, bytes]) -> str:
        """The root over these blocks, in order; one without a digest is of zeroes."""
        root = hashlib.new(self.algorithm)
        for block in blocks:
            digest = digests.get(block)
            root.update(digest if digest is not None else self.of_zeroes(self.block_length(block)))
        return root.hexdigest()


def checksum_text(
    algorithm: str, size: int, root: str, ranges: Iterable[tuple[int, int]] | None
) -> str:
    """What ``TARGET.ALGORITHM`` says; ``ranges``: (offset, length), of a pull of dirty ranges."""
    lines = [
        FIRST_LINE.decode().rstrip(),
        f"algorithm {algorithm}",
        f"block {BLOCK_SIZE}",
        f"size {size}",
        f"root {root}",
    ]
    if ranges is not None:
        lines += [f"range {offset} {length}" for offset, length in ranges]
    return "".join(f"{line}\n" for line in lines)
