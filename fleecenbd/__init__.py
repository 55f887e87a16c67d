"""fleecenbd: an asyncio NBD server that serves live disks and point-in-time images of them."""

__version__ = "0.1.0"
