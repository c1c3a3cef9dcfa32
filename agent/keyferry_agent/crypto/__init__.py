"""Cryptography of the agent: buffers in, bytes out, without any code for aliases, operations, sockets or policy."""
