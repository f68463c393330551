"""How good a model is and how sure: predictions collected, metrics, calibration, thresholds, intervals.

Needs the extra `train`.
"""
