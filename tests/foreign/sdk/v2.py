"""The V2 SDK for Python, by the methods of its client: `python -m foreign.sdk.v2 sync|async` (see `lines`)."""

import asyncio
import re
import sys
from typing import Any

from alibabacloud_kms20160120 import models
from alibabacloud_kms20160120.client import Client
from alibabacloud_tea_openapi.models import Config
from darabonba.policy.retry import RetryOptions
from darabonba.runtime import RuntimeOptions
from foreign.sdk import lines

RETRIED = ["RetryError", "RequestException"]
"""Names of the SDK's exceptions for failures of the network."""


def method_of(action: str) -> str:
    """Return the method of an action: `re_encrypt_with_options` of ReEncrypt."""
    return f"{re.sub('(?<!^)(?=[A-Z])', '_', action).lower()}_with_options"


def client(settings: lines.Settings) -> lines.Call:
    """Return a function that calls an action with a typed request."""
    config = Config(
        access_key_id=settings["access_key_id"],
        access_key_secret=settings["access_key_secret"],
        security_token=settings.get("security_token"),
        endpoint=settings["host"],
        protocol=settings["protocol"],
        ca=settings["ca"],
        signature_algorithm=settings.get("signature_algorithm"),
    )
    if settings.get("attempts"):
        config.retry_options = RetryOptions(
            {
                "retryable": True,
                "retryCondition": [{"maxAttempts": settings["attempts"], "exception": RETRIED, "errorCode": []}],
            }
        )
    kms, runtime = Client(config), RuntimeOptions()

    def call(action: str, parameters: dict[str, Any]) -> dict[str, Any]:
        request = getattr(models, f"{action}Request")().from_map(parameters)
        if "async" in sys.argv:
            response = asyncio.run(getattr(kms, f"{method_of(action)}_async")(request, runtime))
        else:
            response = getattr(kms, method_of(action))(request, runtime)
        return dict(response.body.to_map())

    return call


def describe(error: Exception) -> dict[str, Any]:
    """Return what an exception of the SDK has."""
    return {
        "Code": getattr(error, "code", None),
        "HttpStatus": getattr(error, "status_code", None),
        "Message": getattr(error, "message", str(error)),
        "RequestId": getattr(error, "request_id", None),
    }


if __name__ == "__main__":
    lines.serve(client, describe)
