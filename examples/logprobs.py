"""Log-probabilities: of each generated token, of its rivals, and of the prompt's tokens."""

import math
import sys

from outrider.client import Client

with Client(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051") as client:
    result = client.generate("import os", temperature=0, max_tokens=8, logprobs=3).result()
    for token_id, entry in zip(result.token_ids, result.logprobs, strict=True):
        rivals = ", ".join(
            f"{rival} {math.exp(logprob):.1%}"
            for rival, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
        )
        print(f"token {token_id}: {math.exp(entry.logprob):.1%}   most likely: {rivals}")
    mean = sum(entry.logprob for entry in result.logprobs) / len(result.logprobs)
    print(f"perplexity of the output: {math.exp(-mean):.2f}")
