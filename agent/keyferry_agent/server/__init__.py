"""Serves connections: sockets, admission, batches of requests, threads for offloaded jobs."""
