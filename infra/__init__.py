"""The command line, the embedded local stack and what deploys reelserve."""
