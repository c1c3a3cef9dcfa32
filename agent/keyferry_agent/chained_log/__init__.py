"""Logs whose lines hold the hash of the line before: written, read, verified."""
