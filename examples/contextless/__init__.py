"""An encoder without context: a table, as a control and as the start of a student."""
