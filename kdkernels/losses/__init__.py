"""The public losses, one file per family."""
