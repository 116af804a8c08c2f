"""Clouds: SkyPilot, Kubernetes, and a simulated one; each file is one driver."""
