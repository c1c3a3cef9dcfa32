"""The gateway: the cloud's RPC-style API over HTTP/1.1, so that the official SDKs call the agent by another endpoint.

It adds authentication by access keys and translation, and leaves what an operation does to `handlers`.
"""
