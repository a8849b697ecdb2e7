"""The target tier: verifies draft tokens of all orchestrators in packed forward passes."""
