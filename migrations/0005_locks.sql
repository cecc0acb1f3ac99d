-- What keeps the fencing tokens of locks growing for ever, also over a Redis that lost everything.
CREATE TABLE holdfast.lock (
    only_row     boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    installation uuid   NOT NULL DEFAULT gen_random_uuid(),
    epoch        bigint NOT NULL DEFAULT 0 CHECK (epoch BETWEEN 0 AND 2097150)
);
INSERT INTO holdfast.lock DEFAULT VALUES;
COMMENT ON TABLE holdfast.lock IS 'The locks of this installation: one row.';
COMMENT ON COLUMN holdfast.lock.installation IS 'Whose locks they are: what stands before the token in the field of a lock in Redis.';
COMMENT ON COLUMN holdfast.lock.epoch IS 'Every token that is given out now is above epoch * 2^32, and none was before; raised for each Redis that is not known to have all tokens.';
