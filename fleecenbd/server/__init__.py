"""The asyncio shell: connections, exports, listeners."""
