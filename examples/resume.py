"""Leave a generation after ten tokens, then resume it: no token is lost or repeated.

Any orchestrator with the same Redis can resume it. The client does this by itself when a stream
breaks; here it is done by hand.
"""

import secrets
import sys

from outrider.client import Client

with Client(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051") as client:
    whole = client.generate("import re", temperature=0, max_tokens=40).result()
    session_id, received = f"example-{secrets.token_hex(4)}", []
    for chunk in client.generate("import re", session_id=session_id, temperature=0, max_tokens=40):
        received += chunk.token_ids
        if len(received) >= 10:
            break  # like a lost connection
    print(f"interrupted after {len(received)} tokens")
    received += client.resume(session_id, len(received)).result().token_ids
    print(f"equal to the uninterrupted output: {received == whole.token_ids}")
    client.delete_session(session_id)
