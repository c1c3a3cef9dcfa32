"""The options of `run`, and the settings that result from them. Each call reads the files again."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from ..authz.grants import Grant
from . import grant_files
from .settings import Settings, SettingsError, read

__all__ = ["Options", "StartError"]

_DEV_GRANT: Final = "dev"


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
    ) -> None:
        self.config = config
        self._socket = socket
        self._keyring = keyring
        self._unseal = unseal
        self.dev = dev
        self._aliases = aliases or {}

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
        return settings

    def files(self, settings: Settings) -> list[Path]:
        """Return the paths of the configuration, the folder of grants, the keyring, the unseal secret and certificates."""
        folder = settings.grants_folder or (self.config and grant_files.beside(self.config))
        certificates = [path for gateway in settings.gateways for path in gateway.files]
        paths = (self.config, folder, settings.keyring, settings.unseal)
        return [*(path for path in paths if path is not None), *certificates]
