"""A soak: clients of every kind send one agent every operation for a given time, beside an operator's actions and accidents.

Afterwards every ciphertext is opened, every answer is compared with the audit log, and the figures that should be flat are
compared. `make soak MINUTES=60`; docs/soak.md has the results.
"""
