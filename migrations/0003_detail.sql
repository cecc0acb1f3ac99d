-- A row of the ledger may stand for several operations: with ledger.detail = "batch" for all that one batch did to a product.

ALTER TABLE holdfast.stock_ledger
    ADD COLUMN operations int  NOT NULL DEFAULT 1,
    ADD COLUMN runs       text NULL;
COMMENT ON COLUMN holdfast.stock_ledger.n IS 'With epoch: the position that the caller was answered; where the row stands for several operations, that of the first. The others follow it.';
COMMENT ON COLUMN holdfast.stock_ledger.operations IS 'How many operations the row stands for: they have the positions n up to n + operations - 1. The deltas are their sums, available_after is what there was after the last.';
COMMENT ON COLUMN holdfast.stock_ledger.runs IS 'Where there are several: which places of the batch they had, in order, and by how much each moved the units, as in 0-15:-1,17:-3. k is the first of these places.';
