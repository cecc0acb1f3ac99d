-- Orders: what is held for whom, what became of it, and the ledger's columns that say so.

ALTER TABLE holdfast.stock_ledger ADD COLUMN order_id text COLLATE "C" NULL, ADD COLUMN expires_ms bigint NULL;
COMMENT ON COLUMN holdfast.stock_ledger.held_delta IS 'By how much the units moved that orders hold.';
COMMENT ON COLUMN holdfast.stock_ledger.order_id IS 'The order that the change is of. A cancellation of an order that was not there has no product: product_id is empty.';
COMMENT ON COLUMN holdfast.stock_ledger.expires_ms IS 'Until when the order''s units are held from here on, in Unix ms.';
CREATE INDEX stock_ledger_order ON holdfast.stock_ledger (order_id, epoch, n) WHERE order_id IS NOT NULL;

CREATE TABLE holdfast.stock_order (
    order_id      text COLLATE "C" NOT NULL,
    epoch         bigint NOT NULL,
    n             bigint NOT NULL,
    partition     int    NOT NULL,
    state         text   NOT NULL CHECK (state IN ('held', 'confirmed', 'cancelled', 'expired')),
    expires_ms    bigint NULL,
    products      text[] COLLATE "C" NOT NULL,
    units         bigint[] NOT NULL,
    changed_epoch bigint NOT NULL,
    changed_n     bigint NOT NULL,
    created_at    timestamptz NOT NULL,
    changed_at    timestamptz NOT NULL,
    PRIMARY KEY (order_id, epoch, n),
    CHECK (cardinality(products) = cardinality(units))
) WITH (fillfactor = 70);
CREATE INDEX stock_order_due ON holdfast.stock_order (expires_ms) WHERE state = 'held';
CREATE INDEX stock_order_changed ON holdfast.stock_order (changed_at);
COMMENT ON TABLE holdfast.stock_order IS 'Orders. An id that is used again much later has another row; its last one, by (epoch, n), is the order as it stands.';
COMMENT ON COLUMN holdfast.stock_order.n IS 'With epoch: the place in the ledger of the change that began it.';
COMMENT ON COLUMN holdfast.stock_order.state IS 'held: its units are held until expires_ms (Unix ms, Redis''s clock). confirmed: they are sold. cancelled, expired: they were given back.';
COMMENT ON COLUMN holdfast.stock_order.units IS 'The units of each of products. None of an order that was cancelled before it was there.';
COMMENT ON COLUMN holdfast.stock_order.changed_n IS 'With changed_epoch: the position that the caller of its last change was answered.';

ALTER TABLE holdfast.drift ADD COLUMN measure text NOT NULL DEFAULT 'available' CHECK (measure IN ('available', 'held'));
COMMENT ON COLUMN holdfast.drift.measure IS 'Which number of the product differed: the available units, or those that orders hold.';
