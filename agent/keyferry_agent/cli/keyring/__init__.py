"""`keyferry-agent keyring`: its parsers, its output and its verbs."""
