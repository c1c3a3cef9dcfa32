"""A real agent for the tests of an application, with faults on demand (needs the package keyferry-agent).

    from keyferry.testing import LocalAgent

    with LocalAgent("alias/orders") as agent, agent.client() as kms:
        agent.fail("Rejected.Throttling", operation="Decrypt", times=2)

The agent is the production agent, started with `--dev`: its cryptography, its checks and its answers are real. Only the faults
are simulated, by a relay in front of the agent that answers in its place. The agent and the relay run in their own processes,
and end with the process that started them, even if it is killed. No thread is started in the test's process.
"""

from .agent import LocalAgent

__all__ = ["LocalAgent"]
