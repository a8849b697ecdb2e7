"""Recorded traffic: sampled generations with the target's most likely tokens, for distillation."""
