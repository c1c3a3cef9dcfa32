"""Connections: sockets, admission, batches of requests, threads for offloaded jobs."""
