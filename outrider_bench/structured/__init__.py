"""Structured output under speculation: random schemas, and what a run with them must show."""
