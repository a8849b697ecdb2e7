"""Peers to compare with: Hugging Face `generate`, plain and assisted."""
