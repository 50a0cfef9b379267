"""Which expert lies where."""
