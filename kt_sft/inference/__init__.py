"""What answers requests, apart from the protocols of a server."""
