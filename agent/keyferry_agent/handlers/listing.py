"""Lists, a page at a time: ListKeys, ListKeyVersions, ListAliases. A caller sees only the keys that it has a grant on."""

from collections.abc import Sequence
from typing import TypeVar

from keyferry import operations
from keyferry.parameters import KEY_ID, PAGE, PAGE_NUMBER, PAGE_SIZE

from .common import Job, Request, find_key, no_permission

__all__ = ["list_aliases", "list_key_versions", "list_keys"]

T = TypeVar("T")


def list_keys(request: Request) -> Job:
    """List a page of the keys, in the keyring's order."""
    _may_list(request)
    keys = request.agent.visible_keys(request.caller.granted).keys
    number, size, page = _page(request, keys)
    entries = tuple(
        operations.KeyListEntry(key.key_id, request.agent.settings.arn(f"key/{key.key_id}")) for key in page
    )
    return Job(lambda: operations.ListKeysResult(operations.KeyList(entries), len(keys), number, size))


def list_key_versions(request: Request) -> Job:
    """List a page of the versions of one key."""
    key = find_key(request, KEY_ID)
    versions = tuple(key.versions.values())
    number, size, page = _page(request, versions)
    entries = tuple(operations.KeyVersionListEntry(key.key_id, version.version_id, version.created) for version in page)
    return Job(
        lambda: operations.ListKeyVersionsResult(operations.KeyVersionList(entries), len(versions), number, size)
    )


def list_aliases(request: Request) -> Job:
    """List a page of the aliases, in the order of their keys."""
    _may_list(request)
    aliases = request.agent.visible_keys(request.caller.granted).aliases
    number, size, page = _page(request, aliases)
    entries = tuple(
        operations.AliasListEntry(key.key_id, alias, request.agent.settings.arn(alias)) for alias, key in page
    )
    return Job(lambda: operations.ListAliasesResult(operations.AliasList(entries), len(aliases), number, size))


def _may_list(request: Request) -> None:
    grants = request.caller.granted.with_action(request.operation.action)
    if not grants:
        raise no_permission()
    request.grant = grants[0]


def _page(request: Request, entries: Sequence[T]) -> tuple[int, int, Sequence[T]]:
    number, size = request.values.get(PAGE_NUMBER) or 1, request.values.get(PAGE_SIZE) or PAGE
    return number, size, entries[(number - 1) * size : number * size]
