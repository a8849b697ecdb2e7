#!/usr/bin/env bash
# Creates certificates for a trial of TLS: an authority and four certificates.
#
#   scripts/make_certs.sh FOLDER [HOST ...]
#
# FOLDER/ca.pem         the authority, for all programs and clients
# FOLDER/server.*       the orchestrator's server certificate: localhost and each HOST
# FOLDER/orchestrator.* the orchestrator's client certificate for the tiers (tls_client_names)
# FOLDER/tier.*         target and draft (tier_tls_name)
# FOLDER/redis.*        Redis: redis, localhost and each HOST
#
# A second run renews the certificates and keeps the authority. In production use an issuer that keeps
# the authority's key elsewhere: cert-manager (deploy/components/tls), Vault, step-ca.
set -euo pipefail
folder=${1:?usage: make_certs.sh FOLDER [HOST ...]}
shift
mkdir -p "$folder"
umask 077
cd "$folder"

new_key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1" 2>/dev/null; }

if [ ! -f ca.key ]; then
  new_key ca.key
  openssl req -x509 -new -key ca.key -days 3650 -subj "/CN=outrider" -out ca.pem \
    -addext "keyUsage=critical,keyCertSign,cRLSign" 2>/dev/null
fi

# issue NAME HOST...: writes to a temporary folder first, so that nobody reads a partial file.
issue() {
  local name=$1 made names="" host
  shift
  made=$(mktemp -d)
  for host in "$@"; do
    if [[ $host =~ ^[0-9.]+$ || $host == *:* ]]; then names+=",IP:$host"; else names+=",DNS:$host"; fi
  done
  printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\n' "${names#,}" > "$made/ext"
  new_key "$made/key"
  openssl req -new -key "$made/key" -subj "/CN=$name" -out "$made/csr" 2>/dev/null
  openssl x509 -req -in "$made/csr" -CA ca.pem -CAkey ca.key -CAcreateserial -days 90 \
    -extfile "$made/ext" -out "$made/pem" 2>/dev/null
  mv "$made/key" "$name.key"
  mv "$made/pem" "$name.pem"
  rm -r "$made"
}

issue server localhost 127.0.0.1 "$@"
issue orchestrator orchestrator
issue tier tier
issue redis redis localhost 127.0.0.1 "$@"
echo "certificates in $folder, valid for 90 days"
