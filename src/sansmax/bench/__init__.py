"""Figures: how long, how much memory, on which machine; and the report that shows them."""
