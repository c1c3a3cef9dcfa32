"""A whole agent in this process, in simulated time, under faults that a seed chooses: docs/simulation.md.

Imports point one way: fixtures, requests, oracle, faults, record; world; clients, connection_trace, threads;
fake_syscalls, patches; operator_actions, checks; simulate.
"""
