"""Everything around the service: the `reel` command, the embedded local stack, deployment."""
