-- Which serials of a coupon were given out is asked of the ledger: an issue that Postgres refused has no other row.

CREATE INDEX coupon_ledger_issue ON holdfast.coupon_ledger (coupon_id, serial) WHERE kind = 'issue';
