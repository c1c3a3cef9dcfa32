"""keyferry-agent: holds master keys in locked memory and serves MessagePack-RPC on a Unix domain socket."""

__all__ = ["__version__"]

__version__ = "0.2.0.dev0"
"""Equal to the client library's version. Not imported from there, since a starting agent imports this package twice."""
