"""The tests' own signatures: the examples of the cloud's documentation, and the product's verification."""

from pathlib import Path

from support.gateway import (
    Credentials,
    acs3_headers,
    free_ports,
    prepare,
    sign_acs3,
    sign_v1,
    signed_headers,
    v1_parameters,
)

from keyferry_agent.cli.main import main

CREDENTIALS = Credentials("LTAIexample", "a secret of the tests", "a token")


def test_version_1_signs_the_documented_example() -> None:
    """The documentation prints the parameters of DescribeRegions, a secret, and the signature."""
    parameters = {
        "Timestamp": "2016-02-23T12:46:24Z",
        "Format": "XML",
        "AccessKeyId": "testid",
        "Action": "DescribeRegions",
        "SignatureMethod": "HMAC-SHA1",
        "SignatureNonce": "3ee8c1b8-83d3-44af-a94f-4e0ad82fd6cf",
        "Version": "2014-05-26",
        "SignatureVersion": "1.0",
    }
    assert sign_v1("testsecret", "GET", parameters) == "OLeaidS1JvxuMvnyHOwuJ+uX5qY="


def test_acs3_signs_the_documented_example() -> None:
    """The documentation prints the headers and the query of RunInstances, a secret, and the signature."""
    headers = {
        "host": "ecs.cn-shanghai.aliyuncs.com",
        "x-acs-action": "RunInstances",
        "x-acs-content-sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "x-acs-date": "2023-10-26T10:22:32Z",
        "x-acs-signature-nonce": "3156853299f313e23d1673dc12e1703d",
        "x-acs-version": "2014-05-26",
    }
    query = {"ImageId": "win2019_1809_x64_dtc_zh-cn_40G_alibase_20230811.vhd", "RegionId": "cn-shanghai"}
    signature = sign_acs3("YourAccessKeySecret", "POST", query, headers, b"")
    assert signature == "06563a9e1b43f5dfe96b81484da74bceab24a1d853912eee15083a6f0f3283c0"


def test_a_token_and_a_body_are_part_of_what_is_signed() -> None:
    """Common parameters and headers can be replaced before they are signed."""
    parameters = v1_parameters(CREDENTIALS, "ListKeys", {"PageSize": "2"}, Timestamp="2026-01-01T00:00:00Z")
    assert (parameters["SecurityToken"], parameters["Timestamp"]) == ("a token", "2026-01-01T00:00:00Z")
    headers = acs3_headers(CREDENTIALS, "localhost", "ListKeys", {}, b"PageSize=2", x_acs_date="2026-01-01T00:00:00Z")
    assert {"host", "content-type", "x-acs-security-token"} <= set(signed_headers(headers))
    assert headers["x-acs-date"] == "2026-01-01T00:00:00Z"
    assert "secret" not in repr(CREDENTIALS)


def test_a_prepared_configuration_has_no_problems(tmp_path: Path) -> None:
    """The command that checks configurations accepts it; two ports are different."""
    prepared = prepare(tmp_path, limits="gateway_connections = 16")
    assert main(["check", str(prepared.config)]) == 0
    assert prepared.port("http") != prepared.port("https")
    assert len(set(free_ports(3))) == 3
