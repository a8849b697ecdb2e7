"""KV cache: pages, the prefix cache, and the sequences that own pages."""
