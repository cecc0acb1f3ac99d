-- The whole life of a coupon: redeemed, given back, revoked, altered, deleted.

ALTER TABLE holdfast.coupon ADD CHECK (state IN ('active', 'deleted'));
COMMENT ON COLUMN holdfast.coupon.issued IS 'How many are out: issued and not revoked.';
COMMENT ON COLUMN holdfast.coupon.used IS 'How many of them were redeemed.';
COMMENT ON COLUMN holdfast.coupon.state IS 'active or deleted. The id of a deleted coupon stays taken.';

ALTER TABLE holdfast.coupon_issue
    ADD COLUMN used_at    timestamptz NULL,
    ADD COLUMN order_id   text COLLATE "C" NULL,
    ADD COLUMN revoked_at timestamptz NULL,
    ADD CHECK (state IN ('issued', 'used', 'revoked')),
    ADD CHECK ((state = 'used') = (used_at IS NOT NULL) AND (state = 'used' OR order_id IS NULL)),
    ADD CHECK ((state = 'revoked') = (revoked_at IS NOT NULL));
COMMENT ON COLUMN holdfast.coupon_issue.state IS 'issued, used or revoked. What is revoked is nobody''s any more; its serial is not used again.';
COMMENT ON COLUMN holdfast.coupon_issue.order_id IS 'What it was redeemed for, where that was said.';

ALTER TABLE holdfast.coupon_ledger
    ADD COLUMN issued_delta bigint NOT NULL DEFAULT 0,
    ADD COLUMN used_delta   bigint NOT NULL DEFAULT 0,
    ADD COLUMN total_delta  bigint NOT NULL DEFAULT 0,
    ADD COLUMN order_id     text COLLATE "C" NULL,
    ADD COLUMN total        bigint NULL,
    ADD COLUMN per_user     bigint NULL,
    ADD COLUMN start_ms     bigint NULL,
    ADD COLUMN end_ms       bigint NULL;
COMMENT ON COLUMN holdfast.coupon_ledger.issued_delta IS 'By how much holdfast.coupon.issued moved; used_delta and total_delta likewise.';
COMMENT ON COLUMN holdfast.coupon_ledger.total IS 'With per_user, start_ms and end_ms: the terms that were set. Of an alter, null is what stays as it is, and a time of 0 takes the bound away.';
UPDATE holdfast.coupon_ledger l SET issued_delta = 1 WHERE kind = 'issue';
UPDATE holdfast.coupon_ledger l SET total_delta = l.remaining_after, total = l.remaining_after, per_user = c.per_user, start_ms = c.start_ms,
    end_ms = c.end_ms
FROM holdfast.coupon c WHERE l.kind = 'create' AND c.coupon_id = l.coupon_id;
