"""Target tier: verifies the draft tokens of all orchestrators in packed forward passes."""
