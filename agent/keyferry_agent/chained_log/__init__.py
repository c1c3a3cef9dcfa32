"""Hash-chained logs, in which each line contains the hash of the line before. Writes, reads and verifies them."""
