"""The engine behind nbdkit: what plugins/fleece.py, which nbdkit loads, calls."""
