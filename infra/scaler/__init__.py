"""The scaler: how many nodes each model gets, and which of them go."""
