"""keyferry-agent: holds master keys in locked memory and serves MessagePack-RPC on a Unix domain socket."""

from keyferry import __version__

__all__ = ["__version__"]
