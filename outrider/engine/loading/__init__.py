"""Loading a model: checkpoint, supported features, prepacked weights, self-test."""
