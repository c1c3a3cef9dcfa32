"""The life of the daemon: start, reload, the service manager, shutdown."""
