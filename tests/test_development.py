"""`keyferry-agent run --dev`: keys under the names that an application asks for, and where the agent listens."""

from pathlib import Path

import pytest
from support.agent import RunningAgent, configured

from keyferry import Client
from keyferry_agent.cli import main


def test_dev_has_a_key_for_each_alias(socket_path: Path) -> None:
    """`dev` has its two keys, and one for each alias on the command line with its key spec."""
    options = ["alias/orders", "alias/a/b_c=Aliyun_SM4", "alias/dev=Aliyun_SM4"]
    arguments = [word for option in options for word in ("--alias", option)]
    with RunningAgent(["--dev", *arguments], socket_path) as agent, agent.client() as kms:
        listed = [alias.alias_name for alias in kms.list_aliases().aliases.alias]
        specs = {alias: kms.describe_key(key_id=alias).key_metadata.key_spec for alias in listed}
        made = kms.generate_data_key(key_id="alias/a/b_c")
        assert kms.decrypt(ciphertext_blob=made.ciphertext_blob).plaintext == made.plaintext
    aes, sm4 = "Aliyun_AES_256", "Aliyun_SM4"
    assert specs == {"alias/dev": sm4, "alias/dev-sm4": sm4, "alias/orders": aes, "alias/a/b_c": sm4}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--alias", "alias/orders"], "--alias needs --dev; `keyferry-agent keyring create-key --alias`"),
        (["--dev", "--alias", "alias/a", "--alias", "alias/a=Aliyun_SM4"], "--alias: the same alias twice"),
        (["--dev", "--alias", "orders"], "expected alias/NAME"),
        (["--dev", "--alias", "alias/acs/kms"], "the cloud's own"),
        (["--dev", "--alias", "alias/a=AES_256"], "'AES_256' is not a key spec: expected Aliyun_AES_256 or Aliyun_SM4"),
        (["--dev", "--alias", "alias/a="], "'' is not a key spec"),
    ],
)
def test_invalid_alias_is_wrong_usage(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command exits with 2 before it starts an agent."""
    with pytest.raises(SystemExit) as ended:
        main.main(["run", *arguments])
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("table", ["", 'socket = "{}"', '[[listener]]\nname = "a"\npath = "{}"'])
def test_dev_listens_on_the_socket_of_the_environment(table: str, tmp_path: Path) -> None:
    """$KEYFERRY_SOCKET and --socket win over the configuration."""
    path = tmp_path / "environment.sock"
    arguments = configured(tmp_path / "agent", table.format(tmp_path / "configuration.sock"))
    with (
        RunningAgent(arguments, None, environment={"KEYFERRY_SOCKET": str(path)}) as agent,
        Client(path) as kms,
    ):
        assert agent.wait_for("agent.serving")["sockets"] == [str(path)]
        assert kms.get_agent_status().state == "Serving"
