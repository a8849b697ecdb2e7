"""An answer that is valid JSON of a schema, whatever the model: other tokens are masked."""

import json
import sys

from outrider.client import Client

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},  # compact: a small model would add much of it
}

with Client(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051") as client:
    messages = [{"role": "user", "content": "Invent a person."}]
    answer = client.chat(messages, structured_outputs={"json": SCHEMA}, max_tokens=200).result()
    print(answer.text)
    print(f"ended by {answer.finish_reason}")
    if answer.finish_reason == "stop":
        print(f"fields: {', '.join(json.loads(answer.text))}")
