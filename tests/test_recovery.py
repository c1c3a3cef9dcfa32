"""The exercise in recovery, typed as agent/README.md has it: the host is lost, and everything that was sealed opens again."""

import os
import re
import subprocess
import sys
from pathlib import Path

from support.agent import PATIENCE, RunningAgent
from support.keyring import configuration
from support.skip_unless import ROOT

SHOWN = re.compile(r"^    ((?:cp|keyferry-agent keyring) [^#\n]*)", re.MULTILINE)


def test_the_exercise_in_recovery_works_as_it_is_written(tmp_path: Path) -> None:
    """The exercise uses the backup, and the identity that was kept offline."""
    text = (ROOT / "agent" / "README.md").read_text().split("## Backup and recovery")[1]
    before, after = (SHOWN.findall(part) for part in text.split("The host is lost."))
    assert (len(before), len(after)) == (3, 4)
    bin_directory = Path(sys.executable).parent

    def typed(*lines: str) -> None:
        environment = {**os.environ, "PATH": f"{bin_directory}:{os.environ['PATH']}"}
        for line in lines:
            subprocess.run(["sh", "-ec", line], cwd=tmp_path, env=environment, check=True, timeout=PATIENCE)

    typed("keyferry-agent keyring init keyring.age --new-identity host.key")
    typed("keyferry-agent keyring create-key keyring.age --unseal host.key --alias alias/a", *before)
    config = tmp_path / "agent.toml"

    def agent(identity: str) -> RunningAgent:
        config.write_text(
            configuration(tmp_path / "keyring.age").replace(str(tmp_path / "identity"), str(tmp_path / identity))
        )
        return RunningAgent(["--config", str(config)], tmp_path / "s")

    with agent("host.key") as running, running.client() as kms:
        sealed = kms.encrypt(key_id="alias/a", plaintext="c2VjcmV0").ciphertext_blob
    (tmp_path / "host.key").unlink()
    (tmp_path / "keyring.age").unlink()
    typed(*after)
    with agent("new-host.key") as running, running.client() as kms:
        assert kms.decrypt(ciphertext_blob=sealed).plaintext == "c2VjcmV0"
