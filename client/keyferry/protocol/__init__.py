"""MessagePack-RPC without I/O, for both clients and the agent."""
