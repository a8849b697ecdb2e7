"""From a step's logits to tokens: distributions, logits processors, Gumbel-max; batched."""
