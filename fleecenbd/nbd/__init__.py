"""The NBD protocol, sans-IO: bytes in, bytes and events out."""
