"""Mutation testing of the security core: `make mutants`. docs/mutants.md explains it, and lists the survivors."""
