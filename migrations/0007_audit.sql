-- What holdfast audit needs: whatever moved stock and coupons and is no row of a ledger, added up. With it, what there is can always be
-- worked out of the ledgers.

CREATE TABLE holdfast.outside (
    kind      text   NOT NULL CHECK (kind IN ('product', 'coupon')),
    id        text COLLATE "C" NOT NULL,
    available bigint NOT NULL DEFAULT 0,
    held      bigint NOT NULL DEFAULT 0,
    total     bigint NOT NULL DEFAULT 0,
    issued    bigint NOT NULL DEFAULT 0,
    used      bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (kind, id)
);
COMMENT ON TABLE holdfast.outside IS 'By how much holdfast.stock and holdfast.coupon moved beside the ledgers, in all: other programs changed them, or a dead letter was given up. holdfast audit counts it.';

INSERT INTO holdfast.outside (kind, id, available, held)
SELECT 'product', s.product_id, s.available - coalesce(l.available, 0) + coalesce(d.units, 0), s.held - coalesce(l.held, 0)
FROM holdfast.stock s
LEFT JOIN (SELECT product_id, sum(pg_delta) AS available, sum(held_delta) AS held FROM holdfast.stock_ledger GROUP BY product_id) l
    USING (product_id)
LEFT JOIN (SELECT d.product_id, sum(d.delta) AS units FROM holdfast.dead_letter d
    WHERE d.in_redis OR EXISTS (SELECT 1 FROM holdfast.stock_ledger k WHERE k.op = d.op AND k.k = d.k AND k.i = d.i)
    GROUP BY d.product_id) d USING (product_id)
WHERE s.available <> coalesce(l.available, 0) - coalesce(d.units, 0) OR s.held <> coalesce(l.held, 0);

CREATE FUNCTION holdfast.stock_outside() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    product text;
    units bigint := 0;
    kept bigint := 0;
BEGIN
    IF TG_OP <> 'INSERT' THEN
        product := OLD.product_id;
        units := -OLD.available;
        kept := -OLD.held;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        product := NEW.product_id;
        units := units + NEW.available;
        kept := kept + NEW.held;
    END IF;
    IF units <> 0 OR kept <> 0 THEN
        INSERT INTO holdfast.outside AS o (kind, id, available, held) VALUES ('product', product, units, kept)
        ON CONFLICT (kind, id) DO UPDATE SET available = o.available + excluded.available, held = o.held + excluded.held;
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER stock_outside AFTER INSERT OR UPDATE OR DELETE ON holdfast.stock
    FOR EACH ROW WHEN (current_setting('holdfast.writer', true) IS DISTINCT FROM 'holdfast')
    EXECUTE FUNCTION holdfast.stock_outside();

CREATE FUNCTION holdfast.coupon_outside() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    coupon text;
    all_of_it bigint := 0;
    out_now bigint := 0;
    redeemed bigint := 0;
BEGIN
    IF TG_OP <> 'INSERT' THEN
        coupon := OLD.coupon_id;
        all_of_it := -OLD.total;
        out_now := -OLD.issued;
        redeemed := -OLD.used;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        coupon := NEW.coupon_id;
        all_of_it := all_of_it + NEW.total;
        out_now := out_now + NEW.issued;
        redeemed := redeemed + NEW.used;
    END IF;
    IF all_of_it <> 0 OR out_now <> 0 OR redeemed <> 0 THEN
        INSERT INTO holdfast.outside AS o (kind, id, total, issued, used) VALUES ('coupon', coupon, all_of_it, out_now, redeemed)
        ON CONFLICT (kind, id) DO UPDATE SET total = o.total + excluded.total, issued = o.issued + excluded.issued, used = o.used + excluded.used;
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER coupon_outside AFTER INSERT OR UPDATE OR DELETE ON holdfast.coupon
    FOR EACH ROW WHEN (current_setting('holdfast.writer', true) IS DISTINCT FROM 'holdfast')
    EXECUTE FUNCTION holdfast.coupon_outside();

-- Unfinished and finished runs of holdfast import, one a file.
CREATE TABLE holdfast.import (
    digest     text NOT NULL PRIMARY KEY,
    name       text NOT NULL,
    instances  text[] NOT NULL,
    lines      bigint NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL DEFAULT now(),
    done_at    timestamptz NULL
);
COMMENT ON TABLE holdfast.import IS 'Files that holdfast import reads: up to which line everything is here, and which processes wrote it, so that one that was stopped goes on.';
