"""What tests share: real agents, keys, and what they need of the machine."""
