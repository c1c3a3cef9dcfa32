"""The command `keyferry-agent`: one module for each group of subcommands."""
