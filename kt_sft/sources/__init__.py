"""Where experts come from: one protocol over every kind of file, and over tensors."""
