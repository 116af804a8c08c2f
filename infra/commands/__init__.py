"""The groups of `reel` commands; each module's `register` adds its own."""
