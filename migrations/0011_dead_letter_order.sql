-- What is parked of an order is looked for when the order ends.
CREATE INDEX dead_letter_order ON holdfast.dead_letter (substring(line FROM ' order=([^ ]+) '));
