"""The demo model: Wan 2.2 in miniature, trained on a synthetic world."""
