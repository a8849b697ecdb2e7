"""Draft tier: proposes draft tokens for the generations of all orchestrators, ahead of time."""
