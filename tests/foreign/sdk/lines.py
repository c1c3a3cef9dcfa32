"""The form of the programs with the cloud's SDKs: a line of JSON for each request, and a line of JSON for its outcome.

A line is `{"client": {...}}`, with the settings of a new client, or `{"action": ..., "parameters": {...}}`. The outcome is
`{"result": ...}` or `{"error": {"Code", "HttpStatus", "Message", "RequestId"}}`, with what the SDK's exception has of these.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

Settings = dict[str, Any]
"""access_key_id, access_key_secret, host (ADDRESS:PORT), protocol, ca (a path).

Optional: security_token, signature_algorithm, attempts.
"""
Call = Callable[[str, dict[str, Any]], dict[str, Any]]


def serve(client: Callable[[Settings], Call], describe: Callable[[Exception], dict[str, Any]]) -> None:
    """Answer each line of standard input."""
    call: Call | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "client" in asked:
                call = client(asked["client"])
                outcome: dict[str, Any] = {"result": {}}
            else:
                assert call is not None
                outcome = {"result": call(asked["action"], asked["parameters"])}
        except Exception as error:
            outcome = {"error": {"Type": type(error).__name__, **describe(error)}}
        print(json.dumps(outcome), flush=True)
