"""What fleecing means (docs/semantics.md): no sockets, no files, no wire."""
