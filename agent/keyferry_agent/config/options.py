"""The options of `run`, and the settings and keyring that result from them. Each call reads the files again."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog

from ..authz.grants import Grant
from ..keyring import loader
from ..keyring.fdstore import KeyringPersister, Look
from ..keyring.keyring import Keyring, development_keyring
from . import grant_files
from .settings import Settings, SettingsError, read

__all__ = ["Options", "StartError"]

_DEV_GRANT: Final = "dev"

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


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
        self._aliases = aliases

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
            everything = Grant(_DEV_GRANT, {"uid": os.geteuid()}, ("kms:*",), ("*",))
            settings = replace(settings, memory="prefer", grants=(*settings.grants, everything))
        return settings

    def load_keyring(
        self, settings: Settings, keeper: KeyringPersister | None = None, looked: Look = None, secret: int | None = None
    ) -> Keyring:
        """Load the keyring that the settings name, and store it with `keeper`; with `--dev`, make a new one.

        `looked`: the keyring file's status before it was read. `secret`: the descriptor of a pipe from which the unseal secret
        is read, instead of its file. Blocks. Raises `StartError`, `KeyringError`, or `SecretMemoryError` if there is not enough
        locked memory.
        """
        require, backing = settings.memory == "require", settings.memory_backing
        if self.dev:
            return development_keyring(backing=backing, require=require, aliases=self._aliases)
        unseal = loader.STANDARD_INPUT if secret is not None else settings.unseal
        if settings.keyring is None or unseal is None:
            missing = "keyring" if settings.keyring is None else "unseal"
            raise StartError(f"no {missing} is configured: set {missing} = in the file, give --{missing}, or try --dev")
        share = keeper.share if keeper else None
        keyring = loader.load(settings.keyring, unseal, backing=backing, require=require, share=share, secret=secret)
        if keeper and not keeper.keep(keyring, looked):
            log.warning("keyring.not_kept", what="it takes memfd_secret, and a service manager that keeps descriptors")
        return keyring

    def files(self, settings: Settings) -> list[Path]:
        """Return the paths of the configuration, the folder of grants, the keyring and the unseal secret, except unset ones."""
        folder = settings.grants_folder or (self.config and grant_files.beside(self.config))
        return [path for path in (self.config, folder, settings.keyring, settings.unseal) if path is not None]
