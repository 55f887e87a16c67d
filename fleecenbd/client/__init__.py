"""The pulling side: from a fleecing export, or any other NBD export, to where a backup is kept."""
