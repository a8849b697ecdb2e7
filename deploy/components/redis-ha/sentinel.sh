#!/bin/sh
# One of three sentinels; two must agree that the primary is down. A sentinel writes its state into
# its own configuration, which a restart discards.
set -eu
. /scripts/primary.sh
umask 077
{
  echo "port ${SENTINEL_PORT:-26379}"
  echo "tls-port ${SENTINEL_TLS_PORT:-0}"
  echo "dir /tmp"
  echo "protected-mode no"
  echo "sentinel resolve-hostnames yes"
  echo "sentinel announce-hostnames yes"
  echo "sentinel announce-ip $me"
  echo "sentinel monitor outrider $primary 6379 2"
  # Longer than a primary on a busy machine may be unresponsive; generations continue meanwhile.
  echo "sentinel down-after-milliseconds outrider 5000"
  echo "sentinel failover-timeout outrider 30000"
  echo "sentinel parallel-syncs outrider 1"
  if [ -s /replication/sentinel.conf ]; then
    cat /replication/sentinel.conf
  fi
  if [ -s /tls/tls.crt ]; then
    echo "tls-cert-file /tls/tls.crt"
    echo "tls-key-file /tls/tls.key"
    echo "tls-ca-cert-file /tls/ca.crt"
    echo "tls-auth-clients no"
    echo "tls-replication yes"
  fi
} > /tmp/sentinel.conf
# A sentinel does not start until the primary's name resolves.
until getent hosts "$primary" > /dev/null; do sleep 1; done
exec valkey-sentinel /tmp/sentinel.conf
