"""A soak: clients of every kind ask one agent for everything, for as long as one likes, while its operator does what operators
do and things go wrong. Afterwards every ciphertext is opened, every answer looked for in the record, and what should be flat is
compared. `make soak MINUTES=60`; docs/soak.md has the results.
"""
