"""`keyferry-agent keyring`: its parsers, what it prints, and its verbs."""
