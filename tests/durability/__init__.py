"""Real servers that are really killed, and started again."""
