"""The verbs on an audit log: verify it, and list the callers that received data keys."""
