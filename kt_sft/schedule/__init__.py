"""Expert work that runs beside the model: an ordered queue, and experts that are deferred to the next layer."""
