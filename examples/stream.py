"""Stream a generation with the Python client; brackets mark the tokens that the draft proposed."""

import sys

from outrider.client import Client

with Client(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051") as client:
    stream = client.generate("def fibonacci(n):", temperature=0, max_tokens=60)
    for chunk in stream:
        for text, origin in chunk.pieces():
            print(f"[{text}]" if origin == "accepted" else text, end="", flush=True)
    result = stream.result()
    print(f"\n\n{result.finish_reason}: {result.usage.completion_tokens} tokens")
    print(f"acceptance rate: {result.speculation.acceptance_rate or 0:.2f}")
