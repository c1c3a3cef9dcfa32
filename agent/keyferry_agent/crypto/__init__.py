"""Cryptography of the agent: buffers in, bytes out. Knows neither keys' names, nor operations, nor sockets, nor policy."""
