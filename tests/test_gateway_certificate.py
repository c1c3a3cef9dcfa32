"""`keyferry-agent gateway certificate`: an authority that certifies one gateway, and that clients can trust without risk."""

import os
import socket
import ssl
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeAlias

import pytest
from cryptography import x509
from support.agent import PATIENCE
from support.skip_unless import program

from keyferry_agent.cli.gateway.certificates import DAYS, Issued, new_authority, new_certificate, parse_name
from keyferry_agent.cli.main import main

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nserved"
NODE = """
const [, host, name, port, ca] = process.argv;
const servername = /[a-z]/.test(name) ? name : '';
require('https').get({host, servername, port, path: '/', ca: require('fs').readFileSync(ca)}, answer => {
    answer.on('data', data => process.stdout.write(data));
}).on('error', error => { console.error(error.message, error.code); process.exit(1); });
"""


@contextmanager
def served(certificate: Path, key: Path, address: str = "127.0.0.1") -> Iterator[int]:
    """Answer https requests on a port of loopback, which is lent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connection.settimeout(PATIENCE)
                with connection:
                    try:
                        with context.wrap_socket(connection, server_side=True) as tls:
                            tls.recv(65_536)
                            tls.sendall(ANSWER)
                    except OSError:  # the client refused the certificate
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield int(server.getsockname()[1])
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE)


def python_client(host: str, port: int, ca: Path) -> str:
    """Return the answer in Python's ssl with the strictest checks, or the reason of the refusal."""
    context = ssl.create_default_context(cafile=str(ca))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    address = "::1" if host == "::1" else "127.0.0.1"
    try:
        with (
            socket.create_connection((address, port), PATIENCE) as connection,
            context.wrap_socket(connection, server_hostname=host) as tls,
        ):
            tls.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            return tls.recv(65_536).decode().rpartition("\n")[2]
    except ssl.SSLCertVerificationError as error:
        return str(error.verify_message)


def curl_client(host: str, port: int, ca: Path) -> str:
    """Return the answer in curl, or the reason of the refusal."""
    shown = f"[{host}]" if ":" in host else host
    address = "[::1]" if ":" in host else "127.0.0.1"
    arguments = ["--silent", "--show-error", "--noproxy", "*", "--cacert", str(ca)]
    arguments += ["--connect-to", f"{shown}:{port}:{address}:{port}", f"https://{shown}:{port}/"]
    done = subprocess.run(["curl", *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False)
    return done.stdout or done.stderr


def node_client(host: str, port: int, ca: Path) -> str:
    """Return the answer in Node, or the reason of the refusal."""
    done = subprocess.run(
        ["node", "-e", NODE, "::1" if host == "::1" else "127.0.0.1", host, str(port), str(ca)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.stdout or done.stderr


Client: TypeAlias = Callable[[str, int, Path], str]
"""From a name of the server, its port and the authority to trust, to the answer or the reason of a refusal."""
CLIENTS = [
    pytest.param(python_client, id="python"),
    pytest.param(curl_client, id="curl", marks=program("curl", "curl")),
    pytest.param(node_client, id="node", marks=program("node", "nodejs")),
]


def extension(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> x509.Extension[x509.ExtensionType]:
    """Return an extension of a certificate."""
    return certificate.extensions.get_extension_for_class(kind)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files for a gateway that also has the name kms.internal."""
    path = tmp_path / "tls"
    assert main(["gateway", "certificate", str(path), "--host", "kms.internal"]) == 0
    return path


def test_three_files_are_made_and_only_the_key_is_private(folder: Path) -> None:
    """Callers of other users read the authority's certificate; the private key has mode 0600."""
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {"ca.pem": 0o644, "tls.pem": 0o644, "tls.key": 0o600}


def test_no_file_has_the_key_of_the_authority(folder: Path) -> None:
    """The one private key that was written is the gateway's."""
    keys = [path.name for path in folder.iterdir() if b"PRIVATE KEY" in path.read_bytes()]
    assert keys == ["tls.key"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "tls.pem", folder / "tls.key")
    with pytest.raises(ssl.SSLError, match=r"(?i)key.values.mismatch"):
        context.load_cert_chain(folder / "ca.pem", folder / "tls.key")


def test_the_authority_is_bound_to_the_names_of_the_gateway(folder: Path) -> None:
    """Its name constraints are critical, so a client that ignores them refuses the certificate."""
    authority, issued = (x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in ("ca.pem", "tls.pem"))
    constraints = extension(authority, x509.NameConstraints)
    assert constraints.critical
    assert isinstance(constraints.value, x509.NameConstraints)
    permitted = [str(name.value) for name in constraints.value.permitted_subtrees or ()]
    assert permitted == ["127.0.0.0/8", "::1/128", "localhost", "kms.internal"]
    names = extension(issued, x509.SubjectAlternativeName).value
    assert isinstance(names, x509.SubjectAlternativeName)
    assert [str(name.value) for name in names] == ["127.0.0.1", "::1", "localhost", "kms.internal"]
    assert authority.not_valid_after_utc == issued.not_valid_after_utc
    assert issued.not_valid_after_utc - issued.not_valid_before_utc == timedelta(days=397, hours=1)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "kms.internal"])
def test_clients_accept_the_certificate_by_each_name(folder: Path, client: Client, host: str) -> None:
    """An address and names: all that `--host` added, and those that every gateway has."""
    with served(folder / "tls.pem", folder / "tls.key") as port:
        assert client(host, port, folder / "ca.pem") == "served"


@pytest.mark.parametrize("client", CLIENTS)
def test_clients_accept_the_certificate_over_ipv6(folder: Path, client: Client) -> None:
    """The loopback address of IPv6 is a name of every certificate."""
    try:
        with served(folder / "tls.pem", folder / "tls.key", "::1") as port:
            assert client("::1", port, folder / "ca.pem") == "served"
    except OSError:
        pytest.skip("needs IPv6 on the loopback interface")


@pytest.mark.parametrize("client", CLIENTS)
def test_clients_refuse_another_name_of_the_authority(tmp_path: Path, client: Client) -> None:
    """A thief of the authority's key could not impersonate other hosts: the constraints exclude their names."""
    authority = new_authority([parse_name("kms.internal")], 1)
    files = {"ca.pem": authority.pem}
    issued: Issued = new_certificate(authority, [parse_name("example.com")])
    files |= {"tls.pem": issued.pem, "tls.key": issued.key_pem}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with served(tmp_path / "tls.pem", tmp_path / "tls.key") as port:
        assert "permitted subtree violation" in client("localhost", port, tmp_path / "ca.pem")


@pytest.mark.parametrize("client", CLIENTS)
def test_clients_refuse_the_certificate_without_its_authority(folder: Path, tmp_path: Path, client: Client) -> None:
    """A second authority has another name and another key."""
    other = tmp_path / "other"
    assert main(["gateway", "certificate", str(other)]) == 0
    with served(folder / "tls.pem", folder / "tls.key") as port:
        refusal = client("127.0.0.1", port, other / "ca.pem")
    assert any(reason in refusal for reason in ("local issuer certificate", "verify the first certificate")), refusal


def test_output_is_for_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An operator pastes the printed lines into a [[gateway]] table."""
    assert main(["gateway", "certificate", str(tmp_path / "tls"), "--host", "KMS.internal", "--host", "10.0.0.7"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith(f"clients trust {tmp_path / 'tls' / 'ca.pem'}")
    assert lines == [
        f'certificate = "{tmp_path / "tls" / "tls.pem"}"',
        f'private_key = "{tmp_path / "tls" / "tls.key"}"',
        'hosts = ["kms.internal", "10.0.0.7"]',
    ]


@pytest.mark.parametrize("name", ["ca.pem", "tls.pem", "tls.key"])
def test_an_existing_file_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """The command writes all files or none, and its message names the file."""
    (tmp_path / name).write_text("mine")
    assert main(["gateway", "certificate", str(tmp_path)]) == 1
    assert f"{tmp_path / name} exists; remove it, or name another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The parent of the folder has to exist."""
    assert main(["gateway", "certificate", str(tmp_path / "a" / "b")]) == 1
    assert f"{tmp_path / 'a' / 'b'}: No such file or directory" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["", "*.internal", "kms internal", "kms_1", "-kms", "kms-", "a..b", ".", "10.0.0", "10.0.0.256", "é", "a" * 64],
)
def test_a_name_that_is_not_a_hosts_name_is_refused(name: str) -> None:
    """Wildcards, empty labels, and texts that resemble addresses are not names of a gateway."""
    with pytest.raises(ValueError, match=r"a DNS name like kms\.internal or an IP address is expected"):
        parse_name(name)


@pytest.mark.parametrize("days", ["0", "-1", str(DAYS[-1] + 1), "1.5", "many"])
def test_days_out_of_range_are_wrong_usage(tmp_path: Path, days: str) -> None:
    """Exit code 2, and no file."""
    with pytest.raises(SystemExit, match="2"):
        main(["gateway", "certificate", str(tmp_path / "tls"), "--days", days])
    assert not (tmp_path / "tls").exists()
