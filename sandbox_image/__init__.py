"""What runs inside a sandbox: the slot server, its boxes and its tools. Standard library and aiohttp only."""
