#!/bin/sh
# Starts Valkey as the primary or as a replica: as two Sentinels say. They know before it first starts (from their own
# configuration) and after every failover, so that a primary that comes back too late joins as a replica.
set -eu
umask 077
SELF="$POD_NAME.$STATE_SERVICE"

said_by() {
    timeout 2 "$CLI" -h "$1" -p "$SENTINEL_PORT" SENTINEL GET-MASTER-ADDR-BY-NAME easel 2>/dev/null | head -n 1
}

primary() {
    for sentinel in $SENTINELS; do said_by "$sentinel"; done | sort | uniq -c | awk '$1 >= 2 && NF == 2 {print $2}'
}

# Every other one answers, and has nothing: silence is no proof.
others_are_empty() {
    for peer in $PEERS; do
        [ "$peer" = "$SELF" ] && continue
        said=$(REDISCLI_AUTH="$SENTINEL_PASSWORD" timeout 5 "$CLI" -h "$peer" -p "$PORT" --user sentinel INFO keyspace 2>&1)
        case "$said" in *keys=*) return 1 ;; "# Keyspace"*) ;; *) return 1 ;; esac
    done
}

while true; do
    PRIMARY=$(primary)
    if [ "$PRIMARY" = "$SELF" ] && [ -z "$(ls "$DATA")" ] && ! others_are_empty; then
        # Replicas copy their primary: an empty one would empty them. Away, it is replaced by one of them.
        echo "this primary has no data: waiting to be replaced, or until the others answer that they have none"
    elif [ -n "$PRIMARY" ]; then
        break
    else
        echo "waiting until two Sentinels name the primary"
    fi
    sleep 2
done

cat > "$RUN/users.acl" <<USERS
user default off
user easel on >$PASSWORD ~{easel} ~{easel}:* resetchannels &{easel}:bell:* -@all +ping +select +role +time +evalsha +script|load +subscribe +unsubscribe +publish +get +set +del +exists +strlen +incr +decrby +pexpire +pexpireat +hget +hmget +hgetall +hset +hdel +hlen +hkeys +hvals +hexists +hincrby +zadd +zrem +zcard +zcount +zscore +zrange +zrangebyscore +zrangebylex +zrevrangebyscore +zrevrangebylex +zlexcount +sadd +srem +scard +smembers +srandmember +xadd +xrange
user replication on >$REPLICATION_PASSWORD resetchannels -@all +psync +replconf +ping
user sentinel on >$SENTINEL_PASSWORD allchannels -@all +multi +slaveof +ping +exec +subscribe +config|rewrite +role +publish +info +client|setname +client|kill +script|kill
USERS
{
    cat "$CONFIG/valkey.conf"
    echo "port $PORT"
    echo "dir $DATA"
    echo "aclfile $RUN/users.acl"
    echo "masteruser replication"
    echo "masterauth $REPLICATION_PASSWORD"
    echo "replica-announce-ip $SELF"
    if [ "$PRIMARY" != "$SELF" ]; then echo "replicaof $PRIMARY $PORT"; fi
} > "$RUN/valkey.conf"
echo "starting: the primary is $PRIMARY"
exec "$SERVER" "$RUN/valkey.conf"
