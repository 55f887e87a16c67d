"""What lasts: the state directory, the description in it, and how a server finds it again."""
