#!/bin/sh
# Starts a Sentinel. It writes what it learns into its configuration, which is on a volume; only the password is ours to
# change there. The first primary is number 0. An election that fails is held again after twice the failover timeout, which
# is to be within state.outage_patience_s (30 s) of Easel.
set -eu
umask 077
FILE="$DATA/sentinel.conf"

if [ ! -s "$FILE" ]; then
    # A Sentinel does not start before it can resolve the name.
    until getent ahosts "$FIRST_PRIMARY" > /dev/null; do
        echo "waiting until $FIRST_PRIMARY has an address"
        sleep 1
    done
    cat > "$FILE" <<SETTINGS
port $SENTINEL_PORT
dir $DATA
protected-mode no
sentinel resolve-hostnames yes
sentinel announce-hostnames yes
sentinel announce-ip $POD_NAME.$SENTINEL_SERVICE
sentinel monitor easel $FIRST_PRIMARY $PORT 2
sentinel down-after-milliseconds easel 3000
sentinel failover-timeout easel 6000
sentinel parallel-syncs easel 1
SETTINGS
fi
grep -v '^sentinel auth-' "$FILE" > "$FILE.new"
echo "sentinel auth-user easel sentinel" >> "$FILE.new"
echo "sentinel auth-pass easel $SENTINEL_PASSWORD" >> "$FILE.new"
mv "$FILE.new" "$FILE"
exec "$SERVER" "$FILE" --sentinel
