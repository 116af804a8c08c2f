"""What the checker checks, by promise; each function takes a `Case` and notes what is wrong."""
