"""Control while guests run: HTTP with JSON on a Unix socket. Nothing here is imported by a server
before the first client of that socket comes."""
