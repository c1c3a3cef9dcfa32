"""keyferry-agent: holds master keys in locked memory and serves MessagePack-RPC on a Unix domain socket."""

__all__ = ["__version__"]

__version__ = "0.2.0.dev0"
"""The same as the client library's, which is not imported for it: this package is, twice, when an agent starts."""
