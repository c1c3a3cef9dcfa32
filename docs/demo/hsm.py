"""The main job with a hardware security module's interface: PKCS#11, here SoftHSM2. Run it with `make demo-hsm`.

Everything is in a folder that is gone at the end, the token too. With a real module, only library, label and PIN change.
"""

import glob
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from main_job import CONTEXT, MEBIBYTE, digest, fact, running_agent, say, step

from keyferry import Client
from keyferry.module import Pkcs11Module, SoftwareModule

LIBRARIES = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib*/softhsm/libsofthsm2.so",
    "/usr/lib*/pkcs11/libsofthsm2.so",
    "/usr/lib/*/softhsm/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
)
LABEL = "demo"
MISSING = """make demo-hsm needs SoftHSM2, a token in software. Install it, as root, and try again:
    Debian, Ubuntu   apt-get install softhsm2
    Fedora           dnf install softhsm
    Alpine           apk add softhsm"""


def find_library() -> str:
    """The PKCS#11 library of SoftHSM2. Ends the demo where there is none."""
    found = [path for pattern in LIBRARIES for path in glob.glob(pattern)]
    if not found or shutil.which("softhsm2-util") is None:
        sys.exit(MISSING)
    return found[0]


def make_token(folder: Path) -> Path:
    """Initialise a token, as its security officer does, and give the file with the user's PIN."""
    (folder / "tokens").mkdir()
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder}/tokens\n")
    os.environ["SOFTHSM2_CONF"] = str(folder / "softhsm2.conf")
    pin, pin_file = secrets.token_hex(8), folder / "pin"
    pin_file.touch(mode=0o600)
    pin_file.write_text(pin)
    # A throw-away token's: SoftHSM2's own tool takes PINs on its command line only.
    arguments = ["--init-token", "--free", "--label", LABEL, "--pin", pin, "--so-pin", secrets.token_hex(8)]
    subprocess.run(["softhsm2-util", *arguments], check=True, stdout=subprocess.DEVNULL)
    return pin_file


def seen_from_outside(library: str, pin: str) -> str:
    """What OpenSC's pkcs11-tool says of the private key."""
    if shutil.which("pkcs11-tool") is None:
        return "(apt-get install opensc, and pkcs11-tool shows it)"
    command = ["pkcs11-tool", "--module", library, "--token-label", LABEL, "--login", "--pin", pin]
    lines = subprocess.run(
        [*command, "--list-objects", "--type", "privkey"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return "; ".join(line.strip() for line in lines if line.strip().startswith(("Usage:", "Access:")))


def main_job(library: str, folder: Path, kms: Client) -> None:
    """Open, generate and export, import, use, lose, recover; then leave the token for good."""
    document, sealed = folder / "report.bin", folder / "report.sealed"
    document.write_bytes(os.urandom(8 * MEBIBYTE))

    step(1, "A token, and a key pair in it that can unwrap keys, and do nothing else.")
    pin_file = make_token(folder)
    module = Pkcs11Module.open(library, token_label=LABEL, key_label="wrapping", pin_file=pin_file, generate=True)
    fact(f"{module!r}: tried out with a throw-away key, it unwraps with {module.wrapping_algorithm}")
    fact(f"pkcs11-tool sees: {seen_from_outside(library, pin_file.read_text())}")

    step(2, "GenerateAndExportDataKey, and the token unwraps the data key: inside, where nobody can read it.")
    key, record = module.new_data_key(kms, key_id="alias/dev", encryption_context=CONTEXT)
    (folder / "record.json").write_text(json.dumps(record))
    fact(f"the handle is all that there is outside: {key!r}")

    step(3, f"The token encrypts and decrypts a file of {document.stat().st_size // MEBIBYTE} MiB.")
    sealed.write_bytes(module.encrypt(key, document.read_bytes(), aad=b"report"))
    assert module.decrypt(key, sealed.read_bytes(), aad=b"report") == document.read_bytes()
    fact(f"sha256 before {digest(document)}, sealed {digest(sealed)}")

    step(4, "The application ends. The token keeps the key pair, and forgets the data key.")
    module.close()

    step(5, "It starts again: the key pair is found by its label, and ExportDataKey brings the data key back.")
    module = Pkcs11Module.open(library, token_label=LABEL, key_label="wrapping", pin_file=pin_file)
    key = module.recover_data_key(kms, json.loads((folder / "record.json").read_text()))
    assert module.decrypt(key, sealed.read_bytes(), aad=b"report") == document.read_bytes()
    fact("the same file again")
    module.close()

    step(6, "The token is lost for good. Another module, in software, takes over from the same record.")
    shutil.rmtree(folder / "tokens")
    other = SoftwareModule.generate("RSA_2048")
    key = other.recover_data_key(kms, json.loads((folder / "record.json").read_text()))
    assert other.decrypt(key, sealed.read_bytes(), aad=b"report") == document.read_bytes()
    fact("the same file again")


def main() -> None:
    """Run the main job with SoftHSM2."""
    library = find_library()
    say("Keyferry: a data key that nobody sees, in a token that does not give it away.")
    with tempfile.TemporaryDirectory(prefix="keyferry-demo-") as name:
        folder = Path(name)
        agent = folder / "agent.sock"
        with running_agent(agent), Client(agent) as kms:
            say(f"\nkeyferry-agent run --dev is serving: {agent}")
            main_job(library, folder, kms)
    say("\nDone: the token, its folder and its PIN are gone again.")


if __name__ == "__main__":
    main()
