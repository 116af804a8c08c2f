"""A discrete-event simulation of fleets: the real scaler and the real queue scripts, under a virtual clock.
"""
