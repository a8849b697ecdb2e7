"""An agent without a framework: in a session, the model chooses tools until it has an answer.

Structured output makes every choice a valid call. A small model chooses badly, but never invalidly.
"""

import json
import secrets
import sys

from outrider.client import Client, RequestFields

TOOLS = {"add": lambda a, b: a + b, "multiply": lambda a, b: a * b}
NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
CALL = {
    "type": "object",
    "properties": {"tool": {"enum": [*TOOLS, "answer"]}, "a": NUMBER, "b": NUMBER},
    "required": ["tool", "a", "b"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}

with Client(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051") as client:
    session_id = f"agent-{secrets.token_hex(4)}"
    fields: RequestFields = {
        "session_id": session_id,
        "structured_outputs": {"json": CALL},
        "max_tokens": 100,
    }
    said = "What is 6 * 7? Call a tool as JSON.\n"
    for _ in range(3):
        call = json.loads(client.generate(said, **fields).result().text)
        if call["tool"] == "answer":
            break
        said = f"\nresult: {TOOLS[call['tool']](call['a'], call['b'])}\n"
        print(f"{call['tool']}({call['a']}, {call['b']}){said}", end="")
    print(f"last call: {call}")
    client.delete_session(session_id)
