"""KV cache: pages, the prefix cache, sequences that own pages, and the tensors behind them."""
