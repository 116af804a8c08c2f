"""The Wan 2.2 engine: text to frames, on one device or many. Knows no queue, no Ray, no service."""
