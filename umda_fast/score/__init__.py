"""How good a model is and how sure: predictions collected, metrics, calibration, thresholds, intervals.

Needs the extra `train`.
"""



from umda_fast.extras import require

require("umda_fast.score", "pydantic", "yaml", "lightning_fabric", "rich", "scipy", "torchmetrics")
