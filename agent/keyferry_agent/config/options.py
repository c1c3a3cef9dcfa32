"""The options of `run`, and the settings that result from them. Each call reads the files again."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from ..authz.grants import Grant
from . import gateways, grant_files
from .settings import Settings, SettingsError, read

__all__ = ["DevelopmentGateway", "Options", "StartError"]

_DEV_GRANT: Final = "dev"
_DEV_GATEWAY: Final = "dev-gateway"
"""The name of the gateway of `--gateway`, and of the grant to its access key."""


class DevelopmentGateway(NamedTuple):
    """The gateway of `--dev`, and the ID of the access key that everything is granted to."""

    listen: str
    access_key_id: str


class StartError(Exception):
    """The agent cannot start, or cannot adopt a new configuration. The message contains the reason and a remedy."""


class Options:
    """The options of `run`. They take precedence over the configuration file."""

    def __init__(
        self,
        *,
        config: Path | None,
        socket: Path | None,
        keyring: Path | None,
        unseal: Path | None,
        dev: bool,
        aliases: Mapping[str, str] | None = None,
        gateway: DevelopmentGateway | None = None,
    ) -> None:
        self.config = config
        self._socket = socket
        self._keyring = keyring
        self._unseal = unseal
        self.dev = dev
        self._aliases = aliases or {}
        self._gateway = gateway

    def settings(self) -> Settings:
        """Read the configuration, and override it with the options. Raises `SettingsError`."""
        settings = read(self.config) if self.config else Settings()
        if self._socket:
            if len(settings.listeners) > 1:
                raise SettingsError(["--socket names one socket; the configuration has several [[listener]] tables"])
            settings = replace(settings, listeners=(replace(settings.listeners[0], path=self._socket),))
        if self._keyring:
            settings = replace(settings, keyring=self._keyring)
        if self._unseal:
            settings = replace(settings, unseal=self._unseal, unseal_socket=None)
        if self.dev:
            if settings.keyring:
                raise SettingsError(["--dev makes a keyring of its own, for trying out: leave the other one out"])
            # Users who try an agent out may not be allowed to lock memory, and this keyring does not need protection.
            grant = Grant(_DEV_GRANT, {"uid": os.geteuid()}, ("kms:*",), ("*",))
            settings = replace(
                settings,
                memory="prefer",
                grants=(*settings.grants, grant),
                development_aliases=self._aliases,
            )
        if self._gateway:
            settings = _with_gateway(settings, self._gateway)
        return settings

    def files(self, settings: Settings) -> list[Path]:
        """Return the paths of the configuration, the folder of grants, the keyring, the unseal secret and certificates."""
        folder = settings.grants_folder or (self.config and grant_files.beside(self.config))
        certificates = [path for gateway in settings.gateways for path in gateway.files]
        paths = (self.config, folder, settings.keyring, settings.unseal)
        return [*(path for path in paths if path is not None), *certificates]


def _with_gateway(settings: Settings, added: DevelopmentGateway) -> Settings:
    """Return settings with a further gateway on http, whose access key may do everything. Raises `SettingsError`."""
    gateway = gateways.Gateway(name=_DEV_GATEWAY, listen=added.listen)
    names = [listener.name for listener in settings.listeners]
    if problems := gateways.problems([*settings.gateways, gateway], names, []):
        raise SettingsError([f"--gateway: {problem}" for _, problem in problems])
    grant = Grant(_DEV_GATEWAY, {"access_key": added.access_key_id}, ("kms:*",), ("*",))
    return replace(
        settings,
        gateways=(*settings.gateways, gateway),
        grants=(*settings.grants, grant),
        development_access_key=added.access_key_id,
    )
