"""The text that an agent with `--dev --gateway` prints: what a program with the cloud's SDK needs to call it."""

from ..config.settings import Settings
from ..keyring.keyring import Keyring

__all__ = ["introduction"]

_TEXT = """\
# The environment variables that the SDKs read. Paste these lines into another shell:
export ALIBABA_CLOUD_ACCESS_KEY_ID={access_key_id}
export ALIBABA_CLOUD_ACCESS_KEY_SECRET={secret}

# A first call in Python, for the same shell. It needs: pip install alibabacloud_kms20160120
python3 - <<'END'
from alibabacloud_credentials.client import Client as Credentials
from alibabacloud_kms20160120 import models
from alibabacloud_kms20160120.client import Client
from alibabacloud_tea_openapi.models import Config

kms = Client(Config(credential=Credentials(), endpoint="{endpoint}", protocol="http"))
made = kms.generate_data_key(models.GenerateDataKeyRequest(key_id="alias/dev")).body
print("CiphertextBlob:", made.ciphertext_blob)
END
"""


def introduction(settings: Settings, keyring: Keyring) -> str:
    """Return lines for a shell, with the secret of the access key that `--dev` generated; empty without a gateway."""
    access_key = keyring.access_keys.get(settings.development_access_key)
    if access_key is None:
        return ""
    with access_key.secret.lend() as secret:
        text = bytes(secret[:-1]).decode()  # an & follows it
    return _TEXT.format(
        access_key_id=settings.development_access_key, secret=text, endpoint=settings.gateways[-1].listen
    )
