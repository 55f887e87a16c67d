"""nbdkit's TLS in front of the plugin, by certificates and by a shared key, with libnbd."""

from pathlib import Path

import pytest

from tests.behind_nbdkit import behind_nbdkit
from tests.disks import first_difference
from tests.serving import run, try_run

CERTIFICATES = {
    "ca": "cn = tests\nca\ncert_signing_key\n",
    "server": "cn = localhost\ndns_name = localhost\ntls_www_server\nencryption_key\nsigning_key\n",
    "client": "cn = client\ntls_www_client\nencryption_key\nsigning_key\n",
}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as nbdkit and libnbd want it: an authority, a server and a client."""
    folder = tmp_path_factory.mktemp("pki")
    for name, template in CERTIFICATES.items():
        key, info = folder / f"{name}-key.pem", folder / f"{name}.info"
        info.write_text(f"expiration_days = 2\n{template}")
        run("certtool", "--generate-privkey", "--key-type=ecdsa", "--outfile", key)
        signer = [f"--load-ca-privkey={folder / 'ca-key.pem'}"]
        signer += [f"--load-ca-certificate={folder / 'ca-cert.pem'}"]
        how = ["--generate-self-signed"] if name == "ca" else ["--generate-certificate", *signer]
        run(
            *("certtool", *how, f"--load-privkey={key}", f"--template={info}"),
            *("--outfile", folder / f"{name}-cert.pem"),
        )
    return folder


def test_a_pull_with_certificates_is_complete_and_one_in_clear_is_refused(
    disk: Path, tmp_path: Path, certificates: Path
) -> None:
    target = tmp_path / "backup.raw"
    options = ["--tls=require", f"--tls-certificates={certificates}", "--tls-verify-peer"]
    with behind_nbdkit(tmp_path, disk, "--begin", "n", options=options, tcp=True) as server:
        clear = server.tcp_uri("vm@n").replace("127.0.0.1", "localhost")
        assert try_run("nbdinfo", clear).returncode != 0
        uri = clear.replace("nbd:", "nbds:") + f"?tls-certificates={certificates}"
        run("nbdcopy", uri, target)
        assert "TLS" in run("nbdinfo", uri)
    assert first_difference(disk, target) is None


def test_a_pull_with_a_shared_key_is_complete_and_another_key_is_refused(
    disk: Path, tmp_path: Path
) -> None:
    target, keys, others = tmp_path / "backup.raw", tmp_path / "keys.psk", tmp_path / "others.psk"
    for file in (keys, others):
        run("psktool", "-u", "backup", "-p", file)
    options = ["--tls=require", f"--tls-psk={keys}"]
    with behind_nbdkit(tmp_path, disk, "--begin", "n", options=options) as server:
        uri = f"nbds+unix://backup@/vm@n?socket={server.unix}&tls-psk-file="
        assert try_run("nbdinfo", f"{uri}{others}").returncode != 0
        run("nbdcopy", f"{uri}{keys}", target)
    assert first_difference(disk, target) is None
