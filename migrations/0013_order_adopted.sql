-- An order that was taken over from Redis is what Redis said, whatever the ledger said before.

ALTER TABLE holdfast.stock_order ADD COLUMN adopted_epoch bigint NULL;
COMMENT ON COLUMN holdfast.stock_order.adopted_epoch IS 'The epoch under which holdfast rebuild --from redis made it what it is: what the ledger has of it from before says nothing any more.';
