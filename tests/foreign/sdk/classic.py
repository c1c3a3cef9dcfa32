"""The classic SDK for Python, by its request classes: `python -m foreign.sdk.classic` (see `lines`)."""

import importlib
import json
from typing import Any

from aliyunsdkcore.acs_exception.exceptions import ServerException
from aliyunsdkcore.auth.credentials import AccessKeyCredential, StsTokenCredential
from aliyunsdkcore.client import AcsClient
from aliyunsdkcore.http import protocol_type
from foreign.sdk import lines

# The SDK compares the protocol with its own constant by identity. Another equal text means http.
PROTOCOLS = {"http": protocol_type.HTTP, "https": protocol_type.HTTPS}


def client(settings: lines.Settings) -> lines.Call:
    """Return a function that calls an action with the request class of that name."""
    names = [settings["access_key_id"], settings["access_key_secret"], settings.get("security_token")]
    credential = StsTokenCredential(*names) if names[2] else AccessKeyCredential(*names[:2])
    acs = AcsClient(
        region_id="cn-hangzhou",
        credential=credential,
        verify=settings["ca"],
        max_retry_time=settings.get("attempts"),
        auto_retry=bool(settings.get("attempts")),
    )

    def call(action: str, parameters: dict[str, Any]) -> dict[str, Any]:
        module = importlib.import_module(f"aliyunsdkkms.request.v20160120.{action}Request")
        request = getattr(module, f"{action}Request")()
        request.set_endpoint(settings["host"])
        request.set_protocol_type(PROTOCOLS[settings["protocol"]])
        for name, value in parameters.items():
            getattr(request, f"set_{name}")(json.dumps(value) if isinstance(value, dict) else value)
        return dict(json.loads(acs.do_action_with_exception(request)))

    return call


def describe(error: Exception) -> dict[str, Any]:
    """Return what an exception of the SDK has."""
    if isinstance(error, ServerException):
        return {
            "Code": error.get_error_code(),
            "HttpStatus": error.get_http_status(),
            "Message": error.get_error_msg(),
            "RequestId": error.get_request_id(),
        }
    return {"Code": None, "Message": str(error)}


if __name__ == "__main__":
    lines.serve(client, describe)
