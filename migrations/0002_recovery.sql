-- What recovery and reconciliation need: who rebuilds a partition, what was changed here by other programs, what could not be applied,
-- what was handed over by sidecars that lost their Redis, and which differences were found.

ALTER TABLE holdfast.partition
    ADD COLUMN owner       text        NULL,
    ADD COLUMN lease_until timestamptz NULL,
    ADD COLUMN inbox_xid   bigint      NOT NULL DEFAULT 0,
    ADD COLUMN inbox_id    bigint      NOT NULL DEFAULT 0;
COMMENT ON COLUMN holdfast.partition.owner IS 'The sidecar that fills Redis from here, while lease_until lies ahead.';
COMMENT ON COLUMN holdfast.partition.inbox_xid IS 'With inbox_id: up to which row of holdfast.inbox Redis has what other programs changed here, as far as the outbox has been applied.';

ALTER TABLE holdfast.stock_ledger ADD COLUMN origin_epoch bigint NULL, ADD COLUMN origin_n bigint NULL;
ALTER TABLE holdfast.coupon_ledger ADD COLUMN origin_epoch bigint NULL, ADD COLUMN origin_n bigint NULL;
ALTER TABLE holdfast.partition_epoch ADD COLUMN after_n bigint NULL;
COMMENT ON COLUMN holdfast.partition_epoch.after_n IS 'n of the last change before this epoch, where that was known when it was taken: what an earlier epoch has beyond it got lost, and is not applied later.';
CREATE INDEX stock_ledger_origin ON holdfast.stock_ledger (partition, origin_epoch, origin_n) WHERE origin_epoch IS NOT NULL;
CREATE INDEX coupon_ledger_origin ON holdfast.coupon_ledger (partition, origin_epoch, origin_n) WHERE origin_epoch IS NOT NULL;
CREATE INDEX stock_ledger_server_request ON holdfast.stock_ledger (request_id) WHERE request_id LIKE 'hf-%';
CREATE INDEX coupon_ledger_server_request ON holdfast.coupon_ledger (request_id) WHERE request_id LIKE 'hf-%';
CREATE INDEX stock_ledger_request ON holdfast.stock_ledger (at) WHERE request_id IS NOT NULL;
CREATE INDEX coupon_ledger_request ON holdfast.coupon_ledger (at) WHERE request_id IS NOT NULL;
COMMENT ON COLUMN holdfast.stock_ledger.origin_epoch IS 'With origin_n: the position that the caller was answered, where the change was saved out of a Redis that lost its data and has a new place here.';

CREATE TABLE holdfast.inbox (
    xid        xid8   NOT NULL DEFAULT pg_current_xact_id(),
    id         bigint NOT NULL GENERATED ALWAYS AS IDENTITY,
    product_id text COLLATE "C" NOT NULL,
    kind       text   NOT NULL CHECK (kind IN ('move', 'create', 'delete')),
    delta      bigint NOT NULL,
    at         timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (xid, id)
);
CREATE INDEX inbox_product ON holdfast.inbox (product_id, xid, id);
COMMENT ON TABLE holdfast.inbox IS 'What programs other than Holdfast changed in holdfast.stock, on its way to Redis. Written by a trigger, in the transaction of that change; taken in the order of (xid, id), up to the oldest transaction that is still running, so that none is passed over.';

CREATE TABLE holdfast.dead_letter (
    id         bigint NOT NULL PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    partition  int    NOT NULL,
    epoch      bigint NOT NULL,
    n          bigint NOT NULL,
    i          int    NOT NULL,
    op         text COLLATE "C" NOT NULL,
    k          int    NOT NULL,
    product_id text COLLATE "C" NULL,
    kind       text   NOT NULL,
    delta      bigint NOT NULL,
    in_redis   boolean NOT NULL,
    reason     text   NOT NULL,
    line       text   NOT NULL,
    at         timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX dead_letter_product ON holdfast.dead_letter (product_id);
COMMENT ON TABLE holdfast.dead_letter IS 'Changes that Redis made and that this database could not take: their rows are in the ledger, their units are owed. HOLDFAST.DEADLETTER lists, retries and drops them.';
COMMENT ON COLUMN holdfast.dead_letter.delta IS 'By how much holdfast.stock.available should have moved and did not.';
COMMENT ON COLUMN holdfast.dead_letter.in_redis IS 'Whether the units in Redis have moved by delta. False for what was sold before Redis lost its data and could not be taken off again.';
COMMENT ON COLUMN holdfast.dead_letter.line IS 'The change as the outbox had it.';

CREATE TABLE holdfast.salvage (
    partition    int    NOT NULL,
    op           text COLLATE "C" NOT NULL,
    k            int    NOT NULL,
    origin_epoch bigint NOT NULL,
    origin_n     bigint NOT NULL,
    line         text   NOT NULL,
    at_ms        bigint NOT NULL,
    done         boolean NOT NULL DEFAULT false,
    PRIMARY KEY (op, k)
);
CREATE INDEX salvage_open ON holdfast.salvage (partition, origin_epoch, origin_n) WHERE NOT done;
COMMENT ON TABLE holdfast.salvage IS 'Changes that a sidecar had answered and handed over after Redis had been filled anew without them. They are taken off Redis as soon as possible (done).';

CREATE TABLE holdfast.sidecar (
    id          text NOT NULL PRIMARY KEY,
    started_at  timestamptz NOT NULL DEFAULT now(),
    lease_until timestamptz NOT NULL,
    window_ms   bigint NOT NULL,
    handed_epoch bigint NOT NULL DEFAULT 0
);
COMMENT ON TABLE holdfast.sidecar IS 'The sidecars that run; a lease that has passed belongs to one that is gone.';
COMMENT ON COLUMN holdfast.sidecar.handed_epoch IS 'Up to which epoch it has handed over what it had answered and this database did not have.';
COMMENT ON COLUMN holdfast.sidecar.window_ms IS 'Its idempotency.window_ms, which all that run at a time must have in common.';

CREATE TABLE holdfast.drift (
    id         bigint NOT NULL PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    at         timestamptz NOT NULL DEFAULT now(),
    partition  int    NOT NULL,
    epoch      bigint NOT NULL,
    n          bigint NOT NULL,
    product_id text COLLATE "C" NOT NULL,
    redis      bigint NULL,
    postgres   bigint NULL,
    in_flight  bigint NOT NULL,
    drift      bigint NOT NULL,
    action     text   NOT NULL CHECK (action IN ('none', 'corrected', 'frozen', 'initialised'))
);
CREATE INDEX drift_product ON holdfast.drift (product_id, at);
COMMENT ON TABLE holdfast.drift IS 'Differences between Redis and this database that could not be explained by what was on its way, and what was done about each.';
COMMENT ON COLUMN holdfast.drift.n IS 'With epoch: the position at which both were compared.';
COMMENT ON COLUMN holdfast.drift.postgres IS 'What Postgres says there should have been in Redis at that position; null for a product it does not have.';
COMMENT ON COLUMN holdfast.drift.in_flight IS 'The part of it that Redis had decided and Postgres had not been told yet, when it was asked.';

-- Puts a row into the inbox. The rows of one product stand there in the order of its changes: whoever changed it later may have begun
-- earlier, and then takes the place of the one before.
CREATE FUNCTION holdfast.to_inbox(text, text, bigint) RETURNS void LANGUAGE sql SET search_path = pg_catalog AS $$
    INSERT INTO holdfast.inbox (xid, product_id, kind, delta)
    SELECT greatest(pg_current_xact_id(), (SELECT i.xid FROM holdfast.inbox i WHERE i.product_id = $1 ORDER BY i.xid DESC LIMIT 1)), $1, $2, $3;
    SELECT pg_notify('holdfast_inbox', '');
$$;

-- Of what other programs changed of a product and Redis has not been told up to the mark (xid, id): by how much it will move what Redis has
-- now. What stands before its creation or its deletion moves nothing any more.
CREATE FUNCTION holdfast.inbox_ahead(text, bigint, bigint) RETURNS bigint LANGUAGE sql STABLE SET search_path = pg_catalog AS $$
    SELECT coalesce(sum(i.delta), 0)::bigint FROM holdfast.inbox i
    WHERE i.product_id = $1 AND i.kind = 'move' AND (i.xid, i.id) > ($2::text::xid8, $3)
    AND NOT EXISTS (SELECT 1 FROM holdfast.inbox o WHERE o.product_id = $1 AND o.kind <> 'move' AND (o.xid, o.id) > (i.xid, i.id));
$$;

-- Another program's change of a product, in that program's own transaction, whatever rights it has on the inbox. Holdfast says who it is
-- and is passed over.
CREATE FUNCTION holdfast.stock_changed() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    before bigint := 0;
    after bigint := 0;
    existed boolean := false;
    exists_now boolean := false;
BEGIN
    IF TG_OP <> 'INSERT' THEN
        existed := OLD.deleted_at IS NULL;
        before := CASE WHEN existed THEN OLD.available ELSE 0 END;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        exists_now := NEW.deleted_at IS NULL;
        after := CASE WHEN exists_now THEN NEW.available ELSE 0 END;
    END IF;
    IF TG_OP = 'UPDATE' AND NEW.product_id <> OLD.product_id THEN
        RAISE EXCEPTION 'holdfast.stock: a product keeps its id; delete it and insert another';
    END IF;
    IF TG_OP = 'INSERT' AND (octet_length(NEW.product_id) NOT BETWEEN 1 AND 128 OR NEW.product_id ~ '[[:space:][:cntrl:]{}]') THEN
        RAISE EXCEPTION 'holdfast.stock: a product id has 1 to 128 bytes without white space, control characters, { and }';
    END IF;
    IF existed AND NOT exists_now THEN
        PERFORM holdfast.to_inbox(OLD.product_id, 'delete', -before);
    ELSIF exists_now AND NOT existed THEN
        PERFORM holdfast.to_inbox(NEW.product_id, 'create', after);
    ELSIF after <> before THEN
        PERFORM holdfast.to_inbox(NEW.product_id, 'move', after - before);
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER stock_changed AFTER INSERT OR UPDATE OR DELETE ON holdfast.stock
    FOR EACH ROW WHEN (current_setting('holdfast.writer', true) IS DISTINCT FROM 'holdfast')
    EXECUTE FUNCTION holdfast.stock_changed();
