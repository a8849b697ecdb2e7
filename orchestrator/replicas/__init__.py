"""Replicas of both model tiers: one stream to each, health, routing, and the draft source."""
