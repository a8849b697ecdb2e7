"""Replicas of both model tiers: discovery, one stream to each, health, routing."""
