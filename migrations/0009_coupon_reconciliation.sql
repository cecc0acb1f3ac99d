-- Differences of coupons, and what moved coupons beside their ledger before 0007 began to add that up.

ALTER TABLE holdfast.drift DROP CONSTRAINT drift_measure_check,
    ADD CHECK (measure IN ('available', 'held', 'total', 'issued', 'used', 'serial', 'users'));
COMMENT ON COLUMN holdfast.drift.product_id IS 'The product, or the coupon: measure says which.';
COMMENT ON COLUMN holdfast.drift.measure IS 'Which number differed: of a product the available units, or those that orders hold; of a coupon how many there are, are issued, were used, the highest serial, or how many users have any.';
COMMENT ON COLUMN holdfast.coupon_ledger.serial IS 'Which coupon of its kind it is about; of an adopt by how much last_serial moved.';
COMMENT ON COLUMN holdfast.coupon_ledger.issued_delta IS 'By how much holdfast.coupon.issued moved; used_delta and total_delta likewise. Of a correct, by which Redis alone moved, they are 0: holdfast.drift has it.';

-- Nobody moves a coupon between this sum and the end of the transaction.
LOCK TABLE holdfast.coupon IN SHARE ROW EXCLUSIVE MODE;
WITH owed AS (
    SELECT substring(d.line FROM ' coupon=([^ ]+) ') AS coupon_id,
        sum(CASE d.kind WHEN 'coupon.create' THEN substring(d.line FROM ' total=(\d+)')::bigint
            WHEN 'coupon.alter' THEN coalesce(substring(d.line FROM ' by=(-?\d+)')::bigint, 0) ELSE 0 END) AS total,
        sum(CASE d.kind WHEN 'coupon.issue' THEN 1 WHEN 'coupon.revoke' THEN -1 ELSE 0 END) AS issued,
        sum(CASE d.kind WHEN 'coupon.use' THEN 1 WHEN 'coupon.unuse' THEN -1 ELSE 0 END) AS used
    FROM holdfast.dead_letter d WHERE d.kind LIKE 'coupon.%'
        AND EXISTS (SELECT 1 FROM holdfast.coupon_ledger l WHERE l.op = d.op AND l.k = d.k)
    GROUP BY 1
), gap AS (
    SELECT c.coupon_id,
        c.total - coalesce(l.total, 0) - coalesce(o.total, 0) + coalesce(d.total, 0) AS total,
        c.issued - coalesce(l.issued, 0) - coalesce(o.issued, 0) + coalesce(d.issued, 0) AS issued,
        c.used - coalesce(l.used, 0) - coalesce(o.used, 0) + coalesce(d.used, 0) AS used
    FROM holdfast.coupon c
    LEFT JOIN (SELECT coupon_id, sum(total_delta) AS total, sum(issued_delta) AS issued, sum(used_delta) AS used
        FROM holdfast.coupon_ledger GROUP BY coupon_id) l USING (coupon_id)
    LEFT JOIN holdfast.outside o ON o.kind = 'coupon' AND o.id = c.coupon_id
    LEFT JOIN owed d USING (coupon_id)
)
INSERT INTO holdfast.outside AS o (kind, id, total, issued, used)
SELECT 'coupon', coupon_id, total, issued, used FROM gap WHERE total <> 0 OR issued <> 0 OR used <> 0
ON CONFLICT (kind, id) DO UPDATE SET total = o.total + excluded.total, issued = o.issued + excluded.issued, used = o.used + excluded.used;
