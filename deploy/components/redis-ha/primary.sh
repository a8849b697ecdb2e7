# Sets `me`, this pod's name, and `primary`: the primary according to a sentinel, or the first node
# if no sentinel answers. To be sourced.
domain="outrider-redis-nodes.${POD_NAMESPACE}.svc.cluster.local"
me="${POD_NAME}.${domain}"
primary=""
# The sentinels' password, if the Secret has one.
password=$(sed -n 's/^requirepass //p' /replication/sentinel.conf 2>/dev/null || true)
for number in 0 1 2; do
  # shellcheck disable=SC2086  # flags are words
  reply=$(REDISCLI_AUTH="$password" VALKEYCLI_AUTH="$password" timeout 2 \
    valkey-cli ${CLI_FLAGS:-} -h "outrider-redis-${number}.${domain}" -p 26379 \
    sentinel get-master-addr-by-name outrider 2>/dev/null | head -n 1 || true)
  case "$reply" in
    *".${domain}") primary="$reply"; break ;;
  esac
done
primary="${primary:-outrider-redis-0.${domain}}"
