"""Prints the Secret `outrider-redis`: new passwords, and the users that Redis knows by them.

Owns what each user of Redis may do: the services their keys, the nodes to follow each other, the
sentinels to look and to appoint, probes nothing. Keeps nothing: what is printed is all there is.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import sys

# The registry's and the sessions' keys. Scripts are checked by what they call.
SERVICES = (
    "resetchannels ~outrider:* -@all +@read +@write +@scripting +@connection +time -@dangerous"
)
REPLICA = "+psync +replconf +ping"
SENTINEL = (
    "allchannels +multi +slaveof +replicaof +ping +exec +subscribe +config|rewrite +role "
    "+publish +info +client|setname +client|kill +script|kill"
)
# Asked by the proxy, without a password: who is the primary.
PROBE = "nopass +ping +info +quit"


def files() -> dict[str, str]:
    """Of the Secret, by key."""
    outrider, replica, sentinel, sentinels = (secrets.token_urlsafe(32) for _ in range(4))
    users = (
        "user default off",
        f"user outrider on {_digest(outrider)} {SERVICES}",
        f"user replica on {_digest(replica)} {REPLICA}",
        f"user sentinel on {_digest(sentinel)} {SENTINEL}",
        f"user probe on {PROBE}",
    )
    return {
        "password": outrider,
        "users.acl": "".join(f"{user}\n" for user in users),
        "replication.conf": f"masteruser replica\nmasterauth {replica}\n",
        # How they log in at the nodes; and what they ask of each other, and of anybody.
        "sentinel.conf": (
            f"sentinel auth-user outrider sentinel\nsentinel auth-pass outrider {sentinel}\n"
            f"requirepass {sentinels}\n"
        ),
    }


def _digest(password: str) -> str:
    return f"#{hashlib.sha256(password.encode()).hexdigest()}"


def secret() -> str:
    """The object, as `kubectl apply -f -` takes it."""
    data = {name: base64.b64encode(text.encode()).decode() for name, text in files().items()}
    metadata = {"name": "outrider-redis", "labels": {"app.kubernetes.io/part-of": "outrider"}}
    made = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data}
    return json.dumps(made, indent=1)


if __name__ == "__main__":
    if sys.stdout.isatty():
        sys.exit("it prints passwords: | kubectl -n outrider apply -f -")
    print(secret())
