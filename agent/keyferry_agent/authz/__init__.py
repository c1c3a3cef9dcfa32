"""Authorization: which grants a caller has, and the cache of decisions."""
