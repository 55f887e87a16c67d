"""Block devices: one small interface, many kinds."""
