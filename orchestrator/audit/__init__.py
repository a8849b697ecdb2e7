"""Losslessness audit: checks a share of the generations in the background."""
