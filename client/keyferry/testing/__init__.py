"""A real agent for the tests of an application, with faults on demand (needs the package keyferry-agent).

    from keyferry.testing import LocalAgent

    with LocalAgent("alias/orders") as agent, agent.client() as kms:
        agent.fail("Rejected.Throttling", operation="Decrypt", times=2)

The agent is the one of production, started with `--dev`: its cryptography, its checks and its answers are real. Only the faults
are not: a relay in front of the agent answers in its place. Agent and relay run in processes of their own, and end with the
process that started them, however it ends. The test's process gets no thread.
"""

from .agent import LocalAgent

__all__ = ["LocalAgent"]
