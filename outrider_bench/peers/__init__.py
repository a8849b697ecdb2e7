"""Baselines of other projects: Hugging Face `generate`, plain and assisted."""
