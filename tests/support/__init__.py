"""Support shared by tests: real agents, keys, and requirements of the machine."""
