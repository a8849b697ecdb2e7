"""Distillation: makes a draft predict its target better, from the target's own behaviour.

Reading order: losses, rows, optimise, checkpoint, generate, acceptance, models, run.
"""
