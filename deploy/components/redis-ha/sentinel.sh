#!/bin/sh
# Watches the nodes with two others; two of three agree that the primary is gone. What a sentinel
# learns it writes into its own configuration, which a restart forgets and learns again.
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
  # Longer than a primary on a busy machine is silent; sessions go on meanwhile.
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
# Until the primary's name resolves a sentinel does not start.
until getent hosts "$primary" > /dev/null; do sleep 1; done
exec valkey-sentinel /tmp/sentinel.conf
