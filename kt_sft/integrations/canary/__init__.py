"""Does what is meant to train really train."""
