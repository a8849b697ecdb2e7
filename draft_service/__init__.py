"""The draft tier: proposes draft tokens for the sessions of all orchestrators, ahead of need."""
