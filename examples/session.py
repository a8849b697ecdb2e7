"""A conversation of two turns: the second one re-uses the KV cache of the first."""

import secrets
import sys

from outrider.client import Client

with Client(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051") as client:
    session_id = f"example-{secrets.token_hex(4)}"
    for text in ("import os\n\nclass Stack:", "\n    def push(self, item):"):
        turn = client.generate(text, session_id=session_id, temperature=0, max_tokens=30).result()
        print(text + turn.text)
        usage = turn.usage
        print(f"-- prompt {usage.prompt_tokens} tokens, {usage.cached_tokens} of them cached\n")
    print(f"turns: {client.get_session(session_id).num_turns}")
    client.delete_session(session_id)
