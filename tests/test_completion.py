"""The completions of both commands in shells."""

import shutil
import subprocess
from pathlib import Path

import pytest
from support.agent import PATIENCE
from support.skip_unless import ROOT, program

CLIENT = ROOT / "client" / "completions" / "keyferry"
AGENT = ROOT / "agent" / "completions" / "keyferry-agent"


def offered(script: str, function: str, *words: str) -> set[str]:
    """Return bash's completions after these words, the last of which is incomplete."""
    asked = f"""
        source {script}.bash
        COMP_WORDS=({" ".join(f"'{word}'" for word in words)})
        COMP_CWORD={len(words) - 1}
        {function}
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    ended = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=PATIENCE, check=True)
    return set(ended.stdout.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("keyferry", "sta"), {"status"}),
        (("keyferry", "call", "GenerateD"), {"GenerateDataKey", "GenerateDataKeyWithoutPlaintext"}),
        (
            ("keyferry", "call", "ReEncrypt", "--D"),
            {"--DestinationKeyId", "--DestinationEncryptionContext", "--DryRun"},
        ),
        (("keyferry", "call", "ExportDataKey", "--WrappingKeySpec", ""), {"RSA_2048", "EC_SM2"}),
        (("keyferry", "status", "--w"), {"--wait"}),
        (("keyferry", "records", "re"), {"recover", "renew", "rewrap"}),
        (("keyferry", "records", "add", "a", "--Ke"), {"--KeyId", "--KeySpec"}),
        (("keyferry", "module", "init", "m", "--key-spec", ""), {"RSA_2048", "EC_SM2"}),
    ],
)
def test_bash_offers_operations_parameters_and_their_values(words: tuple[str, ...], expected: set[str]) -> None:
    """The completion of `keyferry` comes from the declarations."""
    assert offered(str(CLIENT), "_shtab_keyferry", *words) == expected


def test_bash_offers_the_agents_verbs_too() -> None:
    """Verbs of `keyferry-agent` and their options are completed."""
    verbs = offered(str(AGENT), "_shtab_keyferry_agent", "keyferry-agent", "keyring", "re")
    assert verbs == {"reseal", "recipients", "recipient-of", "remove-recipient"}
    options = offered(str(AGENT), "_shtab_keyferry_agent", "keyferry-agent", "keyring", "rotate", "--st")
    assert options == {"--stage"}


@program("zsh", "zsh")
@pytest.mark.parametrize("script", [CLIENT, AGENT])
def test_zsh_finds_the_completion_where_it_is_installed(script: Path, tmp_path: Path) -> None:
    """Zsh loads the completion by the command's name from a folder of its function path."""
    shutil.copy(f"{script}.zsh", tmp_path / f"_{script.name}")
    asked = f"fpath=({tmp_path} $fpath); autoload -U compinit && compinit -D -u && print $_comps[{script.name}]"
    for arguments in (["-fc", asked], ["-n", f"{script}.zsh"]):
        ended = subprocess.run(["zsh", *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout.strip() in ("", f"_{script.name}")
        assert ended.stdout or arguments[0] == "-n"
