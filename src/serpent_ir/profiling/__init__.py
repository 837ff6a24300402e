"""Networks counted and measured, the tables and figures of that."""
