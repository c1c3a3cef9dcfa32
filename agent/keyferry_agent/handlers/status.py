"""The state of a key and of the agent: DescribeKey, GetAgentStatus, GetAgentHealth."""

from keyferry import __version__, operations
from keyferry.parameters import KEY_ID
from keyferry.protocol.wire import PROTOCOL_VERSION

from .. import health
from .common import Job, Request, find_key

__all__ = ["describe_key", "get_agent_health", "get_agent_status"]


def describe_key(request: Request) -> Job:
    """Return all metadata of a key, without its material."""
    key = find_key(request, KEY_ID)
    metadata = operations.KeyMetadata(
        key_id=key.key_id,
        arn=request.agent.settings.arn(f"key/{key.key_id}"),
        description=key.description,
        key_spec=key.key_spec,
        key_usage="ENCRYPT/DECRYPT",
        key_state=key.state(),
        origin=key.origin,
        protection_level="SOFTWARE",
        creator=request.agent.settings.account,
        creation_date=key.created,
        primary_key_version=key.primary.version_id,
        last_rotation_date=key.primary.created,
        automatic_rotation="Disabled",
        deletion_protection="Disabled",
        delete_date=key.delete_date,
        material_expire_time="",
    )
    return Job(lambda: operations.DescribeKeyResult(metadata))


def get_agent_status(request: Request) -> Job:
    """Return the status of the agent to any caller. A caller with a grant also receives the counters."""
    agent = request.agent
    counters = agent.counters if request.caller.granted.with_action(request.operation.action) else None
    status = operations.GetAgentStatusResult(
        version=__version__,
        protocol_version=PROTOCOL_VERSION,
        state=agent.state,
        started_at=agent.started_at,
        keys=len(agent.visible_keys(request.caller.granted).keys),
        keyring_loaded_at=agent.keyring.loaded_at,
        memory_protection=agent.memory_protection,
        counters=counters.snapshot() if counters else None,
        ready=health.is_ready(agent.state),
        keyring_source=agent.keyring.source,
        conditions=health.described(agent.conditions),
    )
    return Job(lambda: status)


def get_agent_health(request: Request) -> Job:
    """Return the health of the agent to any caller, without an audit entry: the answer contains no data of keys or callers."""
    state, conditions = request.agent.state, request.agent.conditions
    answer = operations.GetAgentHealthResult(state, health.is_ready(state), health.described(conditions))
    return Job(lambda: answer)
