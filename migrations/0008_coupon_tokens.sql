-- The fencing tokens under which coupons are issued: what comes under one that is older than the newest seen is refused.

ALTER TABLE holdfast.coupon ADD COLUMN last_token bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN holdfast.coupon.last_token IS 'The highest fencing token of the coupon''s lock under which it was issued. Issues under a lower one are refused.';

ALTER TABLE holdfast.coupon_ledger ADD COLUMN token bigint NULL;
COMMENT ON COLUMN holdfast.coupon_ledger.token IS 'The fencing token under which it was issued; null where the lock was not taken, and of all other changes.';
