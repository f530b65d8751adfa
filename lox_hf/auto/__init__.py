"""The measures that choosing needs, and the whole way by one command."""
