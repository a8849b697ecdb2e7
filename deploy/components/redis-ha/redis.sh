#!/bin/sh
# Starts this node as the primary or as its replica. A former primary that restarts before the
# sentinels elected another one stays the primary.
set -eu
. /scripts/primary.sh
set -- /etc/outrider/redis.conf --replica-announce-ip "$me"
if [ "$primary" != "$me" ]; then
  set -- "$@" --replicaof "$primary" 6379
fi
exec valkey-server "$@"
