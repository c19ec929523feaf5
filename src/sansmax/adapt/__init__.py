"""Networks that somebody has already trained: another attention in them."""
