"""Model loading: checkpoint, supported features, prepacked weights and the self-test."""
