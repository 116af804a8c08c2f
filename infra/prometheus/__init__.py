"""Metrics of what nodes do, and the alerts on them."""
