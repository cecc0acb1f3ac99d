-- An import that goes on says of the whole file what was not set.

ALTER TABLE holdfast.import ADD COLUMN refused bigint[] NOT NULL DEFAULT '{}';
COMMENT ON COLUMN holdfast.import.refused IS 'The lines up to there that Redis has refused: their products were frozen, or their keys hold something else.';
