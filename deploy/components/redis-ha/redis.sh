#!/bin/sh
# Starts this node as the primary, or as one that follows it. A former primary that comes back before
# the sentinels have chosen another finds itself named, and goes on.
set -eu
. /scripts/primary.sh
set -- /etc/outrider/redis.conf --replica-announce-ip "$me"
if [ "$primary" != "$me" ]; then
  set -- "$@" --replicaof "$primary" 6379
fi
exec valkey-server "$@"
