"""The public losses, a file a family."""
