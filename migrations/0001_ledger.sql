-- What Holdfast keeps in Postgres: how far each partition has been carried, what is in stock, which coupons were issued, and
-- every change that led there. Written by the relay, in one transaction a batch; read by people, by reports, and by Holdfast when
-- Redis has lost its memory.
--
-- Ids compare byte by byte (COLLATE "C"): their order means nothing to people, and indexes on them are several times cheaper so.

CREATE SCHEMA IF NOT EXISTS holdfast;

CREATE TABLE holdfast.partition (
    id            int    PRIMARY KEY CHECK (id >= 0),
    epoch         bigint NOT NULL CHECK (epoch >= 0),
    applied_epoch bigint NOT NULL CHECK (applied_epoch >= 0 AND applied_epoch <= epoch),
    applied_n     bigint NOT NULL CHECK (applied_n >= 0),
    last_op       text   NOT NULL
) WITH (fillfactor = 20);
COMMENT ON TABLE holdfast.partition IS 'One row a partition: who may write (epoch) and up to where the outbox has been applied (applied_epoch, applied_n, and the op of the batch there). The relay locks the row for each transaction. Never edit it by hand.';
COMMENT ON COLUMN holdfast.partition.last_op IS 'The batch that was applied last; the next one names it as its predecessor, else it belongs to another history and is refused. - before the first.';

CREATE TABLE holdfast.partition_epoch (
    partition  int         NOT NULL REFERENCES holdfast.partition (id),
    epoch      bigint      NOT NULL,
    run_id     text        NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    last_n     bigint      NULL,
    PRIMARY KEY (partition, epoch)
);
COMMENT ON TABLE holdfast.partition_epoch IS 'Every epoch of a partition: the Redis process (run_id) it was taken for, and where it ended.';
COMMENT ON COLUMN holdfast.partition_epoch.last_n IS 'n of the last change that was applied under this epoch; null while it goes on. A change of this epoch beyond it never reached Postgres.';

CREATE TABLE holdfast.stock (
    product_id text COLLATE "C" PRIMARY KEY,
    available  bigint NOT NULL CHECK (available BETWEEN 0 AND 9007199254740991),
    held       bigint NOT NULL DEFAULT 0 CHECK (held >= 0),
    low        bigint NULL CHECK (low >= 0),
    frozen     text   NULL,
    deleted_at timestamptz NULL
) WITH (fillfactor = 60);
COMMENT ON TABLE holdfast.stock IS 'Products and their units, as far as the outbox has been applied. Redis is ahead of it by what holdfast.partition says is not applied yet.';
COMMENT ON COLUMN holdfast.stock.available IS 'Units that may be sold.';
COMMENT ON COLUMN holdfast.stock.held IS 'Units that orders hold.';
COMMENT ON COLUMN holdfast.stock.low IS 'Threshold of the low-stock event.';
COMMENT ON COLUMN holdfast.stock.frozen IS 'Why a person has to look at this product before it sells again.';

CREATE TABLE holdfast.stock_ledger (
    partition       int    NOT NULL,
    epoch           bigint NOT NULL,
    n               bigint NOT NULL,
    i               int    NOT NULL,
    op              text COLLATE "C" NOT NULL,
    k               int    NOT NULL,
    product_id      text COLLATE "C" NOT NULL,
    kind            text   NOT NULL,
    redis_delta     bigint NOT NULL,
    pg_delta        bigint NOT NULL,
    held_delta      bigint NOT NULL DEFAULT 0,
    available_after bigint NOT NULL,
    request_id      text COLLATE "C" NULL,
    request_digest  text   NULL,
    at              timestamptz NOT NULL,
    PRIMARY KEY (partition, epoch, n, i),
    UNIQUE (op, k, i)
);
CREATE INDEX stock_ledger_product ON holdfast.stock_ledger (product_id, epoch, n);
COMMENT ON TABLE holdfast.stock_ledger IS 'Every change of stock, once, in the order in which it took effect: (epoch, n) is the position that the caller was answered. Rows are only ever added.';
COMMENT ON COLUMN holdfast.stock_ledger.i IS 'Which product line of the operation, from 0.';
COMMENT ON COLUMN holdfast.stock_ledger.op IS '<instance>:<lane>:<counter> of the batch that carried the change; k is its place in that batch.';
COMMENT ON COLUMN holdfast.stock_ledger.redis_delta IS 'By how much the available units moved in Redis.';
COMMENT ON COLUMN holdfast.stock_ledger.pg_delta IS 'By how much holdfast.stock.available moved: 0 where Postgres had the change already.';
COMMENT ON COLUMN holdfast.stock_ledger.available_after IS 'Available units in Redis right after the change.';
COMMENT ON COLUMN holdfast.stock_ledger.at IS 'When, by Redis''s clock.';

CREATE TABLE holdfast.coupon (
    coupon_id   text COLLATE "C" PRIMARY KEY,
    total       bigint NOT NULL CHECK (total >= 0),
    issued      bigint NOT NULL DEFAULT 0 CHECK (issued >= 0),
    used        bigint NOT NULL DEFAULT 0 CHECK (used >= 0 AND used <= issued),
    per_user    bigint NOT NULL CHECK (per_user > 0),
    start_ms    bigint NULL,
    end_ms      bigint NULL,
    last_serial bigint NOT NULL DEFAULT 0 CHECK (last_serial >= issued),
    state       text   NOT NULL DEFAULT 'active',
    CHECK (issued <= total)
) WITH (fillfactor = 60);
COMMENT ON TABLE holdfast.coupon IS 'Coupons and their terms. start_ms and end_ms are Unix milliseconds; null is no bound.';
COMMENT ON COLUMN holdfast.coupon.last_serial IS 'The highest serial ever issued; serials are never used again.';

CREATE TABLE holdfast.coupon_issue (
    coupon_id text COLLATE "C" NOT NULL,
    serial    bigint NOT NULL CHECK (serial > 0),
    user_id   text COLLATE "C" NOT NULL,
    state     text   NOT NULL,
    issued_at timestamptz NOT NULL,
    PRIMARY KEY (coupon_id, serial)
);
CREATE INDEX coupon_issue_user ON holdfast.coupon_issue (coupon_id, user_id);
COMMENT ON TABLE holdfast.coupon_issue IS 'Every coupon that was issued, and to whom.';

CREATE TABLE holdfast.coupon_ledger (
    partition       int    NOT NULL,
    epoch           bigint NOT NULL,
    n               bigint NOT NULL,
    op              text COLLATE "C" NOT NULL,
    k               int    NOT NULL,
    coupon_id       text COLLATE "C" NOT NULL,
    kind            text   NOT NULL,
    user_id         text COLLATE "C" NULL,
    serial          bigint NULL,
    remaining_after bigint NOT NULL,
    request_id      text COLLATE "C" NULL,
    request_digest  text   NULL,
    at              timestamptz NOT NULL,
    PRIMARY KEY (partition, epoch, n),
    UNIQUE (op, k)
);
CREATE INDEX coupon_ledger_coupon ON holdfast.coupon_ledger (coupon_id, epoch, n);
COMMENT ON TABLE holdfast.coupon_ledger IS 'Every change of a coupon, once, in the order in which it took effect. Rows are only ever added.';
COMMENT ON COLUMN holdfast.coupon_ledger.remaining_after IS 'How many were left in Redis right after the change.';
