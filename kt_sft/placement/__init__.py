"""Which module goes to which device, and in which format experts are held there, by rules from a file."""
