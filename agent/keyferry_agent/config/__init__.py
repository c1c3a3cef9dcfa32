"""The configuration: strict reading of TOML into frozen settings."""
