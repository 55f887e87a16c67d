"""The guest's first and only root file system: a busybox, kernel modules, and three scripts.

The archive is written here, byte by byte, so that no cpio is needed and no root for its device
node: Documentation/driver-api/early-userspace/buffer-format.rst of Linux has the layout ("newc").
"""

import lzma
import re
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parent / "scripts"
GUEST_KERNEL = Path(__file__).parents[2] / "scripts" / "guest-kernel.sh"
DOWNLOAD_TIMEOUT_S = 600.0

MODULES = ("virtio_pci", "virtio_blk", "ext4")
"""What a guest with a virtio disk needs, if the kernel has it not built in."""


@dataclass(frozen=True)
class Kernel:
    """What scripts/guest-kernel.sh has fetched."""

    folder: Path

    @property
    def image(self) -> Path:
        """The kernel, as QEMU's -kernel takes it."""
        return self.folder / "vmlinuz"


def fetched_kernel() -> Kernel:
    """The kernel in the cache folder, downloaded the first time. An error if it can't be."""
    result = subprocess.run(
        ["sh", GUEST_KERNEL],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DOWNLOAD_TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, f"no kernel for the guest:\n{result.stderr}"
    return Kernel(Path(result.stdout.splitlines()[-1]))


def build_initramfs(kernel: Kernel, target: Path) -> Path:
    """Write the archive, uncompressed: the guest's processor is an emulated one."""
    archive = _Archive()
    for name in ("bin", "dev", "lib", "mnt", "proc", "sys", "tmp"):
        archive.add(name, stat.S_IFDIR | 0o755)
    # The kernel opens it for the first process, before that could mount anything.
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("bin/busybox", stat.S_IFREG | 0o755, (kernel.folder / "busybox").read_bytes())
    for script in sorted(SCRIPTS.iterdir()):
        archive.add(script.name, stat.S_IFREG | 0o755, script.read_bytes())
    order = []
    for name, content in _modules_in_order(kernel.folder / "modules"):
        archive.add(f"lib/{name}.ko", stat.S_IFREG | 0o644, content)
        order.append(f"/lib/{name}.ko\n")
    archive.add("lib/order", stat.S_IFREG | 0o644, "".join(order).encode())
    target.write_bytes(archive.finish())
    return target


class _Archive:
    """A cpio archive in the newc format, growing in memory."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def add(
        self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        """Append a file, a folder or a device node; folders come before what is in them."""
        self._count += 1
        encoded = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (self._count, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(encoded), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields)
        self._parts += [_padded(header + encoded), _padded(content)]

    def finish(self) -> bytes:
        """The whole archive."""
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _modules_in_order(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each module that is needed, whatever it depends on before it.

    The packages have no modules.dep: depmod would make it where they are installed. So the
    dependencies are read where depmod reads them: in the modules.
    """
    paths = {
        _plain(path.name.split(".")[0]): path
        for path in sorted(folder.rglob("*.ko*"))
        if path.name.endswith((".ko", ".ko.xz"))
    }
    built_in = {
        _plain(Path(line).stem) for line in (folder / "modules.builtin").read_text().splitlines()
    }
    done: set[str] = set()

    def visit(name: str, *, must: bool) -> Iterator[tuple[str, bytes]]:
        if name in done or name in built_in:
            return
        done.add(name)
        if name not in paths:
            assert not must, f"the kernel has no module {name}"
            return
        content = paths[name].read_bytes()
        if paths[name].suffix == ".xz":
            content = lzma.decompress(content)
        for needed in _modinfo(content, b"depends"):
            yield from visit(needed, must=True)
        for needed in _soft_dependencies(content):
            yield from visit(needed, must=False)
        yield name, content

    for name in MODULES:
        yield from visit(name, must=True)


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _modinfo(module: bytes, key: bytes) -> list[str]:
    """The comma-separated names in the section .modinfo under a key."""
    names = []
    for value in re.findall(rb"\0" + key + rb"=([\w,-]*)\0", module):
        names += [_plain(name) for name in value.decode().split(",") if name]
    return names


def _soft_dependencies(module: bytes) -> list[str]:
    """Modules that should be there first ("softdep=pre: a b post: c"): an algorithm by its name."""
    names = []
    for value in re.findall(rb"\0softdep=([^\0]*)\0", module):
        before = re.search(r"\bpre:([^:]*)(?=\w+:|$)", value.decode())
        if before is not None:
            names += [_plain(name) for name in before[1].split()]
    return names
