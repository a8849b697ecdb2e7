"""Prints the Secret `outrider-redis`: new passwords and the ACL of Redis' users.

Defines the rights of each user: the services use their keys, nodes replicate, sentinels monitor and
promote, probes ping. The passwords are not stored anywhere else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import sys

# Keys of registry and sessions. Redis checks each command that a script runs.
SERVICES = (
    "resetchannels ~outrider:* -@all +@read +@write +@scripting +@connection +time -@dangerous"
)
REPLICA = "+psync +replconf +ping"
SENTINEL = (
    "allchannels +multi +slaveof +replicaof +ping +exec +subscribe +config|rewrite +role "
    "+publish +info +client|setname +client|kill +script|kill"
)
# For the proxy, without a password: INFO shows which node is the primary.
PROBE = "nopass +ping +info +quit"


def files() -> dict[str, str]:
    """Contents of the Secret by key."""
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
        # Login at the nodes, and the password that sentinels require of each other and of clients.
        "sentinel.conf": (
            f"sentinel auth-user outrider sentinel\nsentinel auth-pass outrider {sentinel}\n"
            f"requirepass {sentinels}\n"
        ),
    }


def _digest(password: str) -> str:
    return f"#{hashlib.sha256(password.encode()).hexdigest()}"


def secret() -> str:
    """The Secret as JSON, for `kubectl apply -f -`."""
    data = {name: base64.b64encode(text.encode()).decode() for name, text in files().items()}
    metadata = {"name": "outrider-redis", "labels": {"app.kubernetes.io/part-of": "outrider"}}
    made = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data}
    return json.dumps(made, indent=1)


if __name__ == "__main__":
    if sys.stdout.isatty():
        sys.exit("output has passwords; pipe it: | kubectl -n outrider apply -f -")
    print(secret())
